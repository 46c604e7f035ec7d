// The divergences, written once for every kind of core: a struct each, over lanes F of one instruction set.
//
// Per row p = softmax(t) is the teacher, q = softmax(s) the student and, per column,
//   lp = log p, lq = log q, u = lp - lq.
// A divergence is D = finish(sum_j term_j) with every term non-negative, so that nothing cancels when D is small:
// terms that sum to 0 over a row (q_j - p_j) are added to make them so. Its gradient is
//   dD/ds_k = g_k - q_k sum_j g_j,  g = grad_logq   (the same with p and grad_logp for dD/dt_k).
// `finish` gives the value and those two sums of g; for an f-divergence they add up to D, so that at most one of
// them needs a sum of its own.
//
// Each struct has
//   sums            how many sums it takes of each row
//   log_sum         whether it takes a log-sum-exp of log_weight as well
//   needs_p         false for a statistic of the student alone
//   roots           whether it uses sqrt p and sqrt q
//   grad_needs_row  whether its gradient uses constants of the finished row
//   parks           whether it has grad_logq_over_q = grad_logq / q, which a CUDA kernel keeps (cuda/one_read/compute.cuh)
//   Constants<F>    what its loops use of alpha, beta and the finished row (k: see Finished)
//   infinite_where_q_is_zero(alpha), infinite_where_p_is_zero(alpha): then sum[0] (log_sum) comes to `finish` infinite
// Columns without mass in either row come with lp = lq about -1e30 and p = q = 0, and contribute nothing.
//
// This header is included inside namespace KLDIV_ISA for the loops, or inside that of the CUDA kernels, where F is a
// float and `finish` computes in float (Real). Formulas: Cichocki and Amari (2010) for the alpha
// and alpha-beta families; the others are their definitions.

template <class F>
struct Element {
    F p, q, lp, lq, u;
    F root_p, root_q;  // where the struct asks for them with `roots`
};

template <class F>
KLDIV_FN Element<F> swapped(const Element<F>& e) {
    return {e.q, e.p, e.lq, e.lp, -e.u, e.root_q, e.root_p};
}

constexpr float smallest_normal = 1.17549435e-38f;
constexpr Real infinity = std::numeric_limits<Real>::infinity();

// phi(x) = x e^x - e^x + 1 = x^2 (1/2 + x/3 + x^2/8 + ...), relative error 1.5e-7 on [-1/4, 1/4].
template <class F>
KLDIV_FN F phi_over_square(F x) {
    F y = fma(broadcast(6.938634027e-3f), x, broadcast(3.3426233992e-2f));
    y = fma(y, x, broadcast(1.25000997961e-1f));
    y = fma(y, x, broadcast(3.33331887995e-1f));
    return fma(y, x, broadcast(4.99999990581e-1f));
}

// a log(a/b) - a + b = b phi(x) with x = log(a/b).
template <class F>
KLDIV_FN F kl_term(F a, F b, F x) {
    const F near = (b * x) * (x * phi_over_square(x));
    const F far = fma(a, x, b - a);
    return select(abs(x) < broadcast(0.25f), near, far);
}

// The value, the sums of grad_logq and grad_logp, and constants of the row that the gradients use.
struct Finished {
    Real value, sum_q, sum_p;
    Real k[kRowConstants] = {};
};

struct RowSums {
    Real sum[4] = {0, 0, 0, 0};
    Real log_sum = -infinity;
    bool q_is_zero = false, p_is_zero = false;  // somewhere where the other row has mass
};

struct Plain {
    static constexpr int sums = 1;
    static constexpr bool log_sum = false, needs_p = true, roots = false, grad_needs_row = false, parks = false;
    KLDIV_FN static bool infinite_where_q_is_zero(Real) { return false; }
    KLDIV_FN static bool infinite_where_p_is_zero(Real) { return false; }
    template <class F>
    struct Constants {
        KLDIV_FN Constants(Real, Real, const Real*) {}
    };
};

struct ForwardKl : Plain {
    KLDIV_FN static bool infinite_where_q_is_zero(Real) { return true; }
    template <class F>
    KLDIV_FN static void terms(const Element<F>& e, const Constants<F>&, F* out) {
        out[0] = kl_term(e.p, e.q, e.u);
    }
    template <class F>
    KLDIV_FN static F grad_logq(const Element<F>& e, const Constants<F>&) {
        return e.q - e.p;
    }
    template <class F>
    KLDIV_FN static F grad_logp(const Element<F>& e, const Constants<F>&) {
        return e.p * e.u;
    }
    KLDIV_FN static Finished finish(const RowSums& row, Real, Real) { return {row.sum[0], 0, row.sum[0]}; }
};

