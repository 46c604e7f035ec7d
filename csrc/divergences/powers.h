// Divergences through powers of p and q; see ../divergences.h. Formulas: Cichocki and Amari (2010).

// Below it even a float64 probability is 0, and so are its powers, whatever the other row has there.
constexpr float least_log = -745.0f;

// --- alpha: (p^a q^(1-a) - a p - (1-a) q) / (a (a-1)), a not 0 or 1
// Best for a >= 1/2; swap p and q for the others.
// For small u a term is q u^2 (1/2 + (1+a) u/6 + (1+a+a^2) u^2/24 + ...).
struct Alpha : Plain {
    KLDIV_FN static bool infinite_where_q_is_zero(Real alpha) { return alpha >= 1; }
    KLDIV_FN static bool infinite_where_p_is_zero(Real alpha) { return alpha <= 0; }
    template <class F>
    struct Constants {
        F c, over_a, over_c, near, c3, c4, c5, c6;
        KLDIV_FN Constants(Real alpha, Real, const Real*) {
            c = broadcast(static_cast<float>(alpha - 1));
            over_a = broadcast(static_cast<float>(1 / alpha));
            over_c = broadcast(static_cast<float>(1 / (alpha - 1)));
            near = broadcast(static_cast<float>(Real(0.25) / std::max(Real(1), std::fabs(alpha))));
            Real power = 1 + alpha;
            c3 = broadcast(static_cast<float>(power / 6));
            power = 1 + alpha * power;
            c4 = broadcast(static_cast<float>(power / 24));
            power = 1 + alpha * power;
            c5 = broadcast(static_cast<float>(power / 120));
            power = 1 + alpha * power;
            c6 = broadcast(static_cast<float>(power / 720));
        }
    };
    // p^a q^(1-a) - p = p expm1((a-1) u), through one exponential where that would overflow.
    template <class F>
    KLDIV_FN static F power_minus_p(const Element<F>& e, const Constants<F>& c) {
        const F x = c.c * e.u;
        F power = e.p * expm1(x);
        const auto large = !(x < broadcast(60.0f));
        if (any(large)) power = select(large, exp(e.lp + x) - e.p, power);
        return select(e.lp < broadcast(least_log), broadcast(0.0f), power);
    }
    template <class F>
    KLDIV_FN static void terms(const Element<F>& e, const Constants<F>& c, F* out) {
        const F far = fma(power_minus_p(e, c), c.over_c, e.q - e.p) * c.over_a;
        F y = fma(c.c6, e.u, c.c5);
        y = fma(y, e.u, c.c4);
        y = fma(y, e.u, c.c3);
        y = fma(y, e.u, broadcast(0.5f));
        out[0] = select(abs(e.u) < c.near, (e.q * e.u) * (e.u * y), far);
    }
    template <class F>
    KLDIV_FN static F grad_logq(const Element<F>& e, const Constants<F>& c) {
        return ((e.q - e.p) - power_minus_p(e, c)) * c.over_a;
    }
    template <class F>
    KLDIV_FN static F grad_logp(const Element<F>& e, const Constants<F>& c) {
        return power_minus_p(e, c) * c.over_c;
    }
    KLDIV_FN static Finished finish(const RowSums& row, Real alpha, Real) {
        return {row.sum[0], (1 - alpha) * row.sum[0], alpha * row.sum[0]};
    }
};

// What a column's logarithm is taken less for its share e^(x - L) of a sum: of a sum of 0, too, all shares are 0.
KLDIV_FN inline Real or_without_shares(Real log_sum) { return log_sum == -infinity ? infinity : log_sum; }

