// What the gradient of a token's policy loss is, for the losses that depend on nothing else of the batch: then values
// and gradient come out of one pass over the logits.
//
//   loss = weight * term(l) + kl_weight * KL(l),   l = log pi(y), of one token
//
// `policy_coefficient` is d loss / d l, float32 like the losses themselves. The terms, estimators and their sources are
// those of kldiv_kernels/policy/terms.py and weights.py, and the gradients are what they have there: min gives
// each side half where both are equal, a clamp keeps the gradient at its ends, a branch that is not taken has none.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define KLDIV_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define KLDIV_HOST_DEVICE inline
#endif

namespace kldiv {

enum PolicyTerm { kClipped, kCispo, kSapo, kReinforce, kTopr, kDppoTv, kDppoKl, kPolicyTerms };
enum SampledKl { kK1, kK2, kK3, kAbs, kK3Plus, kSampledKls };
constexpr const char* kPolicyTermNames[kPolicyTerms] = {"clipped", "cispo",   "sapo",   "reinforce",
                                                        "topr",    "dppo_tv", "dppo_kl"};
constexpr const char* kSampledKlNames[kSampledKls] = {"k1", "k2", "k3", "abs", "k3_plus"};

// In the order in which the operator takes them; an infinite bound is none.
struct PolicyBounds {
    float low, high;              // of the ratio; of the probability's move for dppo
    float delta, dual_clip;       // of the unclipped ratio; of the loss where A < 0
    float log_low, log_high;      // of the log-ratio
    float positive, negative;     // temperatures of sapo by the sign of A
    float kl_log_ratio, kl_high;  // of |log pi_ref - l|; of the estimate
    float bias_correction;        // 1: the estimate is multiplied by the ratio
};
constexpr int kPolicyBounds = sizeof(PolicyBounds) / sizeof(float);

struct Policy {
    const float* tokens = nullptr;  // [kPolicyTokens, N]; null: no policy loss
    int term = 0, kl = 0;
    PolicyBounds bounds{};
};

// A token's row of the table `tokens`. An anchor of NaN is this policy itself: the ratio is 1, and has a gradient.
constexpr int kPolicyTokens = 5;
struct PolicyToken {
    float weight, advantage, anchor, reference, kl_weight;
};
KLDIV_HOST_DEVICE PolicyToken policy_token(const Policy& policy, int64_t rows, int64_t index) {
    const float* at = policy.tokens + index;
    return {at[0], at[rows], at[2 * rows], at[3 * rows], at[4 * rows]};
}

// A value and its derivative by l.
struct Slope {
    float value, slope;
};
// 0 * inf is 0: what a bound cuts off, an advantage or a weight of 0 takes out, takes no part however large it is.
KLDIV_HOST_DEVICE float times(float x, float y) {
    const float product = x * y, sum = x + y;
    return product != product && sum == sum ? 0 : product;
}
KLDIV_HOST_DEVICE Slope clamped(Slope x, float low, float high) {
    if (x.value < low) return {low, 0};
    if (x.value > high) return {high, 0};
    return x;
}
KLDIV_HOST_DEVICE float slope_of_min(Slope x, Slope y) {
    return x.value < y.value ? x.slope : (x.value > y.value ? y.slope : 0.5f * (x.slope + y.slope));
}

KLDIV_HOST_DEVICE float clipped_slope(const PolicyBounds& b, float advantage, Slope ratio) {
    const float infinity = std::numeric_limits<float>::infinity();
    const Slope unclipped = clamped(ratio, -infinity, b.delta), inside = clamped(ratio, b.low, b.high);
    const Slope x = {times(unclipped.value, advantage), times(unclipped.slope, advantage)};
    const Slope y = {times(inside.value, advantage), times(inside.slope, advantage)};
    const Slope loss = {-::fminf(x.value, y.value), -slope_of_min(x, y)};
    if (!(advantage < 0) || b.dual_clip == infinity) return loss.slope;
    return slope_of_min(loss, {-b.dual_clip * advantage, 0});
}

// Whether the token's probability has moved too far in the direction of its advantage.
KLDIV_HOST_DEVICE bool dppo_stops(const Policy& policy, float l, const PolicyToken& token) {
    // Keeps the KL finite where a probability rounds to 1.
    constexpr float almost_zero = 1e-8f;
    const float now = ::expf(l), before = ::expf(token.anchor);
    const bool up = token.advantage > 0;
    const float most = up ? policy.bounds.high : policy.bounds.low;
    if (policy.term == kDppoTv) return !((up ? now - before : before - now) <= most);
    const float others = (1 - before) * ::logf((1 - before + almost_zero) / (1 - now + almost_zero));
    const float kl = before * (token.anchor - l) + others;
    return !(kl <= most || (up ? now <= before : now >= before));
}

KLDIV_HOST_DEVICE float term_slope(const Policy& policy, float l, const PolicyToken& token, Slope ratio) {
    const PolicyBounds& b = policy.bounds;
    const float a = token.advantage;
    switch (policy.term) {
        case kClipped:
            return clipped_slope(b, a, ratio);
        case kCispo:
            return -times(::fminf(::fmaxf(ratio.value, b.low), b.high), a);
        case kSapo: {
            // sigmoid(x) sigmoid(-x), which has its digits where the sigmoid is near 1.
            const float tau = a > 0 ? b.positive : b.negative, e = ::expf(-::fabsf(tau * (ratio.value - 1)));
            return -times(4 * e / ((1 + e) * (1 + e)) * a, ratio.slope);
        }
        case kReinforce:
            return -a;
        case kTopr:
            return -(a >= 0 ? 1 : ::fminf(ratio.value, 1)) * a;
        default:
            return dppo_stops(policy, l, token) ? 0 : -times(::fminf(ratio.value, b.delta), a);
    }
}

// The estimate k(x), k' by x, and k - k', which for k3 is -x to all its digits. The power of e by whose factor k and k'
// are still to be multiplied is above 0 where e^x, but not necessarily e^x times the ratio, overflows.
struct Estimate {
    float k, slope, rest, shift;
};
KLDIV_HOST_DEVICE Estimate kl_estimate(const Policy& policy, float l, const PolicyToken& token) {
    // Above it e^x - x - 1 is e^x.
    constexpr float large = 80;
    const float infinity = std::numeric_limits<float>::infinity();
    const PolicyBounds& b = policy.bounds;
    const float apart = token.reference - l;
    float x = apart < -b.kl_log_ratio ? -b.kl_log_ratio : (apart > b.kl_log_ratio ? b.kl_log_ratio : apart);
    float k, slope, rest, shift = 0;
    switch (policy.kl) {
        case kK1:
            k = -x, slope = -1, rest = k - slope;
            break;
        case kK2:
            k = 0.5f * x * x, slope = x, rest = k - slope;
            break;
        case kAbs:
            k = ::fabsf(x), slope = x > 0 ? 1 : (x < 0 ? -1 : 0), rest = k - slope;
            break;
        default:
            rest = -x;
            if (b.bias_correction != 0 && b.kl_high == infinity && x > large) shift = x - large, x = large;
            slope = ::expm1f(x), k = slope - ::fminf(x, large);
            break;
    }
    const bool below = k < -b.kl_high;
    const bool above = k > b.kl_high;
    if (below || above) k = below ? -b.kl_high : b.kl_high;
    if (below || above || ::fabsf(apart) > b.kl_log_ratio) slope = 0, rest = k;
    return {k, slope, rest, shift};
}

// By l, of k and of k * e^w where the ratio e^w corrects it (w: `log_ratio`).
KLDIV_HOST_DEVICE float kl_slope(const Policy& policy, float l, const PolicyToken& token, Slope log_ratio) {
    const Estimate e = kl_estimate(policy, l, token);
    if (policy.kl == kK3Plus) return e.rest;
    if (policy.bounds.bias_correction == 0) return -e.slope;
    // d(k e^w) = k' e^w d(w - l) + (k - k') e^w dw, and w moves with l or not at all.
    const float scale = ::expf(log_ratio.value + e.shift);
    if (log_ratio.slope == 0) return -times(e.slope, scale);
    return e.slope == 0 ? times(e.k, scale) : times(e.rest, ::expf(log_ratio.value));
}

KLDIV_HOST_DEVICE float policy_coefficient(const Policy& policy, float l, const PolicyToken& token) {
    if (l != l) return l;
    const bool own = token.anchor != token.anchor;
    const Slope log_ratio = clamped({own ? 0 : l - token.anchor, 1}, policy.bounds.log_low, policy.bounds.log_high);
    const float r = ::expf(log_ratio.value);
    const Slope ratio = {r, times(r, log_ratio.slope)};
    // A weight of 0 takes no part, whatever it stands beside.
    float out = 0;
    if (token.weight != 0) out += times(token.weight, term_slope(policy, l, token, ratio));
    if (token.kl_weight != 0) out += token.kl_weight * kl_slope(policy, l, token, log_ratio);
    return out;
}

}  // namespace kldiv
