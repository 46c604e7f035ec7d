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
// kUntempered: the student's softmax at temperature 1 as well.
enum First {
    kTeacher = 1,
    kEntropy = 2,
    kReferenceEntropy = 4,
    kForwardKl = 8,
    kReverseKl = 16,
    kHellinger = 32,
    kArgmax = 64,
    kTail = 128,
    kUntempered = 256,
};

// The reference of no columns, and the least one: what lies far below it adds nothing, so that a row without mass ends
// with a sum of 0. Lower ones would be none: x c - m is rounded once, m is short of x c by up to 2^-25 of it, and from
// 2^32 on that overflows as an exponent.
constexpr float kNoReference = -0x1p31f;
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
    Softmax untempered;  // m and z alone; what threads are merged into has it apart (two_sweep/sweeps.cuh)
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

// m and z alone.
KLDIV_DEVICE void move(Softmax& x, float to) {
    x.z *= exp2(x.m - to);
    x.m = to;
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

// Terms a log(a/b) - a + b = b phi(log(a/b)) >= 0 (divergences.h), with d = log2(a/b). Each of their two forms is a
// chain of fused multiply-adds into sums of its own: terms to be selected and added cost more. The b have a sum apart,
// so that no rounding is the same in all of many equal ones: a later move takes most of them away (`move`).
struct KlTerms {
    float near = 0, far_a = 0, far_b = 0;

    KLDIV_DEVICE void add(float a, float b, float d) {
        // phi_over_square in powers of d, over its last coefficient, so that the first step needs no product.
        float y = fma(d + 6.9500512f, d, 37.496314f);
        y = fma(y, d, 144.25355f);
        y = fma(y, d, 312.17216f);
        if (abs(d) < 0.25f * kLog2e) {
            near = fma((b * d) * d, y, near);
        } else {
            far_a = fma(a, d - kLog2e, far_a);
            far_b += b;
        }
    }
    KLDIV_DEVICE float added_to(float sum) const { return fma(7.6953211e-4f, near, sum) + fma(kLn2, far_a, far_b); }
};

// Eight columns more, under the state's references. Columns without mass are at the floor.
template <int FIRST>
KLDIV_DEVICE void add_exponentials(State& state, const Columns& s, const Columns& t, float cs, float ct) {
    // Where nothing else wants them, the exponentials are squares of their roots.
    constexpr bool squares = FIRST == (kTeacher | kHellinger);
    constexpr float unit = squares ? 0.5f : 1.0f;
    const float scale_s = unit * cs, scale_t = unit * ct, ms = unit * state.s.m, mt = unit * state.t.m;
    float zs = 0, zt = 0, as = 0, at = 0, hellinger = 0, untempered = 0;
    KlTerms forward, reverse;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
        const auto add = [&](float& to, float x) { to = i == 0 ? x : to + x; };
        const auto add_square = [&](float& to, float x) { to = i == 0 ? x * x : fma(x, x, to); };
        const float ys = fma(s.x[i], scale_s, -ms), yt = FIRST & kTeacher ? fma(t.x[i], scale_t, -mt) : 0;
        if constexpr (squares) {
            const float root_q = exp2(ys), root_p = exp2(yt);
            add_square(zs, root_q);
            add_square(zt, root_p);
            add_square(hellinger, root_p - root_q);
            continue;
        }
        const float q = exp2(ys);
        add(zs, q);
        if constexpr (FIRST & kEntropy) as = fma(-q, ys, as);
        if constexpr (FIRST & kUntempered) add(untempered, exp2(fma(s.x[i], kLog2e, -state.untempered.m)));
        if constexpr (FIRST & kTeacher) {
            const float p = exp2(yt);
            add(zt, p);
            if constexpr (FIRST & kHellinger) add_square(hellinger, exp2(0.5f * yt) - exp2(0.5f * ys));
            if constexpr (FIRST & kForwardKl) forward.add(p, q, yt - ys);
            if constexpr (FIRST & kReverseKl) reverse.add(q, p, ys - yt);
            if constexpr (FIRST & kReferenceEntropy) at = fma(-p, yt, at);
        }
    }
    state.s.z += zs;
    state.s.a += as;
    state.t.z += zt;
    state.t.a += at;
    state.forward_kl = forward.added_to(state.forward_kl);
    state.reverse_kl = reverse.added_to(state.reverse_kl);
    state.hellinger = fma(0.5f, hellinger, state.hellinger);
    state.untempered.z += untempered;
}

