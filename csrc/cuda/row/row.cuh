// One row: what is asked of it, where it is, what its finished softmaxes are, its statistics.
#pragma once

#include <type_traits>

#include "../../first_sweep.h"
#include "../job.h"
#include "state.cuh"

namespace kldiv::gpu {

// The statistics by number, in the order of this list; the first seven are no divergences.
enum Code {
    kLogprob,
    kReferenceLogprob,
    kUntemperedLogprob,
    kTailLogprob,
    kLogsumexp,
    kMaxLogprob,
    kArgmaxCode,
#define KLDIV_CODE(name, D) k_##name,
    KLDIV_DIVERGENCES(KLDIV_CODE)
#undef KLDIV_CODE
        kCodes
};

// Saved state of a row: references and sums of both softmaxes, then for each statistic the sums of its gradients and
// its constants, as [state rows, N]. The constants of tail_logprob and of untempered_logprob are the reference and the
// sum of the softmax that they are of.
constexpr int kStateOfRow = 4, kStateOfStatistic = 2 + kRowConstants;

// Below this exponent a float64 softmax underflows: log2(e^-745).
constexpr float kZeroExponent = -1074.8f;

KLDIV_DEVICE const char* row_at(const Rows& rows, int64_t index) {
    // In 32 bits: rows are no more than blocks can be, and a division of 64 bits takes a hundred instructions.
    uint32_t rest = static_cast<uint32_t>(index);
    int64_t offset = 0;
#pragma unroll
    for (int i = kMostDimensions - 1; i > 0; --i) {
        if (i >= rows.dimensions) continue;
        offset += rest % rows.sizes[i] * rows.strides[i];
        rest /= rows.sizes[i];
    }
    if (rows.dimensions > 0) offset += rest * rows.strides[0];
    return static_cast<const char*>(rows.data) + offset * element_bytes(rows.element);
}
KLDIV_DEVICE char* row_at(const Gradient& gradient, int element, int64_t index) {
    return static_cast<char*>(gradient.data) + index * gradient.width * element_bytes(element);
}
// The first `threads` threads of a block write zeros to columns [begin, end) of a row.
KLDIV_DEVICE void zero_columns(const Gradient& to, int element, int64_t index, int64_t begin, int64_t end,
                               int threads) {
    for (int64_t start = begin + thread_index() * kColumns; start < end; start += threads * kColumns)
        store_columns(row_at(to, element, index), element, start, end, Columns{});
}

// Where a row is and how it is read.
struct RowInput {
    const char *student, *teacher;  // teacher: student where there is none
    Scale s, t;
    float alpha, beta;
    int64_t exclude;
};

KLDIV_DEVICE RowInput open_row(const Call& call, int64_t index) {
    float p[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        p[i] = call.token_parameters ? call.token_parameters[i * call.rows + index] : call.parameters[i];
    RowInput row;
    row.student = row_at(call.student, index);
    row.teacher = call.teacher.data ? row_at(call.teacher, index) : row.student;
    row.s = scale_of(p[0]);
    row.t = scale_of(p[1]);
    row.alpha = p[2];
    row.beta = p[3];
    row.exclude = call.exclude ? call.exclude[index] : -1;
    return row;
}

// A statistic as this row takes it: js at beta = 0 is forward KL, and so on.
struct Resolved {
    int code;
    float alpha;
};
KLDIV_HOST_DEVICE Resolved resolve(int code, float alpha, float beta) {
    if (code == k_js && (beta <= 0 || beta >= 1)) return {beta <= 0 ? k_forward_kl : k_reverse_kl, alpha};
    if (code == k_alpha && (alpha == 0 || alpha == 1)) return {alpha == 1 ? k_forward_kl : k_reverse_kl, alpha};
    if (code == k_skew_kl && alpha == 0) return {k_forward_kl, alpha};
    if (code == k_skew_reverse_kl && alpha == 0) return {k_reverse_kl, alpha};
    if (code == k_alpha && alpha < 0.5f) return {k_alpha_below_half, 1 - alpha};
    return {code, alpha};
}

// function(D{}) for the divergence of that code.
template <class Function>
KLDIV_DEVICE void with_divergence(int code, Function function) {
    switch (code) {
#define KLDIV_CASE(name, ...)    \
    case k_##name:               \
        function(__VA_ARGS__{}); \
        break;
        KLDIV_DIVERGENCES(KLDIV_CASE)
#undef KLDIV_CASE
    }
}

// A value for each label.
KLDIV_HOST_DEVICE constexpr bool per_label(int code) {
    return code == kLogprob || code == kReferenceLogprob || code == kUntemperedLogprob;
}

// What is no divergence has a code below theirs.
KLDIV_HOST_DEVICE constexpr bool finishes_first(int code) {
#define KLDIV_IS(name) code == k_##name ||
    return KLDIV_FIRST_SWEEP(KLDIV_IS) code < k_entropy;
#undef KLDIV_IS
}
template <class D>
constexpr int code_of() {
#define KLDIV_CODE_OF(name, ...) \
    if constexpr (std::is_same_v<D, __VA_ARGS__>) return k_##name;
    KLDIV_DIVERGENCES(KLDIV_CODE_OF)
#undef KLDIV_CODE_OF
}

// The finished softmaxes of a row: q = 2^(s c - m) / z. An exponent is one fused multiply-add, rounded once, so that
// log p and log q are right to their own last place however large the logits are, and so is their difference.
struct Normalised {
    float cs, ct, floor_s, floor_t;
    float ms, mt, zs, zt;  // z NaN: no softmax
    float over_zs, over_zt, log_zs, log_zt;
};

KLDIV_DEVICE Normalised normalise(const RowInput& row, float ms, float zs, float mt, float zt) {
    Normalised n;
    n.cs = row.s.c, n.ct = row.t.c;
    n.floor_s = row.s.floor, n.floor_t = row.t.floor;
    n.ms = ms, n.mt = mt;
    n.zs = zs, n.zt = zt;
    n.over_zs = 1 / zs;
    n.over_zt = 1 / zt;
    n.log_zs = ::logf(zs);
    n.log_zt = ::logf(zt);
    return n;
}
// From the merged state of a row.
KLDIV_DEVICE Normalised normalise(const RowInput& row, const State& state, bool teacher) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    return normalise(row, state.s.m, state.s.z == 0 ? nan : state.s.z, teacher ? state.t.m : 0.0f,
                     teacher ? (state.t.z == 0 ? nan : state.t.z) : 1.0f);
}

// One column of normalised rows as D takes it.
template <class D>
KLDIV_DEVICE Element<float> element_of(const Normalised& n, float s, float t) {
    Element<float> e;
    const float ys = fma(s, n.cs, -n.ms);
    if constexpr (D::roots) {
        e.root_q = exp2(0.5f * ys) * ::sqrtf(n.over_zs);
        e.q = e.root_q * e.root_q;
    } else {
        e.root_q = 0;
        e.q = exp2(ys) * n.over_zs;
    }
    e.lq = fma(ys, kLn2, -n.log_zs);
    e.p = e.root_p = e.lp = e.u = 0;
    if constexpr (D::needs_p) {
        const float yt = fma(t, n.ct, -n.mt);
        if constexpr (D::roots) {
            e.root_p = exp2(0.5f * yt) * ::sqrtf(n.over_zt);
            e.p = e.root_p * e.root_p;
        } else {
            e.p = exp2(yt) * n.over_zt;
        }
        e.lp = fma(yt, kLn2, -n.log_zt);
        e.u = e.lp - e.lq;
    }
    return e;
}

// The sums of a statistic's normalised terms, a monoid.
struct Sums {
    float sum[4] = {0, 0, 0, 0};
    float log_top = kNoLogit, log_sum = 0;  // log sum e^w = log_top + log(log_sum)
};

constexpr int kSumsFloats = 6;
KLDIV_DEVICE void save(const Sums& x, float* to) {
#pragma unroll
    for (int j = 0; j < 4; ++j) to[j] = x.sum[j];
    to[4] = x.log_top;
    to[5] = x.log_sum;
}
KLDIV_DEVICE Sums saved_sums(const float* from) {
    Sums x;
#pragma unroll
    for (int j = 0; j < 4; ++j) x.sum[j] = from[j];
    x.log_top = from[4];
    x.log_sum = from[5];
    return x;
}

template <class D>
KLDIV_DEVICE void add_terms(Sums& sums, const typename D::template Constants<float>& constants, const Normalised& n,
                            const Columns& s, const Columns& t) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
        const Element<float> e = element_of<D>(n, s.x[i], t.x[i]);
        float terms[D::sums];
        D::terms(e, constants, terms);
#pragma unroll
        for (int j = 0; j < D::sums; ++j) sums.sum[j] += terms[j];
        if constexpr (D::log_sum) {
            const float w = D::log_weight(e, constants);
            if (w > sums.log_top) {
                sums.log_sum *= exp(sums.log_top - w);
                sums.log_top = w;
            }
            sums.log_sum += exp(w - sums.log_top);
        }
    }
}

