// The sums of Jensen-Shannon's normalised terms over the columns of a usual row (usual_gradient.cuh), base 2
// throughout, with what its columns have in common taken together. The formulas are those of divergences/mixtures.h.
#pragma once

#include "usual_gradient.cuh"

namespace kldiv::gpu {

template <class D>
struct UsualSums {
    static constexpr bool exists = false;
};

template <>
struct UsualSums<JensenShannon> {
    static constexpr bool exists = true;
    // Below this |log(p/q)|, series: their error is 4e-6 of a term and 1e-6 of log(m/q), that of logarithms 5e-4 of a
    // term and 1e-5 of log(m/q).
    static constexpr float kNear = 0.125f;

    float cs, ct, ms, mt, log_zs, log_zt, a, b, to_ratio;
    float beta, c0, c1, c2, c3, k1, k2;
    // Terms by series, the two halves of terms by logarithms, and sum (1 - beta) q log2(q/m). Halves apart, so that
    // exchanging the rows at beta = 1/2 leaves every bit.
    float near = 0, far_q = 0, far_p = 0, of_q = 0;

    KLDIV_DEVICE UsualSums(const Normalised& n, const JensenShannon::Constants<float>& c)
        : cs(n.cs), ct(n.ct), ms(n.ms), mt(n.mt), log_zs(n.log_zs * kLog2e), log_zt(n.log_zt * kLog2e) {
        a = c.a * n.over_zs;
        b = c.b * n.over_zt;
        to_ratio = kParkedScale * kLn2 * c.a;
        constexpr float square = kLn2 * kLn2;
        beta = c.b;
        c0 = c.c0 * kLn2, c1 = c.c1 * square, c2 = c.c2 * square * kLn2, c3 = c.c3 * square * square;
        k1 = c.k1 * square, k2 = c.k2 * square * kLn2;
    }

    // A column more; the ratio to be parked.
    KLDIV_DEVICE float add(float s, float t) {
        const float ys = fma(s, cs, -ms), yt = fma(t, ct, -mt);
        // What is added keeps the logarithm finite where neither has mass, and is far below all that counts.
        const float aq = fma(exp2(ys), a, smallest_normal), bp = fma(exp2(yt), b, smallest_normal);
        const float m = aq + bp, log_m = log2_approx(m);
        const float lq = ys - log_zs, lp = yt - log_zt, d = lp - lq;
        const bool close = abs(d) < kNear * kLog2e;
        const float term = fma(fma(fma(c3, d, c2), d, c1), d, c0), cumulant = fma(fma(fma(k2, d, k1), d, c0), d, beta);
        // Short branches, which the compiler makes predicates of.
        if (close) near = fma((d * d) * m, term, near);
        const float log_ratio = select(close, -d * cumulant, lq - log_m);
        if (!close) {
            far_q = fma(aq, log_ratio, far_q);
            far_p = fma(bp, lp - log_m, far_p);
        }
        of_q = fma(aq, log_ratio, of_q);
        return to_ratio * log_ratio;
    }
    KLDIV_DEVICE void finish(Sums& sums) const {
        sums.sum[0] = kLn2 * (near + (far_q + far_p));
        sums.sum[1] = kLn2 * of_q;
    }
};

}  // namespace kldiv::gpu
