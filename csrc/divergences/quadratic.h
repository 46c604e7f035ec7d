// Sums of squares and products of p and q; see ../divergences.h.

// --- collision: log sum q^2
struct Collision : Plain {
    static constexpr bool needs_p = false, grad_needs_row = true;
    template <class F>
    struct Constants {
        F scale;
        KLDIV_FN Constants(Real, Real, const Real* k) : scale(broadcast(static_cast<float>(2 * k[0]))) {}
    };
    template <class F>
    KLDIV_FN static void terms(const Element<F>& e, const Constants<F>&, F* out) {
        out[0] = e.q * e.q;
    }
    template <class F>
    KLDIV_FN static F grad_logq(const Element<F>& e, const Constants<F>& c) {
        return c.scale * e.q * e.q;
    }
    template <class F>
    KLDIV_FN static F grad_logp(const Element<F>&, const Constants<F>&) {
        return broadcast(0.0f);
    }
    KLDIV_FN static Finished finish(const RowSums& row, Real, Real) {
        return {std::log(row.sum[0]), 2, 0, {1 / row.sum[0]}};
    }
};

// --- Cauchy-Schwarz: -log((sum pq)^2 / (sum p^2 sum q^2))
// With d = p - q, A = sum q^2, P = sum p^2, X = sum pq, B = sum q d, C = sum d^2:
// the quotient is 1 - (A C - B^2) / (A P), and, as A / X = 1 - B / X and P / X = 1 + (B + C) / X,
//   grad_logq = 2 q (q / A - p / X) = (2 q / A) (q - p + p B / X),
//   grad_logp = 2 p (p / P - q / X) = (2 p / P) (p - q - q (B + C) / X).
// These are exact where p and q are close; where they are far, X may underflow and its logarithm is used.
struct CauchySchwarz : Plain {
    static constexpr int sums = 4;
    static constexpr bool log_sum = true, grad_needs_row = true;
    template <class F>
    struct Constants {
        F log_pq, scale_q, scale_p, excess_q, excess_p;
        bool close;
        KLDIV_FN Constants(Real, Real, const Real* k) {
            log_pq = broadcast(static_cast<float>(k[0]));
            scale_q = broadcast(static_cast<float>(2 / k[1]));
            scale_p = broadcast(static_cast<float>(2 / k[2]));
            excess_q = broadcast(static_cast<float>(k[3]));
            excess_p = broadcast(static_cast<float>(k[4]));
            close = std::fabs(k[3]) < Real(0.5) && std::fabs(k[4]) < Real(0.5);
        }
    };
    template <class F>
    KLDIV_FN static F log_weight(const Element<F>& e, const Constants<F>&) {
        return e.lp + e.lq;
    }
    // p - q
    template <class F>
    KLDIV_FN static F difference(const Element<F>& e) {
        return select(abs(e.u) < broadcast(0.25f), e.q * expm1(e.u), e.p - e.q);
    }
    template <class F>
    KLDIV_FN static void terms(const Element<F>& e, const Constants<F>&, F* out) {
        const F d = difference(e);
        out[0] = e.q * e.q;
        out[1] = e.p * e.p;
        out[2] = e.q * d;
        out[3] = d * d;
    }
    template <class F>
    KLDIV_FN static F grad_logq(const Element<F>& e, const Constants<F>& c) {
        if (c.close) return (c.scale_q * e.q) * fma(e.p, c.excess_q, -difference(e));
        return c.scale_q * e.q * e.q - broadcast(2.0f) * exp(e.lp + e.lq - c.log_pq);
    }
    template <class F>
    KLDIV_FN static F grad_logp(const Element<F>& e, const Constants<F>& c) {
        if (c.close) return (c.scale_p * e.p) * (difference(e) - e.q * c.excess_p);
        return c.scale_p * e.p * e.p - broadcast(2.0f) * exp(e.lp + e.lq - c.log_pq);
    }
    KLDIV_FN static Finished finish(const RowSums& row, Real, Real) {
        const Real qq = row.sum[0], pp = row.sum[1], qd = row.sum[2], dd = row.sum[3];
        const Real log_pq = row.log_sum < Real(-1e20) ? -infinity : row.log_sum, pq = std::exp(log_pq);
        const Real missing = std::max(Real(0), (qq * dd - qd * qd) / (qq * pp));
        const Real far = std::log(qq) + std::log(pp) - 2 * log_pq;
        const Real value = missing < Real(0.5) ? -std::log1p(-missing) : far;
        return {value, 0, 0, {or_without_shares(log_pq), qq, pp, qd / pq, (qd + dd) / pq}};
    }
};

// Name in Python, struct.
#define KLDIV_QUADRATIC_DIVERGENCES(X) \
    X(collision, Collision)            \
    X(cauchy_schwarz, CauchySchwarz)