// The same divergence with the roles of student and teacher exchanged.
template <class D>
struct Swap {
    static constexpr int sums = D::sums;
    static constexpr bool log_sum = D::log_sum, needs_p = true, roots = D::roots, grad_needs_row = D::grad_needs_row;
    static constexpr bool parks = false;
    KLDIV_FN static bool infinite_where_q_is_zero(Real alpha) { return D::infinite_where_p_is_zero(alpha); }
    KLDIV_FN static bool infinite_where_p_is_zero(Real alpha) { return D::infinite_where_q_is_zero(alpha); }
    template <class F>
    using Constants = typename D::template Constants<F>;
    template <class F>
    KLDIV_FN static void terms(const Element<F>& e, const Constants<F>& c, F* out) {
        D::terms(swapped(e), c, out);
    }
    template <class F>
    KLDIV_FN static F grad_logq(const Element<F>& e, const Constants<F>& c) {
        return D::grad_logp(swapped(e), c);
    }
    template <class F>
    KLDIV_FN static F grad_logp(const Element<F>& e, const Constants<F>& c) {
        return D::grad_logq(swapped(e), c);
    }
    KLDIV_FN static Finished finish(RowSums row, Real alpha, Real beta) {
        const bool q_is_zero = row.p_is_zero;
        row.p_is_zero = row.q_is_zero;
        row.q_is_zero = q_is_zero;
        Finished done = D::finish(row, alpha, beta);
        const Real sum_q = done.sum_p;
        done.sum_p = done.sum_q;
        done.sum_q = sum_q;
        return done;
    }
};

using ReverseKl = Swap<ForwardKl>;

struct Entropy : Plain {
    static constexpr bool needs_p = false;
    template <class F>
    KLDIV_FN static void terms(const Element<F>& e, const Constants<F>&, F* out) {
        out[0] = -(e.q * e.lq);
    }
    template <class F>
    KLDIV_FN static F grad_logq(const Element<F>& e, const Constants<F>&) {
        return -fma(e.q, e.lq, e.q);
    }
    template <class F>
    KLDIV_FN static F grad_logp(const Element<F>&, const Constants<F>&) {
        return broadcast(0.0f);
    }
    KLDIV_FN static Finished finish(const RowSums& row, Real, Real) { return {row.sum[0], row.sum[0] - 1, 0}; }
};

struct CrossEntropy : Plain {
    KLDIV_FN static bool infinite_where_q_is_zero(Real) { return true; }
    template <class F>
    KLDIV_FN static void terms(const Element<F>& e, const Constants<F>&, F* out) {
        out[0] = -(e.p * e.lq);
    }
    // -p with q added, so that equal rows have a gradient of exactly 0.
    template <class F>
    KLDIV_FN static F grad_logq(const Element<F>& e, const Constants<F>&) {
        return e.q - e.p;
    }
    template <class F>
    KLDIV_FN static F grad_logp(const Element<F>& e, const Constants<F>&) {
        return -(e.p * e.lq);
    }
    KLDIV_FN static Finished finish(const RowSums& row, Real, Real) { return {row.sum[0], 0, row.sum[0]}; }
};

struct Jeffreys : Plain {
    // KL(p || q), the sum of grad_logp, and KL(q || p), the sum of grad_logq; one may be infinite without the other.
    static constexpr int sums = 2;
    template <class F>
    KLDIV_FN static void terms(const Element<F>& e, const Constants<F>&, F* out) {
        out[0] = kl_term(e.p, e.q, e.u);
        out[1] = kl_term(e.q, e.p, -e.u);
    }
    template <class F>
    KLDIV_FN static F grad_logq(const Element<F>& e, const Constants<F>&) {
        return (e.q - e.p) - e.q * e.u;
    }
    template <class F>
    KLDIV_FN static F grad_logp(const Element<F>& e, const Constants<F>&) {
        return (e.p - e.q) + e.p * e.u;
    }
    KLDIV_FN static Finished finish(const RowSums& row, Real, Real) {
        const Real forward = row.q_is_zero ? infinity : row.sum[0], reverse = row.p_is_zero ? infinity : row.sum[1];
        return {forward + reverse, reverse, forward};
    }
};

// Generalised Jensen-Shannon, m = beta p + (1 - beta) q, 0 < beta < 1.
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

