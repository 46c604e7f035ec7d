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
// A struct of three functions, value, grad_logq and grad_logp, is all that a divergence needs: it derives from OfThree,
// which takes the sums of all three. Those below say more, to be exact where D is small, or to take fewer sums:
//   sums            how many sums it takes of each row
//   log_sum         whether it takes a log-sum-exp of log_weight as well
//   needs_p         false for a statistic of the student alone
//   roots           whether it uses sqrt p and sqrt q
//   grad_needs_row  whether its gradient uses constants of the finished row
//   parks           whether it has grad_logq_over_q = grad_logq / q, which a CUDA kernel keeps (one_read/compute.cuh)
//   Constants<F>    what its loops use of alpha, beta and the finished row (k: see Finished)
//   infinite_where_q_is_zero(alpha), infinite_where_p_is_zero(alpha): then sum[0] (log_sum) comes to `finish` infinite
// Columns without mass in either row come with lp = lq about -1e30 and p = q = 0, and contribute nothing.
//
// This header is included inside namespace KLDIV_ISA for the loops, or inside that of the CUDA kernels, where F is a
// float and `finish` computes in float (Real). Formulas: Cichocki and Amari (2010) for the alpha and alpha-beta
// families; the others are their definitions. The twins in PyTorch (kldiv_kernels/divergences/) and Triton
// (kldiv_kernels/backends/triton/formulas/) have the same files, in the same order, under the same headings.

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

// A struct of value, grad_logq and grad_logp alone: the sums of all three are taken.
template <class D>
struct OfThree : Plain {
    static constexpr int sums = 3;
    template <class F>
    KLDIV_FN static void terms(const Element<F>& e, const Constants<F>& c, F* out) {
        out[0] = D::value(e, c);
        out[1] = D::grad_logq(e, c);
        out[2] = D::grad_logp(e, c);
    }
    KLDIV_FN static Finished finish(const RowSums& row, Real, Real) { return {row.sum[0], row.sum[1], row.sum[2]}; }
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

#include "divergences/kl.h"
#include "divergences/mixtures.h"
#include "divergences/distances.h"
#include "divergences/powers.h"
#include "divergences/quadratic.h"

// alpha_below_half is not a name in Python: `alpha` uses it where alpha < 1/2.
#define KLDIV_DIVERGENCES(X)     \
    KLDIV_KL_DIVERGENCES(X)      \
    KLDIV_MIXTURE_DIVERGENCES(X) \
    KLDIV_DISTANCES(X)           \
    KLDIV_POWER_DIVERGENCES(X)   \
    KLDIV_QUADRATIC_DIVERGENCES(X)
