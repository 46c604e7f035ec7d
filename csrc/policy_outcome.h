// What a policy loss is worth once the log-probabilities are there: the values whose slopes policy.h has, their sums
// and those of the metrics. kldiv_kernels/policy/assembly.py has the same in PyTorch, for every loss.
#pragma once

#include "policy.h"

namespace kldiv {

// The sums over a batch's tokens, in this order: the loss, then what the metrics are means of; ratio_max is no sum.
enum PolicySum {
    kLoss,
    kTokens,
    kEntropySum,
    kRatio,
    kApproxKl,
    kClippedLow,
    kClippedHigh,
    kClippedDual,
    kSampledKlSum,
    kExactKl,
    kSamplingKl,
    kOffPolicyWeight,
    kRatioMax,
    kPolicySums
};

// [N] each, null where there is none. Of the table of `policy`, which is that of the one-read operator, the weights are
// not looked at: they are scaled.
struct PolicyOutcomes {
    Policy policy;
    int64_t rows = 0;
    const float *logprob = nullptr, *entropy = nullptr;
    const float* exact = nullptr;                                  // an exact KL
    const float *scale = nullptr, *entropy_coefficient = nullptr;  // what a token's loss and its entropy count
    const float *old = nullptr, *sampling = nullptr;
    const float *off_policy_weight = nullptr, *token_weights = nullptr, *kl_weights = nullptr;
    float kl_coef = 0;
    const bool* valid = nullptr;
    bool anchored = false;   // whether anchors were given, of which a NaN is one
    bool reference = false;  // whether there is a reference for the sampled KL
    float* per_token = nullptr;
};

KLDIV_HOST_DEVICE float nan_aware_min(float x, float y) { return x != x || x < y ? x : y; }

// The policy term of a token, and whether its gradient was clipped away: at the lower bound, the upper one, the dual
// one.
struct TermValue {
    float value;
    bool low, high, dual;
};
KLDIV_HOST_DEVICE TermValue term_value(const Policy& policy, float l, const PolicyToken& token, float log_ratio) {
    const PolicyBounds& b = policy.bounds;
    const float a = token.advantage, r = ::expf(log_ratio);
    const auto held = [](float x, float low, float high) { return x < low ? low : (x > high ? high : x); };
    const auto score = [&](float weight) { return -times(l, times(weight, a)); };
    const bool low = r < b.low && a<0, high = r> b.high && a > 0;
    switch (policy.term) {
        case kClipped: {
            const float unclipped = times(r > b.delta ? b.delta : r, a), inside = times(held(r, b.low, b.high), a);
            const float loss = -nan_aware_min(unclipped, inside), most = -b.dual_clip * a;
            const bool bounded = b.dual_clip != std::numeric_limits<float>::infinity() && a < 0;
            return {bounded ? nan_aware_min(loss, most) : loss, low, high, bounded && loss > most};
        }
        case kCispo:
            return {score(held(r, b.low, b.high)), low, high, false};
        case kSapo: {
            const float tau = a > 0 ? b.positive : b.negative;
            return {-4 / tau / (1 + ::expf(-tau * ::expm1f(log_ratio))) * a, false, false, false};
        }
        case kReinforce:
            return {score(1), false, false, false};
        case kTopr:
            return {score(a >= 0 ? 1 : held(r, 0, 1)), false, false, false};
        default: {
            const bool stops = dppo_stops(policy, l, token), seen = l != l || token.anchor != token.anchor;
            const float value = stops && !seen ? 0 : score(r > b.delta ? b.delta : r);
            return {value, stops && a < 0, stops && a > 0, false};
        }
    }
}

KLDIV_HOST_DEVICE float kl_value(const Policy& policy, float l, const PolicyToken& token, float log_ratio) {
    const Estimate e = kl_estimate(policy, l, token);
    const bool corrected = policy.bounds.bias_correction != 0 && policy.kl != kK3Plus;
    return corrected ? times(e.k, ::expf(log_ratio + e.shift)) : e.k;
}

// NaN is larger than every ratio.
KLDIV_HOST_DEVICE float larger_ratio(float x, float y) { return y != y || y > x ? y : x; }

// Adds a token's parts to `sums`, and writes its loss before it is scaled.
template <class Sums>
KLDIV_HOST_DEVICE void add_outcome(const PolicyOutcomes& o, int64_t index, Sums& sums) {
    if (!o.valid[index]) {
        o.per_token[index] = 0;
        return;
    }
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const PolicyToken token = policy_token(o.policy, o.rows, index);
    const PolicyBounds& b = o.policy.bounds;
    const float l = o.logprob[index];
    const bool own = token.anchor != token.anchor && !o.anchored;
    float log_ratio = own ? 0 : l - token.anchor;
    // NaN stays what it is.
    log_ratio = log_ratio < b.log_low ? b.log_low : (log_ratio > b.log_high ? b.log_high : log_ratio);
    if (l != l) log_ratio = l;
    const TermValue term = term_value(o.policy, l, token, log_ratio);
    // A log-probability that is NaN is seen, whatever it stands beside.
    float loss = l != l ? nan : term.value;
    if (o.off_policy_weight) loss = times(loss, o.off_policy_weight[index]);
    if (o.token_weights) loss = times(loss, o.token_weights[index]);
    if (o.reference || o.exact) {
        const float kl = o.exact ? o.exact[index] : (l != l ? nan : kl_value(o.policy, l, token, log_ratio));
        const float penalty = o.kl_coef * kl;
        if (o.kl_coef != 0) loss += o.kl_weights ? times(penalty, o.kl_weights[index]) : penalty;
        // Not one index of two: the sums stay in registers.
        sums[kExactKl] += o.exact ? kl : 0;
        sums[kSampledKlSum] += o.exact ? 0 : kl;
    }
    o.per_token[index] = loss;
    loss *= o.scale[index];
    // The entropy's coefficient has its sign.
    if (o.entropy_coefficient[index] != 0) loss += o.entropy_coefficient[index] * o.entropy[index];
    const float ratio = ::expf(log_ratio), old = o.old ? o.old[index] : l;
    // This policy has not moved from itself, also where a token has no probability.
    const float moved = o.old || l != l ? l - old : 0;
    sums[kLoss] += loss;
    sums[kTokens] += 1;
    sums[kEntropySum] += o.entropy[index];
    sums[kRatio] += ratio;
    sums[kApproxKl] += ::expm1f(moved) - moved;
    sums[kClippedLow] += term.low;
    sums[kClippedHigh] += term.high;
    sums[kClippedDual] += term.dual;
    if (o.sampling) sums[kSamplingKl] += o.sampling[index] != o.sampling[index] ? 0 : o.sampling[index] - old;
    if (o.off_policy_weight) sums[kOffPolicyWeight] += o.off_policy_weight[index];
    sums[kRatioMax] = larger_ratio(sums[kRatioMax], ratio);
}

// The loss, the number of tokens, the largest ratio; means of the others.
KLDIV_HOST_DEVICE float finish_sum(int i, double sum, double tokens) {
    const bool whole = i == kLoss || i == kTokens || i == kRatioMax;
    return static_cast<float>(whole || tokens == 0 ? sum : sum / tokens);
}

}  // namespace kldiv
