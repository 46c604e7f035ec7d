// The first sweep of a row: the state of some columns, a monoid without cancellation, in float32 throughout.
//
// Notation (logits x, exponents y = x c - m in base 2, c = log2(e)/temperature): of the student the reference m_s and
// z_s = sum 2^y; of the teacher m_t, z_t. p~ = 2^y_t and q~ = 2^y_s, u = (y_t - y_s) ln 2 = log(p~/q~).
//
//   entropy      a = -sum q~ y_s
//   forward KL   g = sum p~ u - p~ + q~ >= 0, term by term
//   reverse KL   the same with the roles exchanged
//   Hellinger    g = 1/2 sum (sqrt p~ - sqrt q~)^2
//
// A thread's m is the largest exponent that it met; where threads are merged it becomes their log-sum-exp, so that z is
// near 1 and g near the divergence itself. All of them move exactly to other references, which is what merging is:
// with a = 2^(m_s - m_s'), b = 2^(m_t - m_t'), x = log(a/b),
//   z_s' = a z_s, z_t' = b z_t, a_s' = a (a_s + z_s (m_s' - m_s))
//   KL:         g' = b (g + z_s (e^x - 1 - x) + (z_s - z_t) x) = b (g - z_t x) + (a - b) z_s
//   Hellinger:  g' = sqrt(ab) g + 1/2 (sqrt b - sqrt a) (sqrt b z_t - sqrt a z_s)
// kldiv_kernels/backends/triton/device/state.py is its twin.
#pragma once

#include "columns.cuh"

namespace kldiv::gpu {

// What the first sweep takes: bits of FIRST. kTail: the labels' columns last, after a look at the sum without them.
enum First {
    kTeacher = 1,
    kEntropy = 2,
    kReferenceEntropy = 4,
    kForwardKl = 8,
    kReverseKl = 16,
    kHellinger = 32,
    kArgmax = 64,
    kTail = 128,
};

// The reference of no columns. Below the exponents of columns with mass and far above those of the others, so that a
// row without mass ends with a sum of 0. (Exponents near the floor could be no reference: x c - m is rounded once, and
// what m is short of x c there overflows.)
constexpr float kNoReference = -1e20f;
// Below every logit, floors included.
constexpr float kNoLogit = -2e30f;
constexpr int kNoColumn = 2147483647;

// A row as a sweep sees it: exponents are x c - m, and a column at or below the floor has no mass.
struct Scale {
    float c, floor;
};
KLDIV_DEVICE Scale scale_of(float temperature) {
    // x c at the floor stays in the range of floats at low temperatures.
    return {kLog2e / temperature, kNoMass * ::fminf(temperature, 1.0f)};
}

// What is known of one softmax: reference, sum, entropy's sum, and the largest logit among columns where the other row
// has no mass, which makes some divergences infinite.
struct Softmax {
    float m = kNoReference, z = 0, a = 0, blocked = kNoLogit;
};

struct State {
    Softmax s, t;
    float forward_kl = 0, reverse_kl = 0, hellinger = 0;
    float best = kNoLogit;  // the largest logit, and where
    int column = kNoColumn;
};

// `first` is the row in whose units g is, with factor b; x = log(a/b).
KLDIV_DEVICE float move_kl(float g, float z_first, float z_second, float a, float b, float x) {
    const float near = b * (g + fma(z_second, expm1_minus(x), (z_second - z_first) * x));
    const float far = fma(a - b, z_second, b * (g - z_first * x));
    return select(abs(x) < 1.0f, near, far);
}

// The state in exponents relative to other references.
template <int FIRST>
KLDIV_DEVICE void move(State& state, float to_s, float to_t) {
    const float ds = state.s.m - to_s, dt = state.t.m - to_t, a = exp2(ds);
    if constexpr (FIRST & kTeacher) {
        const float b = exp2(dt);
        if constexpr (FIRST & kForwardKl)
            state.forward_kl = move_kl(state.forward_kl, state.t.z, state.s.z, a, b, (ds - dt) * kLn2);
        if constexpr (FIRST & kReverseKl)
            state.reverse_kl = move_kl(state.reverse_kl, state.s.z, state.t.z, b, a, (dt - ds) * kLn2);
        if constexpr (FIRST & kHellinger) {
            const float ra = exp2(0.5f * ds), rb = exp2(0.5f * dt);
            state.hellinger = fma(ra * rb, state.hellinger, 0.5f * (rb - ra) * fma(rb, state.t.z, -(ra * state.s.z)));
        }
        if constexpr (FIRST & kReferenceEntropy) state.t.a = b * fma(-state.t.z, dt, state.t.a);
        state.t.z *= b;
        state.t.m = to_t;
    }
    if constexpr (FIRST & kEntropy) state.s.a = a * fma(-state.s.z, ds, state.s.a);
    state.s.z *= a;
    state.s.m = to_s;
}

// A column without mass in one row and with some in the other. The columns are at the floor where they have none.
KLDIV_DEVICE void note_blocked(State& state, const Columns& s, const Columns& t, float floor_s, float floor_t) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
        if (t.x[i] <= floor_t) state.s.blocked = ::fmaxf(state.s.blocked, s.x[i]);
        if (s.x[i] <= floor_s) state.t.blocked = ::fmaxf(state.t.blocked, t.x[i]);
    }
}

