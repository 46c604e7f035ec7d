// A divergence on few outcomes, by a warp: a token's labels, and its tail as one more.
//
// x are the student's log-probabilities of the outcomes and t the teacher's, both taken as logits of distributions q
// and p over the outcomes. With g_j = d D / d log q_j the coefficient of x_j is d D / d x_j = g_j - q_j sum g.
#pragma once

#include "row.cuh"

namespace kldiv::gpu {

// Outcomes that the lanes take at a time, eight neighbours each.
constexpr int kOutcomes = 32 * kColumns;

// The divergence, in every lane; put(j, scale * coefficient of x_j) in the lane that asked for x(j) and t(j).
template <class X, class T, class Put>
KLDIV_DEVICE float compare_outcomes(const TopK& topk, float scale, X x, T t, Put put) {
    constexpr int first = kTeacher | kForwardKl | kReverseKl | kHellinger;
    const int begin = thread_index() % 32 * kColumns, count = static_cast<int>(topk.outcomes);
    RowInput row{};
    row.s = row.t = scale_of(1);
    const auto load = [&](int start, Columns& s, Columns& t_) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            s.x[i] = start + i < count ? x(start + i) : -std::numeric_limits<float>::infinity();
            t_.x[i] = start + i < count ? t(start + i) : -std::numeric_limits<float>::infinity();
        }
        raise_to(row.s.floor, s);
        raise_to(row.t.floor, t_);
    };
    State state;
    for (int start = begin; start < count; start += kOutcomes) {
        Columns s, p;
        load(start, s, p);
        note_blocked(state, s, p, row.s.floor, row.t.floor);
        add_columns<first>(state, s, p, range_of(s).largest, range_of(p).largest, row.s.c, row.t.c, 0);
    }
    merge_lanes<first>(state);
    const Normalised n = normalise(row, state, true);
    const Resolved resolved = resolve(topk.kind, topk.alpha, topk.beta);
    float value = 0;
    with_divergence(resolved.code, [&](auto divergence) {
        using D = decltype(divergence);
        if constexpr (D::needs_p) {
            Sums sums;
            if constexpr (std::is_same_v<D, ForwardKl> || std::is_same_v<D, ReverseKl> ||
                          std::is_same_v<D, Hellinger>) {
                sums.sum[0] = first_value(resolved.code, state, n);
            } else {
                const float unknown[kRowConstants] = {};
                const typename D::template Constants<float> constants(resolved.alpha, topk.beta, unknown);
                for (int start = begin; start < count; start += kOutcomes) {
                    Columns s, p;
                    load(start, s, p);
                    add_terms<D>(sums, constants, n, s, p);
                }
                merge_lanes(sums);
            }
            const Finished done = finish_as<D>(sums, flags_of(row, state), n, resolved.alpha, topk.beta);
            value = done.value;
            const typename D::template Constants<float> constants(resolved.alpha, topk.beta, done.k);
            for (int start = begin; start < count; start += kOutcomes) {
                Columns s, p;
                load(start, s, p);
#pragma unroll
                for (int i = 0; i < kColumns; ++i) {
                    if (start + i >= count) continue;
                    const Element<float> e = element_of<D>(n, s.x[i], p.x[i]);
                    // 0 * inf: an outcome without mass takes no share of an infinite sum, which outweighs all own
                    // terms.
                    const float share = e.q == 0 ? 0.0f : e.q * done.sum_q;
                    const float own = abs(done.sum_q) == infinity ? 0.0f : D::grad_logq(e, constants);
                    put(start + i, times(scale, own - share));
                }
            }
        }
    });
    return value;
}

}  // namespace kldiv::gpu
