// Distances of p and q, column by column; see ../divergences.h.

// --- squared Hellinger: (sqrt p - sqrt q)^2 / 2
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

// --- total variation: |p - q| / 2, gradient 0 where p = q
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

// --- chi squared: (p - q)^2 / q = p^2/q - 2p + q
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

// --- triangular discrimination: (p - q)^2 / (p + q) through r = (p - q) / (p + q)
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

// Name in Python, struct.
#define KLDIV_DISTANCES(X)             \
    X(hellinger, Hellinger)            \
    X(tvd, TotalVariation)             \
    X(forward_chi2, ForwardChi2)       \
    X(reverse_chi2, Swap<ForwardChi2>) \
    X(triangular, Triangular)
