// The gradient of a column in a usual row, with everything that a row's columns have in common taken together.
//
// Usual: all columns have mass and no sum is infinite. Rows with masks take the divergence's own grad_logq
// (compute.cuh). With the exponents y_s = s c - m_s and y_t = t c - m_t, e = 2^y_s and f = 2^y_t, so that q = e/z_s and
// p = f/z_t, a gradient weight * grad_logq + share * q is
//
//   forward KL   (e r - f) b        r = (1 + share/weight) z_t/z_s
//                                   b = weight/z_t
//   Hellinger    e' (e' r - f') b   of the roots e' and f'
//                                   r = (1 + 2 share/weight) sqrt(z_t/z_s)
//                                   b = weight/2/sqrt(z_s z_t)
//   reverse KL   e (a y + b)        y = y_s - y_t
//                                   a = weight ln 2/z_s, b = (share + weight log(z_t/z_s))/z_s
//   entropy      e (a y_s + b)      a = -weight ln 2/z_s, b = (share - weight + weight log z_s)/z_s
//   parked       e (a ratio + b)    a = weight/z_s/kParkedScale, b = share/z_s
//
// In the first two r is exactly 1 where the rows are equal, so that the gradient is exactly 0.
#pragma once

#include "parts.cuh"

namespace kldiv::gpu {

// Keeps small ratios, of rows that are close, above float16's subnormal numbers. Where q is not 0 in float32 a ratio is
// at most 88.
constexpr float kParkedScale = 512;

// `usual` says whether a row's constants allow it; then of(s, t) is the gradient of a column, t the parked ratio where
// there is one. Divergences without a form of their own have none.
template <class D>
struct UsualGradient {
    static constexpr bool exists = false;
};

// Lower logits are masks. Between the two, products of constants and exponents are finite.
constexpr float kUsualLogit = -1e20f, kUsualConstant = 1e6f;

// e (a y + b).
template <class D>
struct LinearGradient {
    static constexpr bool exists = true;
    float cs, ct, ms, mt, a, b;

    KLDIV_DEVICE explicit LinearGradient(const RowResult& row)
        : cs(row.n.cs), ct(row.n.ct), ms(row.n.ms), mt(row.n.mt) {
        const Normalised& n = row.n;
        float slope, constant;
        if constexpr (D::parks) {
            slope = row.weight / kParkedScale;
            constant = row.share;
        } else if constexpr (D::needs_p) {
            slope = row.weight * kLn2;
            constant = fma(row.weight, n.log_zt - n.log_zs, row.share);
        } else {
            slope = -row.weight * kLn2;
            constant = fma(row.weight, n.log_zs - 1, row.share);
        }
        a = slope * n.over_zs;
        b = constant * n.over_zs;
    }
    KLDIV_DEVICE bool usual() const { return abs(a) < kUsualConstant && abs(b) < kUsualConstant; }
    KLDIV_DEVICE float of(float s, float t) const {
        const float ys = fma(s, cs, -ms);
        const float y = D::parks ? t : (D::needs_p ? ys - fma(t, ct, -mt) : ys);
        return exp2(ys) * fma(a, y, b);
    }
};
template <>
struct UsualGradient<ReverseKl> : LinearGradient<ReverseKl> {
    using LinearGradient::LinearGradient;
};
template <>
struct UsualGradient<Entropy> : LinearGradient<Entropy> {
    using LinearGradient::LinearGradient;
};
template <>
struct UsualGradient<JensenShannon> : LinearGradient<JensenShannon> {
    using LinearGradient::LinearGradient;
};

// (e r - f) b, or of roots.
template <bool roots>
struct DifferenceGradient {
    static constexpr bool exists = true;
    float cs, ct, ms, mt, r, b;

    KLDIV_DEVICE explicit DifferenceGradient(const RowResult& row) {
        const Normalised& n = row.n;
        constexpr float unit = roots ? 0.5f : 1.0f;
        cs = unit * n.cs, ct = unit * n.ct, ms = unit * n.ms, mt = unit * n.mt;
        // As differences from 1: a quotient of equals may be rounded.
        const float zt_over_zs = fma(n.zt - n.zs, n.over_zs, 1.0f);
        const float more = 1 + row.share / (unit * row.weight);
        r = more * (roots && zt_over_zs != 1 ? ::sqrtf(zt_over_zs) : zt_over_zs);
        b = unit * row.weight * (roots ? ::sqrtf(n.over_zs * n.over_zt) : n.over_zt);
    }
    KLDIV_DEVICE bool usual() const { return abs(r) < kUsualConstant; }
    KLDIV_DEVICE float of(float s, float t) const {
        const float e = exp2(fma(s, cs, -ms)), difference = fma(e, r, -exp2(fma(t, ct, -mt)));
        return roots ? (b * e) * difference : b * difference;
    }
};
template <>
struct UsualGradient<ForwardKl> : DifferenceGradient<false> {
    using DifferenceGradient::DifferenceGradient;
};
template <>
struct UsualGradient<Hellinger> : DifferenceGradient<true> {
    using DifferenceGradient::DifferenceGradient;
};

}  // namespace kldiv::gpu
