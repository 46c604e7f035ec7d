// The last of the two-sweep kernels (sweeps.cuh): gradients from coefficients and saved state.
#pragma once

#include "sweeps.cuh"

namespace kldiv::gpu {

// What a row's gradient is made of beside its statistics' own terms.
struct Shares {
    float s = 0, t = 0;  // of the two softmaxes
    bool any = false;    // some coefficient is not 0
};

KLDIV_DEVICE Shares shares_of(const Call& call, int64_t index) {
    Shares out;
    const int64_t n = call.rows;
    const float* coefficient = call.coefficients + index;
    for (int i = 0; i < call.stat_count; ++i) {
        const int code = call.stats[i];
        if (code == kLogprob || code == kReferenceLogprob) {
            for (int64_t j = 0; j < call.labels_per_row; ++j, coefficient += n) {
                out.any |= *coefficient != 0;
                if (call.labels[index * call.labels_per_row + j] < 0) continue;
                (code == kLogprob ? out.s : out.t) -= *coefficient;
            }
            continue;
        }
        const float c = *coefficient;
        coefficient += n;
        out.any |= c != 0;
        if (code == kLogsumexp) out.s += c;
        if (code < k_entropy) continue;
        const float* of = call.state + (kStateOfRow + i * kStateOfStatistic) * n + index;
        out.s -= times(c, of[0]);
        out.t -= times(c, of[n]);
    }
    return out;
}

KLDIV_DEVICE void add_labels(const Call& call, int64_t index, int64_t start, bool student, Columns& g) {
    const float* coefficient = call.coefficients + index;
    for (int i = 0; i < call.stat_count; ++i) {
        const int code = call.stats[i];
        const int64_t values = code == kLogprob || code == kReferenceLogprob ? call.labels_per_row : 1;
        if (code == (student ? kLogprob : kReferenceLogprob)) {
            for (int64_t j = 0; j < values; ++j) {
                const int64_t at = call.labels[index * values + j] - start;
                if (at < 0 || at >= kColumns) continue;
                const float weight = coefficient[j * call.rows];
#pragma unroll
                for (int c = 0; c < kColumns; ++c) g.x[c] += at == c ? weight : 0.0f;
            }
        }
        coefficient += values * call.rows;
    }
}

// One gradient, of the columns of a slice.
template <bool student>
KLDIV_DEVICE void slice_gradient(const SweepArguments& a, const RowInput& row, const Normalised& n,
                                 const Shares& shares, const Place& at) {
    const Call& call = a.call;
    const int64_t index = at.index;
    const Gradient& to = student ? call.d_student : call.d_teacher;
    const int element = student ? call.student.element : call.teacher.element;
    char* out = row_at(to, element, index);
    const float share = student ? shares.s : shares.t, over_temperature = (student ? n.cs : n.ct) / kLog2e;
    const auto body = [&](int64_t start, Pair& pair) {
        raise_to(n.floor_s, pair.s);
        raise_to(n.floor_t, pair.t);
        Columns g;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            const float y = student ? fma(pair.s.x[i], n.cs, -n.ms) : fma(pair.t.x[i], n.ct, -n.mt);
            const float q = exp2(y) * (student ? n.over_zs : n.over_zt);
            // 0 * inf: a column without mass takes no share of an infinite sum.
            g.x[i] = q == 0 ? 0.0f : share * q;
        }
        const float* coefficient = call.coefficients + index;
        for (int i = 0; i < call.stat_count; ++i) {
            const int code = call.stats[i];
            const float c = *coefficient;
            coefficient += (code == kLogprob || code == kReferenceLogprob ? call.labels_per_row : 1) * call.rows;
            if (code < k_entropy || c == 0) continue;
            const Resolved resolved = resolve(code, row.alpha, row.beta);
            const float* k_at = call.state + (kStateOfRow + i * kStateOfStatistic + 2) * call.rows + index;
            with_divergence(resolved.code, [&](auto divergence) {
                using D = decltype(divergence);
                if constexpr (student || D::needs_p) {
                    float k[kRowConstants] = {};
                    if constexpr (D::grad_needs_row) {
#pragma unroll
                        for (int j = 0; j < kRowConstants; ++j) k[j] = k_at[j * call.rows];
                    }
                    const typename D::template Constants<float> constants(resolved.alpha, row.beta, k);
#pragma unroll
                    for (int j = 0; j < kColumns; ++j) {
                        const Element<float> e = element_of<D>(n, opaque(pair.s.x[j]), opaque(pair.t.x[j]));
                        g.x[j] = fma(c, student ? D::grad_logq(e, constants) : D::grad_logp(e, constants), g.x[j]);
                    }
                }
            });
        }
        if (call.labels) add_labels(call, index, start, student, g);
#pragma unroll
        for (int i = 0; i < kColumns; ++i) g.x[i] *= over_temperature;
        const int64_t excluded = row.exclude - start;
        if (excluded >= 0 && excluded < kColumns) replace(static_cast<int>(excluded), 0.0f, g);
        store_columns(out, element, start, at.limit, g);
    };
    if (call.teacher.data)
        for_columns<true, false>(call, row, at.begin, at.limit, body);
    else
        for_columns<false, false>(call, row, at.begin, at.limit, body);
}

KLDIV_KERNEL(kSweepThreads, 2) gradient(SweepArguments a) {
    const Call& call = a.call;
    const Place at = place_of(a);
    const int64_t index = at.index;
    // The last slice's block also has the padding.
    const bool last = at.limit == call.columns;
    const auto zero = [&](int64_t from) {
        const auto side = [&](const Gradient& to, int element) {
            zero_columns(to, element, index, from, last ? to.width : at.limit, kSweepThreads);
        };
        if (a.student) side(call.d_student, call.student.element);
        if (a.teacher) side(call.d_teacher, call.teacher.element);
    };
    const bool active = !call.mask || call.mask[index];
    const Shares shares = active ? shares_of(call, index) : Shares{};
    if (!shares.any) {
        zero(at.begin);
        return;
    }
    const RowInput row = open_row(call, index);
    const float* state = call.state + index;
    const Normalised n = normalise(row, state[0], state[call.rows], state[2 * call.rows], state[3 * call.rows]);
    if (a.student) slice_gradient<true>(a, row, n, shares, at);
    if (a.teacher) slice_gradient<false>(a, row, n, shares, at);
    if (last) zero(at.limit);
}

// The rows that the mask leaves out, for kernels that do not visit them: values and gradient are 0.
KLDIV_KERNEL(kSweepThreads, 2) zero_masked(SweepArguments a) {
    const Call& call = a.call;
    const int64_t index = block_index();
    if (call.mask[index]) return;
    if (thread_index() == 0) {
        float* value = call.values + index;
        for (int i = 0; i < call.stat_count; ++i, value += call.rows) *value = 0;
    }
    zero_columns(call.d_student, call.student.element, index, 0, call.d_student.width, kSweepThreads);
}

}  // namespace kldiv::gpu
