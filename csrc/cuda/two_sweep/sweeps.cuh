// The two-sweep kernels that read a slice to sum over it (slices.cuh): `sweep` before the softmaxes are known, `sums`
// with them.
#pragma once

#include "batches.cuh"
#include "labels.cuh"
#include "slice_states.cuh"

namespace kldiv::gpu {

template <int FIRST>
KLDIV_DEVICE void add_pair(State& state, const RowInput& row, int64_t start, Pair& pair) {
    Range s = range_of(pair.s), t = FIRST & kTeacher ? range_of(pair.t) : s;
    if (s.smallest <= row.s.floor || t.smallest <= row.t.floor) {
        raise_to(row.s.floor, pair.s);
        raise_to(row.t.floor, pair.t);
        s.largest = ::fmaxf(s.largest, row.s.floor);
        t.largest = ::fmaxf(t.largest, row.t.floor);
        if constexpr (FIRST & kTeacher) note_blocked(state, pair.s, pair.t, row.s.floor, row.t.floor);
    }
    add_columns<FIRST>(state, pair.s, pair.t, s.largest, t.largest, row.s.c, row.t.c, static_cast<int>(start));
}

// The state of a slice, and of it `tail` without the labels. These come last, a second look at few columns: so both
// sums are sums, not a difference.
template <int FIRST>
KLDIV_DEVICE State sweep_slice(const Call& call, const RowInput& row, const Place& at, Softmax* tail) {
    constexpr bool two = (FIRST & kTeacher) != 0;
    State state;
    if constexpr (FIRST & kTail) {
        const LabelBits labels(at.begin);
        labels.find(call, at.index, at.limit);
        const auto add = [&](uint32_t without, int64_t start, Pair& pair) {
            leave_out(without, pair.s);
            if constexpr (two) leave_out(without, pair.t);
            add_pair<FIRST>(state, row, start, pair);
        };
        for_columns<two, true>(call, row, at.begin, at.limit,
                               [&](int64_t start, Pair& pair) { add(labels.of(start), start, pair); });
        *tail = state.s;
        int64_t start = at.begin + thread_index() * kColumns;
        for (; start < at.limit; start += kSweepThreads * kColumns) {
            const uint32_t here = labels.of(start);
            if (here == 0) continue;
            Pair pair = load_pair<two>(call, row, start, at.limit);
            add(~here, start, pair);
        }
    } else if constexpr (FIRST & kArgmax) {
        for_columns<two, true>(call, row, at.begin, at.limit,
                               [&](int64_t start, Pair& pair) { add_pair<FIRST>(state, row, start, pair); });
    } else if (call.student.element == kBfloat16 && (!two || call.teacher.element == kBfloat16)) {
        return Batches<FIRST, kBfloat16>(call, row, at.begin, at.limit).sweep();
    } else {
        return Batches<FIRST, kFloat32>(call, row, at.begin, at.limit).sweep();
    }
    return state;
}

template <int FIRST>
KLDIV_KERNEL(kSweepThreads, 2)
sweep(SweepArguments a) {
    const Place at = place_of(a);
    if (a.call.mask && !a.call.mask[at.index]) return;
    Softmax tail;
    const State of_thread = sweep_slice<FIRST>(a.call, open_row(a.call, at.index), at, &tail);
    const State state = merge_block(
        of_thread, kStateFloats, [](State& x) { merge_lanes<FIRST>(x); },
        [](const float* x) { return saved_state(x); });
    if (thread_index() == 0) save(state, a.states + slice_of(a) * kStateFloats);
    const auto leave = [&](const Softmax& mine, float* softmaxes) {
        const Softmax x = merge_block(
            mine, kSoftmaxFloats, [](Softmax& x) { merge_lanes(x); }, [](const float* x) { return saved_softmax(x); });
        if (thread_index() == 0) save(x, softmaxes + slice_of(a) * kSoftmaxFloats);
    };
    if constexpr (FIRST & kTail) leave(tail, a.tails);
    if constexpr (FIRST & kUntempered) leave(of_thread.untempered, a.untempered);
}

KLDIV_KERNEL(kSweepThreads, 2) sums(SweepArguments a) {
    const Place at = place_of(a);
    if (a.call.mask && !a.call.mask[at.index]) return;
    const RowInput row = open_row(a.call, at.index);
    const Normalised n = normalise(row, row_state(a, at.index), a.call.teacher.data != nullptr);
    int64_t to = at.index * a.sums_count;
    for (int i = 0; i < a.call.stat_count; ++i) {
        if (finishes_first(a.call.stats[i])) continue;
        const Resolved resolved = resolve(a.call.stats[i], row.alpha, row.beta);
        Sums total;
        with_divergence(resolved.code, [&](auto divergence) {
            using D = decltype(divergence);
            const float unknown[kRowConstants] = {};
            const typename D::template Constants<float> constants(resolved.alpha, row.beta, unknown);
            for_columns<D::needs_p, false>(a.call, row, at.begin, at.limit, [&](int64_t, Pair& pair) {
                raise_to(n.floor_s, pair.s);
                raise_to(n.floor_t, pair.t);
                add_terms<D>(total, constants, n, pair.s, pair.t);
            });
        });
        total = merge_block(
            total, kSumsFloats, [](Sums& x) { merge_lanes(x); }, [](const float* x) { return saved_sums(x); });
        if (thread_index() == 0) save(total, a.sums + (to * a.slices + slice_of(a) % a.slices) * kSumsFloats);
        ++to;
    }
}

}  // namespace kldiv::gpu