// --- Renyi: log(sum p^a q^(1-a)) / (a-1), a above 0 and not 1
// With L the logarithm and r = exp(a lp + (1-a) lq - L), which sums to 1, grad_logq = -r and grad_logp = a/(a-1) r;
// q and a/(a-1) p are taken off, so that both sum to 0 and are 0 where the rows are equal: r - q = q (e^(a u - L) - 1),
// r - p = p (e^((a-1) u - L) - 1). No column has a share of an infinite L: r counts as 0 in all of them.
struct Renyi : Alpha {
    static constexpr bool log_sum = true, grad_needs_row = true;
    template <class F>
    struct Constants : Alpha::Constants<F> {
        F log_total, slope_p, a;
        KLDIV_FN Constants(Real alpha, Real beta, const Real* k) : Alpha::Constants<F>(alpha, beta, k) {
            log_total = broadcast(static_cast<float>(k[0]));
            slope_p = broadcast(static_cast<float>(alpha / (alpha - 1)));
            a = broadcast(static_cast<float>(alpha));
        }
    };
    template <class F>
    KLDIV_FN static F log_weight(const Element<F>& e, const Constants<F>& c) {
        return select(e.lp < broadcast(least_log), e.lp, fma(c.c, e.u, e.lp));
    }
    // r less the probability of one row; x is log r less its logarithm.
    template <class F>
    KLDIV_FN static F excess(const Element<F>& e, const Constants<F>& c, F probability, F x) {
        const F far = exp(log_weight(e, c) - c.log_total) - probability;
        return select(abs(x) < broadcast(1.0f), probability * expm1(x), far);
    }
    template <class F>
    KLDIV_FN static F grad_logq(const Element<F>& e, const Constants<F>& c) {
        return -excess(e, c, e.q, fma(c.a, e.u, -c.log_total));
    }
    template <class F>
    KLDIV_FN static F grad_logp(const Element<F>& e, const Constants<F>& c) {
        return c.slope_p * excess(e, c, e.p, fma(c.c, e.u, -c.log_total));
    }
    KLDIV_FN static Finished finish(const RowSums& row, Real alpha, Real) {
        Real log_sum = row.log_sum < Real(-1e20) ? -infinity : row.log_sum;
        const Real excess = alpha * (alpha - 1) * row.sum[0];
        if (std::fabs(log_sum) < Real(0.5) && std::fabs(excess) < Real(0.5)) log_sum = std::log1p(excess);
        return {log_sum / (alpha - 1), 0, 0, {or_without_shares(log_sum)}};
    }
};

