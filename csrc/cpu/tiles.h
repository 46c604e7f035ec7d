// The loops over one tile, for one instruction set, as the table that kernels.h declares. Included inside namespace
// KLDIV_ISA after the lanes, fast_math.h, divergences.h and convert.h.

// The exponent of a column (kernels.h).
inline Floats exponent(Floats x, Floats m) { return fma(x, broadcast(kLog2e), -m); }

// Sums go a run of columns at a time: thousands of equal terms, added to one large term one after the other, would
// round the same way each time.
constexpr int kRun = 16 * Floats::lanes;

#include "tile_first_sweep.h"
#include "tile_normalised.h"

template <class D>
void finish(const double* sums, double log_sum, bool q_is_zero, bool p_is_zero, double alpha, double beta,
            double* value_and_sums, double* k) {
    RowSums row;
    std::copy(sums, sums + D::sums, row.sum);
    row.log_sum = log_sum;
    row.q_is_zero = q_is_zero;
    row.p_is_zero = p_is_zero;
    if ((q_is_zero && D::infinite_where_q_is_zero(alpha)) || (p_is_zero && D::infinite_where_p_is_zero(alpha)))
        (D::log_sum ? row.log_sum : row.sum[0]) = infinity;
    const Finished done = D::finish(row, alpha, beta);
    value_and_sums[0] = done.value;
    value_and_sums[1] = done.sum_q;
    value_and_sums[2] = done.sum_p;
    std::copy(done.k, done.k + kRowConstants, k);
}

template <class D>
constexpr DivergenceKernels divergence(const char* name) {
    constexpr auto grad_p = [] {
        if constexpr (D::needs_p)
            return &gradient<D, false>;
        else
            return static_cast<decltype(&gradient<D, true>)>(nullptr);
    }();
    constexpr auto park = [] {
        if constexpr (D::grad_needs_row || D::roots || !D::needs_p)
            return static_cast<decltype(&terms<D, false>)>(nullptr);
        else
            return &terms<D, true>;
    }();
    return {name,
            D::sums,
            D::log_sum,
            D::needs_p,
            finishes_first(name),
            D::infinite_where_q_is_zero,
            D::infinite_where_p_is_zero,
            finish<D>,
            terms<D, false>,
            park,
            gradient<D, true>,
            grad_p};
}

#define KLDIV_ROW(name, D) divergence<D>(#name),
const DivergenceKernels table_of_divergences[] = {KLDIV_DIVERGENCES(KLDIV_ROW)};
#undef KLDIV_ROW

inline Kernels make_kernels(const char* isa) {
    Kernels kernels{};
    kernels.isa = isa;
    kernels.measured_load[0] = load_tile<Dtype::float32, true>;
    kernels.measured_load[1] = load_tile<Dtype::bfloat16, true>;
    kernels.measured_load[2] = load_tile<Dtype::float16, true>;
    kernels.load[0] = load_tile<Dtype::float32, false>;
    kernels.load[1] = load_tile<Dtype::bfloat16, false>;
    kernels.load[2] = load_tile<Dtype::float16, false>;
    kernels.store[0] = store_tile<Dtype::float32>;
    kernels.store[1] = store_tile<Dtype::bfloat16>;
#ifdef KLDIV_AVX512
    if (__builtin_cpu_supports("avx512bf16")) kernels.store[1] = store_bfloat16_tile;
#endif
    kernels.store[2] = store_tile<Dtype::float16>;
    kernels.scale[0] = scale_tile<Dtype::float32>;
    kernels.scale[1] = scale_tile<Dtype::bfloat16>;
    kernels.scale[2] = scale_tile<Dtype::float16>;
    kernels.sum_exp = sum_exp;
    kernels.sum_exp_times[0] = sum_exp_times<false>;
    kernels.sum_exp_times[1] = sum_exp_times<true>;
    kernels.sum_exp_entropy = sum_exp_entropy;
    kernels.forward_kl[0][0] = kernels.reverse_kl[0][0] = online_kl<Park::none, false>;
    kernels.forward_kl[0][1] = kernels.reverse_kl[0][1] = online_kl<Park::none, true>;
    kernels.forward_kl[1][0] = online_kl<Park::both, false>;
    kernels.forward_kl[1][1] = online_kl<Park::both, true>;
    kernels.reverse_kl[1][0] = online_kl<Park::weighted, false>;
    kernels.reverse_kl[1][1] = online_kl<Park::weighted, true>;
    kernels.hellinger[0] = online_hellinger<Park::none>;
    kernels.hellinger[1] = online_hellinger<Park::both>;
    kernels.combine = combine;
    kernels.add = add;
    kernels.softmax = softmax;
    kernels.add_exp = add_exp;
    kernels.divergences = table_of_divergences;
    kernels.divergence_count = sizeof table_of_divergences / sizeof table_of_divergences[0];
    return kernels;
}
