// Two kernels' worth of slices or of processes as one (slices.cuh), where a row's columns are spread over processes:
// what the slices left is merged to what this process says of its columns, and what all say to the whole row.
#pragma once

#include "slice_states.cuh"

namespace kldiv::gpu {

// Strides in floats.
struct MergeArguments {
    const bool* mask;     // of the rows, or null
    int64_t items;        // each merged by a warp
    int64_t items_a_row;  // a row's are neighbours
    const float* from;
    int64_t item_stride, part_stride, parts;
    float* to;
    int64_t to_stride;
    int first_column;  // added to the place of a state's largest logit
};

KLDIV_DEVICE void load(const float* from, State& x) { x = saved_state(from); }
KLDIV_DEVICE void load(const float* from, Softmax& x) { x = saved_softmax(from); }
KLDIV_DEVICE void load(const float* from, Sums& x) { x = saved_sums(from); }

KLDIV_DEVICE void merge_any(State& x) { merge_lanes<kEverything>(x); }
template <class X>
KLDIV_DEVICE void merge_any(X& x) {
    merge_lanes(x);
}

// What belongs to a row that the mask leaves out is that of no columns.
template <class X>
KLDIV_KERNEL(kSweepThreads, 1)
merge_parts(MergeArguments a) {
    const int64_t item = block_index() * (block_threads() / 32) + thread_index() / 32;
    const int lane = thread_index() % 32;
    if (item >= a.items) return;
    X x;
    if (!a.mask || a.mask[item / a.items_a_row]) {
        // As many parts as there are lanes; of more, what came of those before is in the first lane.
        int carried = 0;
        for (int64_t first = 0; first < a.parts; first += 32 - carried, carried = 1) {
            if (lane >= carried) {
                const int64_t part = first + lane - carried;
                x = X{};
                if (part < a.parts) load(a.from + item * a.item_stride + part * a.part_stride, x);
            }
            merge_any(x);
        }
        if constexpr (std::is_same_v<X, State>) {
            if (x.column != kNoColumn) x.column += a.first_column;
        }
    }
    if (lane == 0) save(x, a.to + item * a.to_stride);
}

}  // namespace kldiv::gpu
