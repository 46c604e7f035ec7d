// The loops over one tile, for one instruction set. Included inside namespace KLDIV_ISA after the lanes, fast_math.h
// and divergences.h.

// --- conversions ------------------------------------------------------------------------------------------------
// What stands for a logit: (x - offset) * scale, kNoMass where x has no mass, and above it where x has some.
inline Floats scaled(Floats x, Floats offset, Floats scale) {
    const Floats y = max(broadcast(kAboveNoMass), (x - offset) * scale);
    return select(x < broadcast(kAboveNoMass), broadcast(kNoMass), y);
}

// The first sweep also measures the tile; the later ones only convert it.
template <Dtype dtype, bool measured>
Loaded load_tile(const void* from, int columns, float scale, float offset, float* to) {
    constexpr float inf = std::numeric_limits<float>::infinity();
    const int whole = columns - columns % Floats::lanes;
    const Floats factor = broadcast(scale), shift = broadcast(offset);
    Floats largest = broadcast(-inf), smallest = broadcast(inf);
    for (int i = 0; i < whole; i += Floats::lanes) {
        const Floats x = convert<dtype>(from, i);
        if constexpr (measured) {
            largest = max(x, largest);
            smallest = min(x, smallest);
        }
        store(to + i, scaled(x, shift, factor));
    }
    Loaded out{kldiv::KLDIV_ISA::largest(largest), -kldiv::KLDIV_ISA::largest(-smallest) <= kNoMass};
    for (int i = whole; i < columns; ++i) {
        const float x = convert_one<dtype>(from, i);
        out.largest = out.largest > x ? out.largest : x;
        out.has_no_mass |= x <= kNoMass;
        to[i] = scaled_one(x, offset, scale);
    }
    for (int i = columns; i % kPad != 0; ++i) to[i] = kNoMass;
    return out;
}

// data *= factor, rounded once.
template <Dtype dtype>
void scale_tile(void* data, int columns, float factor) {
    alignas(64) float buffer[kTile];
    const int whole = columns - columns % Floats::lanes;
    for (int i = 0; i < whole; i += Floats::lanes) store(buffer + i, convert<dtype>(data, i) * broadcast(factor));
    for (int i = whole; i < columns; ++i) buffer[i] = convert_one<dtype>(data, i) * factor;
    store_tile<dtype>(buffer, columns, data);
}

// --- first sweep: sums of one row, and of two --------------------------------------------------------------------
inline Floats exponent(Floats x, Floats m) { return fma(x, broadcast(kLog2e), -m); }

// Sums go a run of columns at a time: thousands of equal terms, added to one large term one after the other, would
// round the same way each time.
constexpr int kRun = 16 * Floats::lanes;

inline double sum_exp(const float* x, int columns, float m) {
    const Floats reference = broadcast(m);
    Floats z = broadcast(0.0f);
    for (int begin = 0; begin < columns; begin += kRun) {
        const int end = std::min(columns, begin + kRun);
        Floats run = broadcast(0.0f);
        for (int i = begin; i < end; i += Floats::lanes) run = run + exp2(exponent(load(x + i), reference));
        z = z + run;
    }
    return sum(z);
}

inline void sum_exp_entropy(const float* x, int columns, float m, double* z_out, double* a_out) {
    const Floats reference = broadcast(m);
    Floats z = broadcast(0.0f), a = broadcast(0.0f);
    for (int begin = 0; begin < columns; begin += kRun) {
        const int end = std::min(columns, begin + kRun);
        Floats run_z = broadcast(0.0f), run_a = broadcast(0.0f);
        for (int i = begin; i < end; i += Floats::lanes) {
            const Floats y = exponent(load(x + i), reference), e = exp2(y);
            run_z = run_z + e;
            run_a = fma(e, y, run_a);
        }
        z = z + run_z;
        a = a + run_a;
    }
    *z_out = sum(z);
    *a_out = -sum(a) * kExponentToLog;
}

// The online kernels also park two floats a column, x and y, of which the gradient of the row's divergence is a linear
// combination c_x x + c_y y once the row is finished (row_gradient.cpp).
enum class Park { none, both, weighted };