// Eight columns more; the largest of each row is given. Columns without mass are at the floor.
template <int FIRST>
KLDIV_DEVICE void add_columns(State& state, const Columns& s, const Columns& t, float largest_s, float largest_t,
                              float cs, float ct, int column) {
    const float top_s = largest_s * cs, top_t = FIRST & kTeacher ? largest_t * ct : kNoReference;
    if (top_s > state.s.m || top_t > state.t.m) move<FIRST>(state, max(top_s, state.s.m), max(top_t, state.t.m));
    // Where nothing else wants them, the exponentials are squares of their roots.
    constexpr bool squares = FIRST == (kTeacher | kHellinger);
    float zs = 0, zt = 0, as = 0, at = 0, forward = 0, reverse = 0, hellinger = 0;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
        const float ys = fma(s.x[i], cs, -state.s.m);
        float root_q = 0, p = 0;
        if constexpr (FIRST & kHellinger) root_q = exp2(0.5f * ys);
        const float q = squares ? root_q * root_q : exp2(ys);
        const auto add = [&](float& to, float x) { to = i == 0 ? x : to + x; };
        add(zs, q);
        if constexpr (FIRST & kEntropy) as = fma(-q, ys, as);
        if constexpr (FIRST & kTeacher) {
            const float yt = fma(t.x[i], ct, -state.t.m);
            if constexpr (FIRST & kHellinger) {
                const float root_p = exp2(0.5f * yt), difference = root_p - root_q;
                p = squares ? root_p * root_p : exp2(yt);
                hellinger = fma(difference, difference, hellinger);
            } else {
                p = exp2(yt);
            }
            add(zt, p);
            const float u = (yt - ys) * kLn2;
            if constexpr (FIRST & kForwardKl) add(forward, kl_term(p, q, u));
            if constexpr (FIRST & kReverseKl) add(reverse, kl_term(q, p, -u));
            if constexpr (FIRST & kReferenceEntropy) at = fma(-p, yt, at);
        }
        if constexpr (FIRST & kArgmax) {
            const bool before = FIRST & kTail && s.x[i] == state.best && column + i < state.column;
            if (s.x[i] > state.best || before) {
                state.best = s.x[i];
                state.column = column + i;
            }
        }
    }
    state.s.z += zs;
    state.s.a += as;
    state.t.z += zt;
    state.t.a += at;
    state.forward_kl += forward;
    state.reverse_kl += reverse;
    state.hellinger = fma(0.5f, hellinger, state.hellinger);
}

// --- the lanes of a warp ---------------------------------------------------------------------------------------------
// Every lane gets the same bits: at each step both partners add the same two numbers.
KLDIV_DEVICE float warp_sum(float x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x += shuffle_xor(x, lanes);
    return x;
}
KLDIV_DEVICE float warp_max(float x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x = ::fmaxf(x, shuffle_xor(x, lanes));
    return x;
}

// The log-sum-exp of the lanes in base 2, and their maximum where they have no mass.
KLDIV_DEVICE float log_sum_lanes(const Softmax& softmax) {
    const float top = warp_max(softmax.m), total = warp_sum(softmax.z * exp2(softmax.m - top));
    return total > 0 ? top + log2_approx(total) : (total == 0 ? top : total);
}

// The states of the lanes merged into one, which every lane gets.
template <int FIRST>
KLDIV_DEVICE void merge_lanes(State& state) {
    const float to_s = log_sum_lanes(state.s);
    const float to_t = FIRST & kTeacher ? log_sum_lanes(state.t) : kNoReference;
    move<FIRST>(state, to_s, to_t);
    state.s.z = warp_sum(state.s.z);
    if constexpr (FIRST & kEntropy) state.s.a = warp_sum(state.s.a);
    if constexpr (FIRST & kTeacher) {
        state.t.z = warp_sum(state.t.z);
        if (any_lane(state.s.blocked > kNoLogit || state.t.blocked > kNoLogit)) {
            state.s.blocked = warp_max(state.s.blocked);
            state.t.blocked = warp_max(state.t.blocked);
        }
    }
    if constexpr (FIRST & kReferenceEntropy) state.t.a = warp_sum(state.t.a);
    if constexpr (FIRST & kForwardKl) state.forward_kl = warp_sum(state.forward_kl);
    if constexpr (FIRST & kReverseKl) state.reverse_kl = warp_sum(state.reverse_kl);
    if constexpr (FIRST & kHellinger) state.hellinger = warp_sum(state.hellinger);
    if constexpr (FIRST & kArgmax) {
        const float best = warp_max(state.best);
        int column = state.best == best ? state.column : kNoColumn;
#pragma unroll
        for (int lanes = 16; lanes > 0; lanes /= 2) {
            const int other = shuffle_xor(column, lanes);
            column = other < column ? other : column;
        }
        state.best = best;
        state.column = column;
    }
}

}  // namespace kldiv::gpu