// --- alpha-beta: -1/(ab) sum (p^a q^b - a/l p^l - b/l q^l), l = a+b; a, b, l not 0
// A term is q^l f[0, a, l], the second divided difference of f(c) = e^(c u) at 0, a and l, which has no pole; near one
// of its poles the formula above is a difference of numbers a thousand times larger. It is taken from the neighbours
// among 0, a, l in their order, as (f[y, z] - f[x, y]) / (z - x) with q^l f[x, y] = X (e^((y-x) u) - 1) / (y-x), X one
// of q^l, p^a q^b, p^l. For small u a term is q^l u^2 (1/2 + (a+l) u/6 + (a^2+al+l^2) u^2/24 + ...).
// grad_logq = (q^l - p^a q^b) / a and grad_logp = (p^l - p^a q^b) / b, whose sums add up to l D.
struct AlphaBeta : Plain {
    // The term and one of the gradients: grad_logq where a > 0, else grad_logp. That one can stay finite where D is
    // not.
    static constexpr int sums = 2;
    // An interval between neighbours.
    template <class F>
    struct Gap {
        F width, over;
        KLDIV_FN void set(Real x) {
            width = broadcast(static_cast<float>(x));
            over = broadcast(static_cast<float>(1 / x));
        }
        // q^l f over the interval, from q^l e^(c u) at its ends.
        KLDIV_FN F slope(F from, F to, F u) const {
            const F x = width * u;
            return select(abs(x) < broadcast(1.0f), bounded(from) * expm1(x), to - from) * over;
        }
    };
    template <class F>
    struct Constants {
        F a, b, l, near, c3, c4, c5, c6, over_span;
        Gap<F> of_a, of_b, low, high;  // [0, a], [a, l], and the neighbours' intervals
        int a_rank, l_rank;            // places of a and l in the order of 0, a, l
        bool sums_grad_logq;
        KLDIV_FN Constants(Real alpha, Real beta, const Real*) {
            const Real lambda = alpha + beta;
            a = broadcast(static_cast<float>(alpha));
            b = broadcast(static_cast<float>(beta));
            l = broadcast(static_cast<float>(lambda));
            sums_grad_logq = alpha > 0;
            of_a.set(alpha);
            of_b.set(beta);
            a_rank = (alpha > 0) + (alpha > lambda);
            l_rank = (lambda > 0) + (lambda > alpha);
            const Real least = std::min(Real(0), std::min(alpha, lambda));
            const Real largest = std::max(Real(0), std::max(alpha, lambda));
            const Real middle = a_rank == 1 ? alpha : (l_rank == 1 ? lambda : Real(0));
            low.set(middle - least);
            high.set(largest - middle);
            over_span = broadcast(static_cast<float>(1 / (largest - least)));
            near = broadcast(static_cast<float>(Real(0.25) / std::max(std::fabs(alpha), std::fabs(lambda))));
            // (lambda^n - alpha^n) / beta by recurrence, which has no pole at beta = 0
            Real power = lambda + alpha, alpha_power = alpha * alpha;
            c3 = broadcast(static_cast<float>(power / 6));
            power = power * lambda + alpha_power;
            c4 = broadcast(static_cast<float>(power / 24));
            alpha_power *= alpha;
            power = power * lambda + alpha_power;
            c5 = broadcast(static_cast<float>(power / 120));
            alpha_power *= alpha;
            power = power * lambda + alpha_power;
            c6 = broadcast(static_cast<float>(power / 720));
        }
    };
    // e^x, and 0 in a column without mass in either row, where a negative exponent would give infinity. A finite mask
    // leaves no mass either: even a float64 probability is 0 below e^-745.
    template <class F>
    KLDIV_FN static F power(F x, const Element<F>& e) {
        const Mask nowhere = (e.lp < broadcast(least_log)) & (e.lq < broadcast(least_log));
        return select(nowhere, broadcast(0.0f), exp(x));
    }
    // So that times 0 it is 0.
    template <class F>
    KLDIV_FN static F bounded(F x) {
        return min(broadcast(std::numeric_limits<float>::max()), x);
    }
    template <class F>
    struct Powers {
        F q, cross, p;
    };
    template <class F>
    KLDIV_FN static Powers<F> powers(const Element<F>& e, const Constants<F>& c) {
        return {power(c.l * e.lq, e), power(fma(c.a, e.lp, c.b * e.lq), e), power(c.l * e.lp, e)};
    }
    template <class F>
    KLDIV_FN static void terms(const Element<F>& e, const Constants<F>& c, F* out) {
        const Powers<F> x = powers(e, c);
        const auto at = [&](int rank) { return rank == c.a_rank ? x.cross : (rank == c.l_rank ? x.p : x.q); };
        const F least = at(0), middle = at(1), largest = at(2);
        const F far = (c.high.slope(middle, largest, e.u) - c.low.slope(least, middle, e.u)) * c.over_span;
        F y = fma(c.c6, e.u, c.c5);
        y = fma(y, e.u, c.c4);
        y = fma(y, e.u, c.c3);
        y = fma(y, e.u, broadcast(0.5f));
        const F value = select(abs(e.u) < c.near, (bounded(x.q) * e.u) * (e.u * y), far);
        // A difference of two infinities, which is NaN, stands for an infinite term.
        out[0] = min(value, broadcast(std::numeric_limits<float>::infinity()));
        out[1] = c.sums_grad_logq ? -c.of_a.slope(x.q, x.cross, e.u) : c.of_b.slope(x.cross, x.p, e.u);
    }
    template <class F>
    KLDIV_FN static F grad_logq(const Element<F>& e, const Constants<F>& c) {
        const Powers<F> x = powers(e, c);
        return -c.of_a.slope(x.q, x.cross, e.u);
    }
    template <class F>
    KLDIV_FN static F grad_logp(const Element<F>& e, const Constants<F>& c) {
        const Powers<F> x = powers(e, c);
        return c.of_b.slope(x.cross, x.p, e.u);
    }
    // A column where p is 0 has infinite p^a q^b if a < 0, and p^l if l < 0; where q is 0, p^a q^b if b < 0, and q^l
    // if l < 0. If infinities of both signs meet in a sum, the lower power decides: l against a if b < 0, else a.
    KLDIV_FN static Finished finish(const RowSums& row, Real a, Real b) {
        const Real l = a + b, other = l * row.sum[0] - row.sum[1];
        Finished done = {row.sum[0], a > 0 ? row.sum[1] : other, a > 0 ? other : row.sum[1]};
        bool q_is_zero = row.q_is_zero, p_is_zero = row.p_is_zero;
        if ((q_is_zero && std::min(b, l) < 0) || (p_is_zero && std::min(a, l) < 0))
            done.value = infinity;
        else if (done.value == infinity)  // a power beyond the range of floats, of a column next to no mass
            q_is_zero = p_is_zero = true;
        if (done.value < infinity) return done;
        if (q_is_zero && b < 0)
            done.sum_q = -infinity;
        else if (p_is_zero && a < 0)
            done.sum_q = infinity;
        else if (q_is_zero && l < 0)
            done.sum_q = -infinity;
        if (p_is_zero && a < 0)
            done.sum_p = -infinity;
        else if (q_is_zero && b < 0)
            done.sum_p = infinity;
        else if (p_is_zero && l < 0)
            done.sum_p = -infinity;
        return done;
    }
};

// Name in Python, struct.
#define KLDIV_POWER_DIVERGENCES(X)   \
    X(alpha, Alpha)                  \
    X(alpha_below_half, Swap<Alpha>) \
    X(renyi, Renyi)                  \
    X(alpha_beta, AlphaBeta)