template <Park park>
__attribute__((flatten)) void online_kl(const float* s, const float* t, int columns, const OnlineTile& tile,
                                        OnlineSums* sums, float* x, float* y) {
    const Floats ms = broadcast(tile.m_second), mt = broadcast(tile.m_first), d = broadcast(tile.delta);
    const Floats k = broadcast(tile.kappa);
    Floats zs = broadcast(0.0f), zt = broadcast(0.0f), g = broadcast(0.0f);
    for (int begin = 0; begin < columns; begin += kRun) {
        const int end = std::min(columns, begin + kRun);
        Floats run_s = broadcast(0.0f), run_t = broadcast(0.0f), run_g = broadcast(0.0f);
        for (int i = begin; i < end; i += Floats::lanes) {
            const Floats second = load(s + i), first = load(t + i);
            const Floats q = exp2(exponent(second, ms)), p = exp2(exponent(first, mt));
            // Nearly exact where the rows are close, and the same but for its sign with the rows exchanged.
            const Floats u = (first - second) - d;
            run_s = run_s + q;
            run_t = run_t + p;
            run_g = run_g + kl_term(p, q * k, u);
            if constexpr (park == Park::both) {
                store(x + i, q);
                store(y + i, p);
            } else if constexpr (park == Park::weighted) {
                store(x + i, p);
                store(y + i, p * u);
            }
        }
        zs = zs + run_s;
        zt = zt + run_t;
        g = g + run_g;
    }
    *sums = {sum(zs), sum(zt), sum(g)};
}

template <Park park>
__attribute__((flatten)) void online_hellinger(const float* s, const float* t, int columns, const OnlineTile& tile,
                                               OnlineSums* sums, float* x, float* y) {
    const Floats ms = broadcast(0.5f * tile.m_second), mt = broadcast(0.5f * tile.m_first);
    const Floats half = broadcast(0.5f * kLog2e), k = broadcast(std::sqrt(tile.kappa));
    Floats zs = broadcast(0.0f), zt = broadcast(0.0f), g = broadcast(0.0f);
    for (int begin = 0; begin < columns; begin += kRun) {
        const int end = std::min(columns, begin + kRun);
        Floats run_s = broadcast(0.0f), run_t = broadcast(0.0f), run_g = broadcast(0.0f);
        for (int i = begin; i < end; i += Floats::lanes) {
            const Floats root_q = exp2(fma(load(s + i), half, -ms)), root_p = exp2(fma(load(t + i), half, -mt));
            const Floats q = root_q * root_q;
            run_s = run_s + q;
            run_t = run_t + root_p * root_p;  // rounded as q is: equal rows have equal sums
            const Floats difference = root_p - root_q * k;
            run_g = fma(difference, difference, run_g);
            if constexpr (park != Park::none) {
                store(x + i, q);
                store(y + i, root_p * root_q);
            }
        }
        zs = zs + run_s;
        zt = zt + run_t;
        g = g + run_g;
    }
    *sums = {sum(zs), sum(zt), 0.5 * sum(g)};
}

// --- later sweeps: with the finished softmax ----------------------------------------------------------------------
template <class D>
struct Normaliser {
    Floats m_s, scale_s, lse_s, m_t, scale_t, lse_t, delta_high, delta_low, log2e;

    explicit Normaliser(const NormalisedRow& row)
        : m_s(broadcast(D::roots ? 0.5f * row.s.m : row.s.m)),
          scale_s(broadcast(D::roots ? std::sqrt(row.s.inverse_z) : row.s.inverse_z)),
          lse_s(broadcast(row.s.lse)),
          m_t(broadcast(D::roots ? 0.5f * row.t.m : row.t.m)),
          scale_t(broadcast(D::roots ? std::sqrt(row.t.inverse_z) : row.t.inverse_z)),
          lse_t(broadcast(row.t.lse)),
          delta_high(broadcast(row.delta_high)),
          delta_low(broadcast(row.delta_low)),
          log2e(broadcast(D::roots ? 0.5f * kLog2e : kLog2e)) {}

    Element<Floats> element(const float* s, const float* t, int i) const {
        Element<Floats> e;
        const Floats student = load(s + i);
        const Floats q = exp2(fma(student, log2e, -m_s)) * scale_s;
        e.lq = student - lse_s;
        e.root_q = q;
        e.q = D::roots ? q * q : q;
        if constexpr (D::needs_p) {
            const Floats teacher = load(t + i);
            const Floats p = exp2(fma(teacher, log2e, -m_t)) * scale_t;
            e.lp = teacher - lse_t;
            e.root_p = p;
            e.p = D::roots ? p * p : p;
            e.u = ((teacher - student) - delta_high) - delta_low;
        }
        return e;
    }
};