// Over the lanes of a warp, or over each `width` of them; every lane gets the result. `count` sums, and whether there
// is a log-sum-exp.
KLDIV_DEVICE void merge_lanes(Sums& sums, int width = kLanes, int count = 4, bool log_sum = true) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
        if (j < count) sums.sum[j] = warp_sum(sums.sum[j], width);
    if (!log_sum) return;
    const float top = warp_max(sums.log_top, width);
    sums.log_sum = warp_sum(sums.log_sum * exp(sums.log_top - top), width);
    sums.log_top = top;
}
template <class D>
KLDIV_DEVICE void merge_lanes(Sums& sums, int width = kLanes) {
    merge_lanes(sums, width, D::sums, D::log_sum);
}

// Of a row, where p (q) has mass and the other row has none; needs the merged state.
struct Flags {
    bool q_is_zero, p_is_zero;
};
KLDIV_DEVICE Flags flags_of(const RowInput& row, const State& state) {
    return {fma(state.t.blocked, row.t.c, -state.t.m) > kZeroExponent,
            fma(state.s.blocked, row.s.c, -state.s.m) > kZeroExponent};
}

// NaN where a row that D looks at has no softmax.
template <class D>
KLDIV_DEVICE Finished finish_as(const Sums& sums, const Flags& flags, const Normalised& n, float alpha, float beta) {
    RowSums row;
#pragma unroll
    for (int j = 0; j < 4; ++j) row.sum[j] = sums.sum[j];
    if constexpr (D::log_sum) row.log_sum = sums.log_top + ::logf(sums.log_sum);
    row.q_is_zero = flags.q_is_zero;
    row.p_is_zero = flags.p_is_zero;
    if ((flags.q_is_zero && D::infinite_where_q_is_zero(alpha)) ||
        (flags.p_is_zero && D::infinite_where_p_is_zero(alpha)))
        (D::log_sum ? row.log_sum : row.sum[0]) = infinity;
    Finished done = D::finish(row, alpha, beta);
    constexpr bool needs_q = !std::is_same_v<D, Swap<Entropy>>;
    if ((needs_q && is_nan(n.zs)) || (D::needs_p && is_nan(n.zt)))
        done.value = done.sum_q = done.sum_p = std::numeric_limits<float>::quiet_NaN();
    return done;
}

