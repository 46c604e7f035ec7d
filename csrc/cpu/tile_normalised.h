// The later sweeps' loops over one tile, with the finished softmaxes: a divergence's terms, and gradients. Included by
// tiles.h.

// The columns of a tile as a divergence takes them.
template <class D>
struct Normaliser {
    Floats m_s, scale_s, lse_s, m_t, scale_t, lse_t, delta_high, delta_low, log2e;

    explicit Normaliser(const NormalisedRow& row)
        : m_s(broadcast(D::roots ? 0.5f * row.s.m : row.s.m)),
          scale_s(broadcast(D::roots ? std::sqrt(row.s.inverse_z) : row.s.inverse_z)),
          lse_s(broadcast(row.s.lse)),
          m_t(broadcast(D::roots ? 0.5f * row.t.m : row.t.m)),
          scale_t(broadcast(D::roots ? std::sqrt(row.t.inverse_z) : row.t.inverse_z)),
          lse_t(broadcast(row.t.lse)),
          delta_high(broadcast(row.delta_high)),
          delta_low(broadcast(row.delta_low)),
          log2e(broadcast(D::roots ? 0.5f * kLog2e : kLog2e)) {}

    Element<Floats> element(const float* s, const float* t, int i) const {
        const Floats student = load(s + i), q = exp2(fma(student, log2e, -m_s));
        if constexpr (!D::needs_p) return of(student, student, q, q);
        const Floats teacher = load(t + i);
        return of(student, teacher, q, exp2(fma(teacher, log2e, -m_t)));
    }

    // With exponentials, or their roots, that are known.
    Element<Floats> of(Floats student, Floats teacher, Floats exp_s, Floats exp_t) const {
        Element<Floats> e;
        const Floats q = exp_s * scale_s;
        e.lq = student - lse_s;
        e.root_q = q;
        e.q = D::roots ? q * q : q;
        if constexpr (D::needs_p) {
            const Floats p = exp_t * scale_t;
            e.lp = teacher - lse_t;
            e.root_p = p;
            e.p = D::roots ? p * p : p;
            e.u = ((teacher - student) - delta_high) - delta_low;
        }
        return e;
    }
};

// flatten: one call left in a loop costs more than the loop's own work.
template <class D, bool park>
__attribute__((flatten)) void terms(const float* s, const float* t, int columns, const NormalisedRow& row, double* sums,
                                    LogSum* log_sum, float* x, float* y) {
    const Normaliser<D> normaliser(row);
    const double unknown[kRowConstants] = {};
    const typename D::template Constants<Floats> constants(row.alpha, row.beta, unknown);
    for (int begin = 0; begin < columns; begin += kRun) {
        const int end = std::min(columns, begin + kRun);
        Floats totals[D::sums], out[D::sums];
        for (Floats& total : totals) total = broadcast(0.0f);
        for (int i = begin; i < end; i += Floats::lanes) {
            Element<Floats> e;
            if constexpr (park)
                e = normaliser.of(load(s + i), load(t + i), load(x + i), load(y + i));
            else
                e = normaliser.element(s, t, i);
            D::terms(e, constants, out);
            if constexpr (park) {
                store(x + i, e.q);
                store(y + i, D::grad_logq(e, constants));
            }
            for (int j = 0; j < D::sums; ++j) totals[j] = totals[j] + out[j];
        }
        for (int j = 0; j < D::sums; ++j) sums[j] += sum(totals[j]);
    }
    if constexpr (D::log_sum) {
        Floats top = broadcast(kNoMass);
        for (int i = 0; i < columns; i += Floats::lanes)
            top = max(D::log_weight(normaliser.element(s, t, i), constants), top);
        const float reference = largest(top);
        Floats total = broadcast(0.0f);
        for (int i = 0; i < columns; i += Floats::lanes)
            total = total + exp(D::log_weight(normaliser.element(s, t, i), constants) - broadcast(reference));
        const double larger = std::max<double>(log_sum->max, reference);
        const double kept = log_sum->sum > 0 ? log_sum->sum * std::exp(log_sum->max - larger) : 0.0;
        log_sum->sum = kept + sum(total) * std::exp(reference - larger);
        log_sum->max = larger;
    }
}

template <class D, bool student>
__attribute__((flatten)) void gradient(const float* s, const float* t, int columns, const NormalisedRow& row,
                                       float weight, float share, bool first, float* to) {
    const Normaliser<D> normaliser(row);
    const typename D::template Constants<Floats> constants(row.alpha, row.beta, row.k);
    const Floats w = broadcast(weight), of_softmax = broadcast(first ? share : 0.0f);
    const auto one = [&](int i) {
        const Element<Floats> e = normaliser.element(s, t, i);
        const Floats g = student ? D::grad_logq(e, constants) : D::grad_logp(e, constants);
        return fma(w, g, of_softmax * (student ? e.q : e.p));
    };
    if (first) {
        for (int i = 0; i < columns; i += Floats::lanes) store(to + i, one(i));
    } else {
        for (int i = 0; i < columns; i += Floats::lanes) store(to + i, load(to + i) + one(i));
    }
}

inline void softmax(const float* x, int columns, const Softmax& row, float share, float* to) {
    const Floats m = broadcast(row.m), scale = broadcast(row.inverse_z * share);
    for (int i = 0; i < columns; i += Floats::lanes) store(to + i, exp2(exponent(load(x + i), m)) * scale);
}

inline void add_exp(const float* x, int columns, float factor, float m, float share, float* to) {
    const Floats reference = broadcast(m), times = broadcast(factor), scale = broadcast(share);
    for (int i = 0; i < columns; i += Floats::lanes)
        store(to + i, fma(exp2(fma(load(x + i), times, -reference)), scale, load(to + i)));
}

// Both products are rounded: those of equal rows cancel exactly.
inline void combine(const float* x, const float* y, int columns, float c_x, float c_y, float* to) {
    const Floats cx = broadcast(c_x), cy = broadcast(c_y);
    for (int i = 0; i < columns; i += Floats::lanes) store(to + i, cx * load(x + i) + cy * load(y + i));
}

inline void add(const float* x, int columns, float c, float* to) {
    const Floats times = broadcast(c);
    for (int i = 0; i < columns; i += Floats::lanes) store(to + i, fma(load(x + i), times, load(to + i)));
}