// References that are below the largest logits move there.
template <int FIRST>
KLDIV_DEVICE void move_up(State& state, float largest_s, float largest_t, float cs, float ct) {
    const float top_s = largest_s * cs, top_t = FIRST & kTeacher ? largest_t * ct : kNoReference;
    if (top_s > state.s.m || top_t > state.t.m) move<FIRST>(state, max(top_s, state.s.m), max(top_t, state.t.m));
    if constexpr (FIRST & kUntempered) {
        const float top = largest_s * kLog2e;
        if (top > state.untempered.m) move(state.untempered, top);
    }
}

// Eight columns more where references may have to move first; the largest of each row is given.
template <int FIRST>
KLDIV_DEVICE void add_columns(State& state, const Columns& s, const Columns& t, float largest_s, float largest_t,
                              float cs, float ct, int column) {
    move_up<FIRST>(state, largest_s, largest_t, cs, ct);
    add_exponentials<FIRST>(state, s, t, cs, ct);
    if constexpr (FIRST & kArgmax) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            const bool before = FIRST & kTail && s.x[i] == state.best && column + i < state.column;
            if (s.x[i] > state.best || before) {
                state.best = s.x[i];
                state.column = column + i;
            }
        }
    }
}

// --- the lanes of a warp ---------------------------------------------------------------------------------------------
// Every lane gets the same bits: at each step both partners add the same two numbers. `width`, a power of two: among so
// many neighbours. (A loop that begins at a width known only at run time is unrolled into dozens of steps.)
constexpr int kLanes = 32;
KLDIV_DEVICE float warp_sum(float x, int width = kLanes) {
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2)
        if (lanes < width) x += shuffle_xor(x, lanes);
    return x;
}
KLDIV_DEVICE float warp_max(float x, int width = kLanes) {
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2)
        if (lanes < width) x = ::fmaxf(x, shuffle_xor(x, lanes));
    return x;
}

// The log-sum-exp in base 2, and the reference where there is no mass.
KLDIV_DEVICE float log_sum(float m, float z) { return z > 0 ? m + log2_approx(z) : (z == 0 ? m : z); }
KLDIV_DEVICE float log_sum_lanes(const Softmax& x, int width) {
    const float top = warp_max(x.m, width);
    return log_sum(top, warp_sum(x.z * exp2(x.m - top), width));
}

// States of the same references, merged into one that every lane gets.
template <int FIRST>
KLDIV_DEVICE void add_lanes(State& state, int width = kLanes) {
    state.s.z = warp_sum(state.s.z, width);
    if constexpr (FIRST & kEntropy) state.s.a = warp_sum(state.s.a, width);
    if constexpr (FIRST & kTeacher) {
        state.t.z = warp_sum(state.t.z, width);
        if (any_lane(state.s.blocked > kNoLogit || state.t.blocked > kNoLogit)) {
            state.s.blocked = warp_max(state.s.blocked, width);
            state.t.blocked = warp_max(state.t.blocked, width);
        }
    }
    if constexpr (FIRST & kReferenceEntropy) state.t.a = warp_sum(state.t.a, width);
    if constexpr (FIRST & kForwardKl) state.forward_kl = warp_sum(state.forward_kl, width);
    if constexpr (FIRST & kReverseKl) state.reverse_kl = warp_sum(state.reverse_kl, width);
    if constexpr (FIRST & kHellinger) state.hellinger = warp_sum(state.hellinger, width);
}

// The softmaxes of the lanes, m and z alone, merged into one, which every lane gets.
KLDIV_DEVICE void merge_lanes(Softmax& x, int width = kLanes) {
    move(x, log_sum_lanes(x, width));
    x.z = warp_sum(x.z, width);
}
// The same of states.
template <int FIRST>
KLDIV_DEVICE void merge_lanes(State& state, int width = kLanes) {
    const float to_s = log_sum_lanes(state.s, width);
    move<FIRST>(state, to_s, FIRST & kTeacher ? log_sum_lanes(state.t, width) : kNoReference);
    add_lanes<FIRST>(state, width);
    if constexpr (FIRST & kArgmax) {
        const float best = warp_max(state.best, width);
        int column = state.best == best ? state.column : kNoColumn;
#pragma unroll
        for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
            if (lanes >= width) continue;
            const int other = shuffle_xor(column, lanes);
            column = other < column ? other : column;
        }
        state.best = best;
        state.column = column;
    }
}

// The same of lanes that have the same references. They move before they are added up: what a move takes away is as
// large as the sum of what it moves, so a whole warp's would leave less of g.
template <int FIRST>
KLDIV_DEVICE void merge_alike(State& state) {
    const float to_s = log_sum(state.s.m, warp_sum(state.s.z));
    move<FIRST>(state, to_s, FIRST & kTeacher ? log_sum(state.t.m, warp_sum(state.t.z)) : kNoReference);
    add_lanes<FIRST>(state);
}

}  // namespace kldiv::gpu
