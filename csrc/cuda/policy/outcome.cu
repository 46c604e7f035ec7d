#include "outcome.cuh"

#include <algorithm>

#include "../job.h"
#include "../machine/runtime.cuh"

namespace kldiv::gpu {

int64_t policy_outcome_warps(int64_t rows) { return std::clamp<int64_t>((rows + 31) / 32, 1, kMostOutcomeWarps); }

void run_policy_outcome(const PolicyOutcomes& outcomes, float* partial, float* sums, int64_t* tokens, void* stream) {
    PolicyOutcomeArguments a;
    a.outcomes = outcomes;
    a.warps = policy_outcome_warps(outcomes.rows);
    a.partial = partial;
    a.sums = sums;
    a.tokens = tokens;
    LaunchShape shape;
    shape.threads = kOutcomeThreads;
    shape.blocks = (a.warps + kOutcomeThreads / 32 - 1) / (kOutcomeThreads / 32);
    launch<PolicyOutcomeArguments>(policy_tokens, shape, stream, a, [] { return std::string("policy_tokens"); });
    shape.threads = kSumsThreads;
    shape.blocks = 1;
    launch<PolicyOutcomeArguments>(policy_sums, shape, stream, a, [] { return std::string("policy_sums"); });
}

}  // namespace kldiv::gpu
