// What the roles of the one-read kernel of top-k divergences (topk_kernel.cuh) share.
#pragma once

#include "parts.cuh"

namespace kldiv::gpu {

struct TopKArguments : OneReadArguments {
    TopK topk;
    int tail_row;  // of the table of values; -1: no outcome
};

// What of a row stands among the constants of RowResult, which no divergence wants here: the tail's reference and sum,
// and whether some label occurs twice.
enum { kTailM, kTailZ, kTwice };

// In the place of a divergence: the sweep takes the sum of the tail.
struct TailSum {
    static constexpr bool needs_p = false;
};
template <>
struct Traits<TailSum> {
    static constexpr bool needs_sums = false;

    // `blocked` above all logits: some label of the row occurs twice.
    KLDIV_DEVICE static void merge(State& x, int width) {
        merge_lanes<0>(x, width);
        x.s.blocked = warp_max(x.s.blocked, width);
    }
    KLDIV_DEVICE static Exchanged exchange(const State& x) { return {{x.s.m, x.s.z, 0, x.s.blocked}}; }
    KLDIV_DEVICE static State state_of(const Exchanged& from) {
        State x;
        x.s = {from.x[0], from.x[1], 0, from.x[3]};
        return x;
    }
};

// Behind the stages: what the outcomes are and what the teacher says of them, a number each, and the labels' gradients
// by the parity of the row.
template <int element>
struct TopKCta : Cta<TailSum, element> {
    using Base = Cta<TailSum, element>;
    const TopK& topk;
    int labels;  // of a row
    float *outcomes, *teacher;

    KLDIV_DEVICE explicit TopKCta(const TopKArguments& arguments)
        : Base(arguments), topk(arguments.topk), labels(static_cast<int>(arguments.call.labels_per_row)) {
        outcomes = reinterpret_cast<float*>(this->student_slot(this->a.stages));
        teacher = outcomes + topk_outcome_bytes(topk.outcomes) / sizeof(float);
    }
    KLDIV_DEVICE char* gradients(int k) const {
        const int64_t behind = topk_outcome_bytes(topk.outcomes);
        return reinterpret_cast<char*>(teacher) + behind + k % 2 * topk_gradient_bytes(labels, Base::bytes);
    }
    // Those of row `index`; none for -1.
    KLDIV_DEVICE const int64_t* labels_of(int64_t index) const { return this->call.labels + index * labels; }
};

}  // namespace kldiv::gpu
