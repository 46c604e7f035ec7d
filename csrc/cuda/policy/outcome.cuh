// After a policy loss's pass over the logits: from a token's log-probability to its loss, and to the sums of the batch
// (policy_outcome.h). Two launches: sums of a warp's tokens, and the sums of those; the same bits every run.
#pragma once

#include "../../policy_outcome.h"
#include "../machine/ptx.cuh"

namespace kldiv::gpu {

constexpr int kOutcomeThreads = 256;
// Warps in all at most: one warp a sum adds up what they leave.
constexpr int64_t kMostOutcomeWarps = 512;

struct PolicyOutcomeArguments {
    PolicyOutcomes outcomes;
    int64_t warps = 0;
    float* partial = nullptr;  // [warps, kPolicySums]
    float* sums = nullptr;     // [kPolicySums], see `finish_sum`
    int64_t* tokens = nullptr;
};

KLDIV_KERNEL(kOutcomeThreads, 1) policy_tokens(PolicyOutcomeArguments a) {
    const int64_t warp = block_index() * (block_threads() / 32) + thread_index() / 32;
    if (warp >= a.warps) return;
    const int lane = thread_index() % 32;
    float sums[kPolicySums] = {};
    for (int64_t index = warp * 32 + lane; index < a.outcomes.rows; index += a.warps * 32)
        add_outcome(a.outcomes, index, sums);
#pragma unroll
    for (int i = 0; i < kPolicySums; ++i) {
        float x = sums[i];
        for (int lanes = 16; lanes > 0; lanes /= 2) {
            const float other = shuffle_xor(x, lanes);
            x = i == kRatioMax ? larger_ratio(x, other) : x + other;
        }
        if (lane == 0) a.partial[warp * kPolicySums + i] = x;
    }
}

// A warp a sum.
constexpr int kSumsThreads = 32 * kPolicySums;

KLDIV_KERNEL(kSumsThreads, 1) policy_sums(PolicyOutcomeArguments a) {
    const int i = thread_index() / 32, lane = thread_index() % 32;
    const auto together = [i](double sum, double other) {
        return i == kRatioMax ? larger_ratio(static_cast<float>(sum), static_cast<float>(other)) : sum + other;
    };
    double sum = 0, tokens = 0;
    for (int64_t warp = lane; warp < a.warps; warp += 32) {
        sum = together(sum, a.partial[warp * kPolicySums + i]);
        tokens += a.partial[warp * kPolicySums + kTokens];
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        sum = together(sum, shuffle_xor(sum, lanes));
        tokens += shuffle_xor(tokens, lanes);
    }
    if (lane != 0) return;
    a.sums[i] = finish_sum(i, sum, tokens);
    if (i == kTokens) *a.tokens = static_cast<int64_t>(tokens);
}

}  // namespace kldiv::gpu
