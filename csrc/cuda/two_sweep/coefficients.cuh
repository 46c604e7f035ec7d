// Between the two sweeps of a top-k loss (slices.cuh): from values to coefficients.
#pragma once

#include "../row/outcomes.cuh"

namespace kldiv::gpu {

struct OutcomeArguments {
    Call call;
    TopK topk;
};

// A warp a row.
KLDIV_KERNEL(kSweepThreads, 1) outcomes(OutcomeArguments a) {
    const Call& call = a.call;
    const int64_t index = block_index() * (block_threads() / 32) + thread_index() / 32, n = call.rows;
    if (index >= n) return;
    const bool writes = thread_index() % 32 == 0;
    if (call.mask && !call.mask[index]) {
        if (writes) a.topk.divergences[index] = 0;
        return;
    }
    const int64_t* labels = call.labels + index * call.labels_per_row;
    const float value = compare_outcomes(
        a.topk, a.topk.scale[index],
        [&](int j) {
            const bool none = j < call.labels_per_row && labels[j] < 0;
            return none ? -std::numeric_limits<float>::infinity() : call.values[j * n + index];
        },
        [&](int j) { return a.topk.teacher[index * a.topk.outcomes + j]; },
        [&](int j, float coefficient) { a.topk.coefficients[j * n + index] = coefficient; });
    if (writes) a.topk.divergences[index] = value;
}

}  // namespace kldiv::gpu
