// KL divergences to a mixture of the rows; see ../divergences.h.

// --- generalised Jensen-Shannon: m = beta p + (1 - beta) q, 0 < beta < 1
// K(u) = log(m/q) = log(1 + beta (e^u - 1)) is the cumulant function of a Bernoulli variable, with k_n its cumulants:
// beta, v = beta (1 - beta), v (1 - 2 beta), v (1 - 6 v), ... For small u
//   K = u (beta + u (c0 + c1 u/2 + c2 u^2/3 + ...)), and a term is m (u K' - K) = m u^2 (c0 + c1 u + c2 u^2 + ...),
// c_n = k_(n+2) (n + 1) / (n + 2)!. Both are 0 for u = 0. At beta = 1/2 exchanging the rows leaves every bit of a term.
struct JensenShannon : Plain {
    static constexpr int sums = 2;
    static constexpr bool parks = true;
    template <class F>
    struct Constants {
        F b, a, c0, c1, c2, c3, c4, k1, k2;
        KLDIV_FN Constants(Real, Real beta, const Real*) {
            const Real v = beta * (1 - beta), skewness = 1 - 2 * beta;
            b = broadcast(static_cast<float>(beta));
            a = broadcast(static_cast<float>(1 - beta));
            c0 = broadcast(static_cast<float>(v / 2));
            c1 = broadcast(static_cast<float>(v * skewness / 3));
            c2 = broadcast(static_cast<float>(v * (1 - 6 * v) / 8));
            c3 = broadcast(static_cast<float>(v * skewness * (1 - 12 * v) / 30));
            c4 = broadcast(static_cast<float>(v * (1 - 30 * v + 120 * v * v) / 144));
            k1 = broadcast(static_cast<float>(v * skewness / 6));
            k2 = broadcast(static_cast<float>(v * (1 - 6 * v) / 24));
        }
    };
    template <class F>
    KLDIV_FN static F mixture(const Element<F>& e, const Constants<F>& c) {
        return fma(c.b, e.p, c.a * e.q);
    }
    template <class F>
    KLDIV_FN static F log_of(F mixture) {
        return log(max(broadcast(smallest_normal), mixture));
    }
    // K by its first terms, for a log-ratio below 1/16: error 1e-10. (More of them are more constants than the gradient
    // kernel has registers for; beyond, the logarithms are right to 3e-6 of the log-ratio.)
    template <class F>
    KLDIV_FN static F near_cumulant(F u, const Constants<F>& c) {
        F y = fma(c.k2, u, c.k1);
        y = fma(y, u, c.c0);
        return u * fma(y, u, c.b);
    }
    template <class F>
    KLDIV_FN static F log_q_over_mixture(const Element<F>& e, const Constants<F>& c, F log_m) {
        return select(abs(e.u) < broadcast(0.0625f), -near_cumulant(e.u, c), e.lq - log_m);
    }
    template <class F>
    KLDIV_FN static void terms(const Element<F>& e, const Constants<F>& c, F* out) {
        const F m = mixture(e, c), log_m = log_of(m);
        const F far = (c.b * e.p) * (e.lp - log_m) + (c.a * e.q) * (e.lq - log_m);
        F y = fma(c.c4, e.u, c.c3);
        y = fma(y, e.u, c.c2);
        y = fma(y, e.u, c.c1);
        y = fma(y, e.u, c.c0);
        out[0] = select(abs(e.u) < broadcast(0.25f), m * ((e.u * e.u) * y), far);
        out[1] = (c.a * e.q) * log_q_over_mixture(e, c, log_m);
    }
    template <class F>
    KLDIV_FN static F grad_logq_over_q(const Element<F>& e, const Constants<F>& c) {
        return c.a * log_q_over_mixture(e, c, log_of(mixture(e, c)));
    }
    template <class F>
    KLDIV_FN static F grad_logq(const Element<F>& e, const Constants<F>& c) {
        return (c.a * e.q) * log_q_over_mixture(e, c, log_of(mixture(e, c)));
    }
    template <class F>
    KLDIV_FN static F grad_logp(const Element<F>& e, const Constants<F>& c) {
        const F near = e.u - near_cumulant(e.u, c), far = e.lp - log_of(mixture(e, c));
        return (c.b * e.p) * select(abs(e.u) < broadcast(0.0625f), near, far);
    }
    KLDIV_FN static Finished finish(const RowSums& row, Real, Real) {
        return {row.sum[0], row.sum[1], row.sum[0] - row.sum[1]};
    }
};

// --- skew KL: KL(p || m), m = alpha p + (1 - alpha) q, 0 < alpha <= 1
struct SkewKl : Plain {
    static constexpr int sums = 2;
    template <class F>
    struct Constants {
        F a, b, bb, ab;
        KLDIV_FN Constants(Real alpha, Real, const Real*) {
            a = broadcast(static_cast<float>(alpha));
            b = broadcast(static_cast<float>(1 - alpha));
            bb = b * b;
            ab = a * b;
        }
    };
    template <class F>
    KLDIV_FN static F mixture(const Element<F>& e, const Constants<F>& c) {
        return max(broadcast(smallest_normal), fma(c.a, e.p, c.b * e.q));
    }
    // log(p/m) = -log(alpha + (1 - alpha) e^-u); beyond u = -80 the column has no mass in p. Near 1 the logarithm takes
    // what is missing from 1; elsewhere that would round a small alpha away.
    template <class F>
    KLDIV_FN static F log_p_over_m(const Element<F>& e, const Constants<F>& c) {
        const F x = -max(broadcast(-80.0f), e.u), off = c.b * expm1(x);
        const F far = log(max(broadcast(smallest_normal), fma(c.b, exp(x), c.a)));
        return -select(abs(off) < broadcast(0.3f), log1p_near(off), far);
    }
    template <class F>
    KLDIV_FN static void terms(const Element<F>& e, const Constants<F>& c, F* out) {
        const F m = mixture(e, c);
        out[0] = kl_term(e.p, fma(c.a, e.p, c.b * e.q), log_p_over_m(e, c));
        out[1] = c.bb * e.q * ((e.q - e.p) / m);
    }
    template <class F>
    KLDIV_FN static F grad_logq(const Element<F>& e, const Constants<F>& c) {
        return c.bb * e.q * ((e.q - e.p) / mixture(e, c));
    }
    template <class F>
    KLDIV_FN static F grad_logp(const Element<F>& e, const Constants<F>& c) {
        return fma(e.p, log_p_over_m(e, c), c.ab * e.p * ((e.q - e.p) / mixture(e, c)));
    }
    KLDIV_FN static Finished finish(const RowSums& row, Real, Real) {
        return {row.sum[0], row.sum[1], row.sum[0] - row.sum[1]};
    }
};

// Name in Python, struct.
#define KLDIV_MIXTURE_DIVERGENCES(X) \
    X(js, JensenShannon)             \
    X(skew_kl, SkewKl)               \
    X(skew_reverse_kl, Swap<SkewKl>)
