// The two-sweep kernels: any strides, any alignment, any vocabulary, gradients of both rows, several statistics.
//
// A row is cut into slices of `slice_columns` (plan.h), a block each, so that one row keeps many processors busy; the
// cut depends on the row's length alone, and slices are merged in their order, so a row's bits do not depend on its
// batch. Launches, and bytes (1u = one pass over one tensor, two-row statistics):
//
//   sweep     the state of each slice               reads 2u
//   sums      sums of normalised terms, if any      reads 2u; more statistics find a slice in the caches
//   finish    merges slices; values, state          a warp a row
//   gradient  from coefficients                     reads 2u, writes 1u a gradient
//
// Every launch takes the slices in the opposite order of the one before it: what that read last is in the second-level
// cache.
#pragma once

#include "labels.cuh"
#include "../row/row.cuh"

namespace kldiv::gpu {

struct SweepArguments {
    Call call;
    float* states;          // [N, slices, kStateFloats]
    float* sums;            // [N, sums_count, slices, kSumsFloats]
    float* tails;           // [N, slices, kTailFloats], or null
    int64_t slices, slice;  // of a row; columns of one
    int sums_count;         // statistics that take normalised sums
    bool backwards;         // the order of the slices
    bool student, teacher;  // gradients wanted
    float* divergences;     // [N], of a top-k loss, or null
};

constexpr int kStateFloats = 13, kTailFloats = 2;
constexpr int kEverything = kTeacher | kEntropy | kReferenceEntropy | kForwardKl | kReverseKl | kHellinger | kArgmax;

KLDIV_DEVICE void save(const State& x, float* to) {
    const float all[kStateFloats] = {x.s.m,
                                     x.s.z,
                                     x.s.a,
                                     x.s.blocked,
                                     x.t.m,
                                     x.t.z,
                                     x.t.a,
                                     x.t.blocked,
                                     x.forward_kl,
                                     x.reverse_kl,
                                     x.hellinger,
                                     x.best,
                                     bits_float(static_cast<uint32_t>(x.column))};
#pragma unroll
    for (int i = 0; i < kStateFloats; ++i) to[i] = all[i];
}
KLDIV_DEVICE State saved_state(const float* from) {
    State x;
    x.s = {from[0], from[1], from[2], from[3]};
    x.t = {from[4], from[5], from[6], from[7]};
    x.forward_kl = from[8];
    x.reverse_kl = from[9];
    x.hellinger = from[10];
    x.best = from[11];
    x.column = static_cast<int>(float_bits(from[12]));
    return x;
}
KLDIV_DEVICE void save(const Softmax& x, float* to) {
    to[0] = x.m;
    to[1] = x.z;
}
KLDIV_DEVICE void merge_lanes(Softmax& x) {
    State alone;
    alone.s = x;
    merge_lanes<0>(alone);
    x = alone.s;
}
// What the block's threads have, merged, in its first warp. What `save` and `load` exchange goes through shared memory,
// `floats` a warp.
template <class X, class Merge, class Load>
KLDIV_DEVICE X merge_block(X x, int floats, Merge merge, Load load) {
    float* left = reinterpret_cast<float*>(shared_memory());
    const int warp = thread_index() / 32, lane = thread_index() % 32, warps = block_threads() / 32;
    merge(x);
    block_sync(0, block_threads());
    if (lane == 0) save(x, left + warp * floats);
    block_sync(0, block_threads());
    if (warp == 0) {
        x = lane < warps ? load(left + lane * floats) : X{};
        merge(x);
    }
    return x;
}

// Which slice a block has, counted over all rows. Asked for again where it is wanted: that costs no register meanwhile.
KLDIV_DEVICE int64_t slice_of(const SweepArguments& a) {
    return a.backwards ? grid_blocks() - 1 - block_index() : block_index();
}
// The slice: columns [begin, limit) of row `index`.
struct Place {
    int64_t index, begin, limit;
};
KLDIV_DEVICE Place place_of(const SweepArguments& a) {
    const int64_t index = slice_of(a) / a.slices, begin = slice_of(a) % a.slices * a.slice, end = begin + a.slice;
    return {index, begin, end < a.call.columns ? end : a.call.columns};
}

struct Pair {
    Columns s, t;
};

// Columns [start, start + 8) of both rows; those from `limit` on and the excluded one are -inf.
template <bool two>
KLDIV_DEVICE Pair load_pair(const Call& call, const RowInput& row, int64_t start, int64_t limit) {
    Pair pair;
    pair.s = load_columns(row.student, call.student.element, start, limit);
    if constexpr (two) pair.t = load_columns(row.teacher, call.teacher.element, start, limit);
    const int64_t excluded = row.exclude - start;
    if (excluded >= 0 && excluded < kColumns) {
        replace(static_cast<int>(excluded), -std::numeric_limits<float>::infinity(), pair.s);
        if constexpr (two) replace(static_cast<int>(excluded), -std::numeric_limits<float>::infinity(), pair.t);
    }
    if constexpr (!two) pair.t = pair.s;
    return pair;
}

// body(start, pair) for this thread's columns of [begin, limit). `ahead`: the next ones are already on their way, which
// a body with registers to spare wants.
template <bool two, bool ahead, class Body>
KLDIV_DEVICE void for_columns(const Call& call, const RowInput& row, int64_t begin, int64_t limit, Body body) {
    constexpr int64_t stride = kSweepThreads * kColumns;
    int64_t start = begin + thread_index() * kColumns;
    Pair pair, next;
    if (ahead && start < limit) next = load_pair<two>(call, row, start, limit);
    for (; start < limit; start += stride) {
        pair = ahead ? next : load_pair<two>(call, row, start, limit);
        if (ahead && start + stride < limit) next = load_pair<two>(call, row, start + stride, limit);
        body(start, pair);
    }
}

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
    } else {
        for_columns<two, true>(call, row, at.begin, at.limit,
                               [&](int64_t start, Pair& pair) { add_pair<FIRST>(state, row, start, pair); });
    }
    return state;
}

