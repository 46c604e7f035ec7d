// The entropies and the KL divergences; see ../divergences.h.

// --- entropy: -sum q log q
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

// --- cross-entropy: -sum p log q
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

// --- forward KL: sum p (log p - log q); the reverse one is its Swap
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

using ReverseKl = Swap<ForwardKl>;

// --- Jeffreys: KL(p || q) + KL(q || p)
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

// Name in Python, struct.
#define KLDIV_KL_DIVERGENCES(X)         \
    X(entropy, Entropy)                 \
    X(reference_entropy, Swap<Entropy>) \
    X(cross_entropy, CrossEntropy)      \
    X(forward_kl, ForwardKl)            \
    X(reverse_kl, ReverseKl)            \
    X(jeffreys, Jeffreys)