// KL(p || m), m = alpha p + (1 - alpha) q, 0 < alpha <= 1.
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
    // log(p/m) = -log1p((1 - alpha) expm1(-u)); beyond u = -80 the column has no mass in p.
    template <class F>
    KLDIV_FN static F log_p_over_m(const Element<F>& e, const Constants<F>& c) {
        return -log1p(c.b * expm1(-max(broadcast(-80.0f), e.u)));
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

// Squared Hellinger distance, (sqrt p - sqrt q)^2 / 2.
struct Hellinger : Plain {
    static constexpr bool roots = true;
    template <class F>
    KLDIV_FN static void terms(const Element<F>& e, const Constants<F>&, F* out) {
        const F difference = e.root_p - e.root_q;
        out[0] = broadcast(0.5f) * difference * difference;
    }
    template <class F>
    KLDIV_FN static F grad_logq(const Element<F>& e, const Constants<F>&) {
        return broadcast(0.5f) * (e.q - e.root_p * e.root_q);
    }
    template <class F>
    KLDIV_FN static F grad_logp(const Element<F>& e, const Constants<F>&) {
        return broadcast(0.5f) * (e.p - e.root_p * e.root_q);
    }
    KLDIV_FN static Finished finish(const RowSums& row, Real, Real) {
        return {row.sum[0], Real(0.5) * row.sum[0], Real(0.5) * row.sum[0]};
    }
};

// Total variation |p - q| / 2, with gradient 0 where p = q.
struct TotalVariation : Plain {
    static constexpr int sums = 2;
    template <class F>
    KLDIV_FN static void terms(const Element<F>& e, const Constants<F>& c, F* out) {
        out[0] = broadcast(0.5f) * abs(e.p - e.q);
        out[1] = grad_logq(e, c);
    }
    template <class F>
    KLDIV_FN static F grad_logq(const Element<F>& e, const Constants<F>&) {
        return broadcast(-0.5f) * e.q * sign(e.u);
    }
    template <class F>
    KLDIV_FN static F grad_logp(const Element<F>& e, const Constants<F>&) {
        return broadcast(0.5f) * e.p * sign(e.u);
    }
    KLDIV_FN static Finished finish(const RowSums& row, Real, Real) {
        return {row.sum[0], row.sum[1], row.sum[0] - row.sum[1]};
    }
};

// (p - q)^2 / q = p^2/q - 2p + q.
struct ForwardChi2 : Plain {
    KLDIV_FN static bool infinite_where_q_is_zero(Real) { return true; }
    // p^2 / q = (p e^(u/2)) e^(u/2): no overflow before the result's own.
    template <class F>
    KLDIV_FN static F p_squared_over_q(const Element<F>& e) {
        const F half = exp(min(broadcast(88.0f), broadcast(0.5f) * e.u));
        return (e.p * half) * half;
    }
    template <class F>
    KLDIV_FN static void terms(const Element<F>& e, const Constants<F>&, F* out) {
        const F difference = e.p - e.q;
        const F near = difference * (difference / max(broadcast(smallest_normal), e.q));
        const F far = p_squared_over_q(e) - e.p + (e.q - e.p);
        out[0] = select(abs(e.u) < broadcast(1.0f), near, far);
    }
    template <class F>
    KLDIV_FN static F grad_logq(const Element<F>& e, const Constants<F>&) {
        const F near = -(e.q * expm1(e.u + e.u));
        return select(abs(e.u) < broadcast(1.0f), near, e.q - p_squared_over_q(e));
    }
    template <class F>
    KLDIV_FN static F grad_logp(const Element<F>& e, const Constants<F>&) {
        const F near = e.p * expm1(e.u);
        return broadcast(2.0f) * select(abs(e.u) < broadcast(1.0f), near, p_squared_over_q(e) - e.p);
    }
    KLDIV_FN static Finished finish(const RowSums& row, Real, Real) {
        return {row.sum[0], -row.sum[0], 2 * row.sum[0]};
    }
};

// (p - q)^2 / (p + q) through r = (p - q) / (p + q).
struct Triangular : Plain {
    static constexpr int sums = 2;
    template <class F>
    KLDIV_FN static F ratio(const Element<F>& e) {
        return (e.p - e.q) / max(broadcast(smallest_normal), e.p + e.q);
    }
    template <class F>
    KLDIV_FN static void terms(const Element<F>& e, const Constants<F>& c, F* out) {
        out[0] = (e.p - e.q) * ratio(e);
        out[1] = grad_logq(e, c);
    }
    template <class F>
    KLDIV_FN static F grad_logq(const Element<F>& e, const Constants<F>&) {
        const F r = ratio(e);
        return -(e.q * r) * (broadcast(2.0f) + r);
    }
    template <class F>
    KLDIV_FN static F grad_logp(const Element<F>& e, const Constants<F>&) {
        const F r = ratio(e);
        return (e.p * r) * (broadcast(2.0f) - r);
    }
    KLDIV_FN static Finished finish(const RowSums& row, Real, Real) {
        return {row.sum[0], row.sum[1], row.sum[0] - row.sum[1]};
    }
};

#include "power_divergences.h"

// name in Python, struct. alpha_below_half is not a name in Python: `alpha` uses it where alpha < 1/2.
#define KLDIV_DIVERGENCES(X)            \
    X(entropy, Entropy)                 \
    X(reference_entropy, Swap<Entropy>) \
    X(cross_entropy, CrossEntropy)      \
    X(forward_kl, ForwardKl)            \
    X(reverse_kl, ReverseKl)            \
    X(jeffreys, Jeffreys)               \
    X(js, JensenShannon)                \
    X(skew_kl, SkewKl)                  \
    X(skew_reverse_kl, Swap<SkewKl>)    \
    X(hellinger, Hellinger)             \
    X(tvd, TotalVariation)              \
    X(forward_chi2, ForwardChi2)        \
    X(reverse_chi2, Swap<ForwardChi2>)  \
    X(renyi, Renyi)                     \
    X(alpha, Alpha)                     \
    X(alpha_below_half, Swap<Alpha>)    \
    X(alpha_beta, AlphaBeta)            \
    X(triangular, Triangular)           \
    X(collision, Collision)             \
    X(cauchy_schwarz, CauchySchwarz)