template <int FIRST>
KLDIV_KERNEL(kSweepThreads, 2)
sweep(SweepArguments a) {
    const Place at = place_of(a);
    if (a.call.mask && !a.call.mask[at.index]) return;
    Softmax tail;
    State state = sweep_slice<FIRST>(a.call, open_row(a.call, at.index), at, &tail);
    state = merge_block(
        state, kStateFloats, [](State& x) { merge_lanes<FIRST>(x); }, [](const float* x) { return saved_state(x); });
    if (thread_index() == 0) save(state, a.states + slice_of(a) * kStateFloats);
    if constexpr (FIRST & kTail) {
        tail = merge_block(
            tail, kTailFloats, [](Softmax& x) { merge_lanes(x); }, [](const float* x) { return Softmax{x[0], x[1]}; });
        if (thread_index() == 0) save(tail, a.tails + slice_of(a) * kTailFloats);
    }
}

// The merged state of a row, in every lane of every warp that asks.
KLDIV_DEVICE State row_state(const SweepArguments& a, int64_t index) {
    const int lane = thread_index() % 32;
    State state;
    if (lane < a.slices) state = saved_state(a.states + (index * a.slices + lane) * kStateFloats);
    merge_lanes<kEverything>(state);
    return state;
}

KLDIV_DEVICE Softmax row_tail(const SweepArguments& a, int64_t index) {
    const int lane = thread_index() % 32;
    Softmax tail;
    if (lane < a.slices) {
        const float* from = a.tails + (index * a.slices + lane) * kTailFloats;
        tail = {from[0], from[1]};
    }
    merge_lanes(tail);
    return tail;
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

// The value of a statistic without labels, the sums of its gradients and its constants. `sums` are the merged ones of a
// statistic that takes them.
KLDIV_DEVICE Finished finish_statistic(int code, const RowInput& row, const State& state, const Normalised& n,
                                       Sums sums) {
    Finished done{};
    if (code == kLogsumexp) done.value = logsumexp_of(n);
    if (code == kMaxLogprob) done.value = fma(fma(state.best, row.s.c, -n.ms), kLn2, -n.log_zs);
    if (code == kArgmaxCode) done.value = is_nan(n.zs) ? -1.0f : static_cast<float>(state.column);
    if (code < k_entropy) return done;
    const Resolved resolved = resolve(code, row.alpha, row.beta);
    if (finishes_first(code)) sums.sum[0] = first_value(resolved.code, state, n);
    with_divergence(resolved.code, [&](auto divergence) {
        using D = decltype(divergence);
        done = finish_as<D>(sums, flags_of(row, state), n, resolved.alpha, row.beta);
    });
    return done;
}

// A warp a row. The values and the state of a row that the mask leaves out are 0.
KLDIV_KERNEL(kSweepThreads, 1) finish(SweepArguments a) {
    const Call& call = a.call;
    const int64_t index = block_index() * (block_threads() / 32) + thread_index() / 32, n = call.rows;
    const int lane = thread_index() % 32;
    if (index >= n) return;
    const bool active = !call.mask || call.mask[index];
    const RowInput row = open_row(call, index);
    State state;
    if (active) state = row_state(a, index);
    const Normalised normal = normalise(row, state, call.teacher.data != nullptr);
    const auto save_state = [&](int at, float x) {
        if (call.state && lane == 0) call.state[at * n + index] = active ? x : 0;
    };
    const float of_row[kStateOfRow] = {normal.ms, normal.zs, normal.mt, normal.zt};
#pragma unroll
    for (int i = 0; i < kStateOfRow; ++i) save_state(i, of_row[i]);
    // The coefficient of a value, which that of logprob follows from in a policy loss.
    const auto complete = [&](const float* of, bool logprob, float x) {
        const int64_t cell = of - call.values;
        call.completed[cell] =
            logprob ? policy_coefficient(call.policy, x, policy_token(call.policy, n, index)) : call.coefficients[cell];
    };
    float* value = call.values + index;
    int at = 0;
    for (int i = 0; i < call.stat_count; ++i) {
        const int code = call.stats[i];
        Finished done{};
        if (code == kLogprob || code == kReferenceLogprob) {
            const bool student = code == kLogprob;
            for (int64_t j = lane; j < call.labels_per_row; j += 32) {
                const int64_t label = call.labels[index * call.labels_per_row + j];
                const bool beyond = label >= call.columns;
                float x = beyond ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
                if (label >= 0 && !beyond)
                    x = student ? log_softmax(load_column(row.student, call.student.element, label), row.s, normal.ms,
                                              normal.zs, normal.log_zs, label == row.exclude)
                                : log_softmax(load_column(row.teacher, call.teacher.element, label), row.t, normal.mt,
                                              normal.zt, normal.log_zt, label == row.exclude);
                if (!active) x = 0;
                value[j * n] = x;
                if (call.completed) complete(value + j * n, student, x);
            }
            value += call.labels_per_row * n;
        } else {
            Sums sums;
            if (!finishes_first(code)) {
                if (active && lane < a.slices)
                    sums = saved_sums(a.sums + ((index * a.sums_count + at) * a.slices + lane) * kSumsFloats);
                merge_lanes(sums);
                ++at;
            }
            done = finish_statistic(code, row, state, normal, sums);
            if (code == kTailLogprob && active) {
                const Softmax tail = row_tail(a, index);
                done.value = log_mass(tail, normal);
                done.k[0] = tail.m;
                done.k[1] = tail.z;
            }
            if (lane == 0) *value = active ? done.value : 0;
            if (call.completed && lane == 0) complete(value, false, 0);
            value += n;
        }
        const int first = kStateOfRow + i * kStateOfStatistic;
        save_state(first, done.sum_q);
        save_state(first + 1, done.sum_p);
#pragma unroll
        for (int j = 0; j < kRowConstants; ++j) save_state(first + 2 + j, done.k[j]);
    }
}

}  // namespace kldiv::gpu
