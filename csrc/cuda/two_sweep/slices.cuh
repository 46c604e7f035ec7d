// The two-sweep kernels: any strides, any alignment, any vocabulary, gradients of both rows, several statistics. Here
// is what they share: their arguments, the slice of a row that a block has, and its columns.
//
// A row is cut into slices of `slice_columns` (plan.h), a block each, so that one row keeps many processors busy; the
// cut depends on the row's length alone, and slices are merged in their order, so a row's bits do not depend on its
// batch. Launches, and bytes (1u = one pass over one tensor, two-row statistics):
//
//   sweep     sweeps.cuh        the state of each slice           reads 2u
//   sums      sweeps.cuh        sums of normalised terms, if any  reads 2u; more statistics find a slice in the caches
//   merge     merge.cuh         columns spread over processes     a warp a row
//   finish    finish.cuh        merges slices; values, state      a warp a row
//   outcomes  coefficients.cuh  coefficients of a top-k loss      a warp a row
//   gradient  gradient.cuh      from coefficients                 reads 2u, writes 1u a gradient
//
// Every launch takes the slices in the opposite order of the one before it: what that read last is in the second-level
// cache.
#pragma once

#include "../row/row.cuh"

namespace kldiv::gpu {

struct SweepArguments {
    Call call;
    float* states;              // [N, states_a_row, kStateFloats]
    float* sums;                // [N, sums_count, slices, kSumsFloats]
    float *tails, *untempered;  // [N, states_a_row, kSoftmaxFloats] each, or null
    int64_t slices, slice;      // of a row; columns of one
    int64_t states_a_row;       // its slices, or 1: the whole row's, most of whose columns other processes may have
    int sums_count;             // statistics that take normalised sums
    bool backwards;             // the order of the slices
    bool student, teacher;      // gradients wanted
    float* divergences;         // [N], of a top-k loss, or null
};

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

struct RawPair {
    Raw<kFloat32> s, t;
};

// The row's excluded column, if it is one of a pair's from `start` on, is -inf; where there is one row it is both.
template <bool two>
KLDIV_DEVICE void complete(Pair& pair, const RowInput& row, int64_t start) {
    const int64_t excluded = row.exclude - start;
    if (excluded >= 0 && excluded < kColumns) {
        replace(static_cast<int>(excluded), -std::numeric_limits<float>::infinity(), pair.s);
        if constexpr (two) replace(static_cast<int>(excluded), -std::numeric_limits<float>::infinity(), pair.t);
    }
    if constexpr (!two) pair.t = pair.s;
}
// Columns [start, start + 8) of both rows; those from `limit` on and the excluded one are -inf.
template <bool two>
KLDIV_DEVICE Pair load_pair(const Call& call, const RowInput& row, int64_t start, int64_t limit) {
    Pair pair;
    pair.s = load_columns(row.student, call.student.element, start, limit);
    if constexpr (two) pair.t = load_columns(row.teacher, call.teacher.element, start, limit);
    complete<two>(pair, row, start);
    return pair;
}
// The same in two steps.
template <bool two>
KLDIV_DEVICE RawPair load_ahead(const Call& call, const RowInput& row, int64_t start, int64_t limit) {
    RawPair raw;
    raw.s = load_ahead(row.student, call.student.element, start, limit);
    if constexpr (two) raw.t = load_ahead(row.teacher, call.teacher.element, start, limit);
    return raw;
}
template <bool two>
KLDIV_DEVICE Pair pair_of(const RawPair& raw, const Call& call, const RowInput& row, int64_t start) {
    Pair pair;
    pair.s = unpack_any(raw.s, call.student.element);
    if constexpr (two) pair.t = unpack_any(raw.t, call.teacher.element);
    complete<two>(pair, row, start);
    return pair;
}

// body(start, pair) for this thread's columns of [begin, limit). `ahead`: the next ones are already on their way, which
// a body with registers to spare wants.
template <bool two, bool ahead, class Body>
KLDIV_DEVICE void for_columns(const Call& call, const RowInput& row, int64_t begin, int64_t limit, Body body) {
    constexpr int64_t stride = kSweepThreads * kColumns;
    int64_t start = begin + thread_index() * kColumns;
    RawPair next;
    if (ahead && start < limit) next = load_ahead<two>(call, row, start, limit);
    for (; start < limit; start += stride) {
        Pair pair = ahead ? pair_of<two>(next, call, row, start) : load_pair<two>(call, row, start, limit);
        if (ahead && start + stride < limit) next = load_ahead<two>(call, row, start + stride, limit);
        body(start, pair);
    }
}

}  // namespace kldiv::gpu