// flatten: one call left in a loop costs more than the loop's own work.
template <class D, bool park>
__attribute__((flatten)) void terms(const float* s, const float* t, int columns, const NormalisedRow& row, double* sums,
                                    LogSum* log_sum, float* x, float* y) {
    const Normaliser<D> normaliser(row);
    const double unknown[kRowConstants] = {};
    const typename D::template Constants<Floats> constants(row.alpha, row.beta, unknown);
    for (int begin = 0; begin < columns; begin += kRun) {
        const int end = std::min(columns, begin + kRun);
        Floats totals[D::sums], out[D::sums];
        for (Floats& total : totals) total = broadcast(0.0f);
        for (int i = begin; i < end; i += Floats::lanes) {
            const Element<Floats> e = normaliser.element(s, t, i);
            D::terms(e, constants, out);
            if constexpr (park) {
                store(x + i, e.q);
                store(y + i, D::grad_logq(e, constants));
            }
            for (int j = 0; j < D::sums; ++j) totals[j] = totals[j] + out[j];
        }
        for (int j = 0; j < D::sums; ++j) sums[j] += sum(totals[j]);
    }
    if constexpr (D::log_sum) {
        Floats top = broadcast(kNoMass);
        for (int i = 0; i < columns; i += Floats::lanes)
            top = max(D::log_weight(normaliser.element(s, t, i), constants), top);
        const float reference = largest(top);
        Floats total = broadcast(0.0f);
        for (int i = 0; i < columns; i += Floats::lanes)
            total = total + exp(D::log_weight(normaliser.element(s, t, i), constants) - broadcast(reference));
        const double larger = std::max<double>(log_sum->max, reference);
        const double kept = log_sum->sum > 0 ? log_sum->sum * std::exp(log_sum->max - larger) : 0.0;
        log_sum->sum = kept + sum(total) * std::exp(reference - larger);
        log_sum->max = larger;
    }
}

template <class D, bool student>
__attribute__((flatten)) void gradient(const float* s, const float* t, int columns, const NormalisedRow& row,
                                       float weight, float share, bool first, float* to) {
    const Normaliser<D> normaliser(row);
    const typename D::template Constants<Floats> constants(row.alpha, row.beta, row.k);
    const Floats w = broadcast(weight), of_softmax = broadcast(first ? share : 0.0f);
    const auto one = [&](int i) {
        const Element<Floats> e = normaliser.element(s, t, i);
        const Floats g = student ? D::grad_logq(e, constants) : D::grad_logp(e, constants);
        return fma(w, g, of_softmax * (student ? e.q : e.p));
    };
    if (first) {
        for (int i = 0; i < columns; i += Floats::lanes) store(to + i, one(i));
    } else {
        for (int i = 0; i < columns; i += Floats::lanes) store(to + i, load(to + i) + one(i));
    }
}

inline void softmax(const float* x, int columns, const Softmax& row, float share, float* to) {
    const Floats m = broadcast(row.m), scale = broadcast(row.inverse_z * share);
    for (int i = 0; i < columns; i += Floats::lanes) store(to + i, exp2(exponent(load(x + i), m)) * scale);
}

// to = c_x x + c_y y, rounded to the gradient's dtype. Both products are rounded: those of equal rows cancel exactly.
template <Dtype dtype>
void combine(const float* x, const float* y, int padded, int columns, float c_x, float c_y, void* to) {
    alignas(64) float buffer[kTile];
    const Floats cx = broadcast(c_x), cy = broadcast(c_y);
    for (int i = 0; i < padded; i += Floats::lanes) store(buffer + i, cx * load(x + i) + cy * load(y + i));
    store_tile<dtype>(buffer, columns, to);
}

// --- the table ----------------------------------------------------------------------------------------------------
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
        if constexpr (D::grad_needs_row)
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
    kernels.sum_exp_entropy = sum_exp_entropy;
    kernels.forward_kl[0] = kernels.reverse_kl[0] = online_kl<Park::none>;
    kernels.forward_kl[1] = online_kl<Park::both>;
    kernels.reverse_kl[1] = online_kl<Park::weighted>;
    kernels.hellinger[0] = online_hellinger<Park::none>;
    kernels.hellinger[1] = online_hellinger<Park::both>;
    kernels.combine[0] = combine<Dtype::float32>;
    kernels.combine[1] = combine<Dtype::bfloat16>;
    kernels.combine[2] = combine<Dtype::float16>;
    kernels.softmax = softmax;
    kernels.divergences = table_of_divergences;
    kernels.divergence_count = sizeof table_of_divergences / sizeof table_of_divergences[0];
    return kernels;
}