// The value of a statistic that the first sweep finishes, from the merged state of a row.
KLDIV_DEVICE float first_value(int code, const State& state, const Normalised& n) {
    const float x = n.log_zs - n.log_zt;
    float value;
    if (code == k_entropy) {
        value = fma(state.s.a / n.zs, kLn2, n.log_zs);
    } else if (code == k_reference_entropy) {
        value = fma(state.t.a / n.zt, kLn2, n.log_zt);
    } else if (code == k_forward_kl) {
        value = state.forward_kl / n.zt - expm1_minus(x);
    } else if (code == k_reverse_kl) {
        value = state.reverse_kl / n.zs - expm1_minus(-x);
    } else {
        const float difference = ::sqrtf(n.zt) - ::sqrtf(n.zs);
        value = (state.hellinger - 0.5f * difference * difference) / ::sqrtf(n.zs * n.zt);
    }
    return value < 0 ? 0 : value;
}

// log softmax of a logit; -inf where it has no mass or is left out.
KLDIV_DEVICE float log_softmax(float x, const Scale& scale, float m, float z, float log_z, bool left_out) {
    if (is_nan(z)) return z;
    if (x <= scale.floor || left_out) return -std::numeric_limits<float>::infinity();
    return fma(fma(x, scale.c, -m), kLn2, -log_z);
}

// log of the sum of q over some columns, from their own sum.
KLDIV_DEVICE float log_mass(const Softmax& some, const Normalised& n) {
    if (is_nan(n.zs)) return n.zs;
    if (some.z == 0) return -std::numeric_limits<float>::infinity();
    return fma(some.m - n.ms, kLn2, ::logf(some.z) - n.log_zs);
}

KLDIV_DEVICE float logsumexp_of(const Normalised& n) { return fma(n.ms, kExponentToLog, n.log_zs); }

// 0 * inf: a coefficient of 0 takes no part.
KLDIV_DEVICE float times(float coefficient, float x) { return coefficient == 0 ? 0.0f : coefficient * x; }

}  // namespace kldiv::gpu
