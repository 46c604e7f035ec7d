// The first sweep's loops over one tile, before the softmaxes are known: the sums of one row, and of two. Included by
// tiles.h.

template <bool park>
double sum_exp_times(const float* x, int columns, float factor, float m, float* terms) {
    const Floats reference = broadcast(m), times = broadcast(factor);
    Floats z = broadcast(0.0f);
    for (int begin = 0; begin < columns; begin += kRun) {
        const int end = std::min(columns, begin + kRun);
        Floats run = broadcast(0.0f);
        for (int i = begin; i < end; i += Floats::lanes) {
            const Floats e = exp2(fma(load(x + i), times, -reference));
            run = run + e;
            if constexpr (park) store(terms + i, e);
        }
        z = z + run;
    }
    return sum(z);
}

inline double sum_exp(const float* x, int columns, float m) {
    return sum_exp_times<false>(x, columns, kLog2e, m, nullptr);
}

inline void sum_exp_entropy(const float* x, int columns, float m, double* z_out, double* a_out) {
    const Floats reference = broadcast(m);
    Floats z = broadcast(0.0f), a = broadcast(0.0f);
    for (int begin = 0; begin < columns; begin += kRun) {
        const int end = std::min(columns, begin + kRun);
        Floats run_z = broadcast(0.0f), run_a = broadcast(0.0f);
        for (int i = begin; i < end; i += Floats::lanes) {
            const Floats y = exponent(load(x + i), reference), e = exp2(y);
            run_z = run_z + e;
            run_a = fma(e, y, run_a);
        }
        z = z + run_z;
        a = a + run_a;
    }
    *z_out = sum(z);
    *a_out = -sum(a) * kExponentToLog;
}

// The online kernels also park two floats a column, x and y, of which the gradient of the row's divergence is a linear
// combination c_x x + c_y y once the row is finished (row_gradient.cpp).
enum class Park { none, both, weighted };

// `far`: the rows are so far apart that terms may be taken as they are (Row::first_sweep).
template <Park park, bool far>
__attribute__((flatten)) void online_kl(const float* s, const float* t, int columns, const OnlineTile& tile,
                                        OnlineSums* sums, float* x, float* y) {
    const Floats ms = broadcast(tile.m_second), mt = broadcast(tile.m_first), d = broadcast(tile.delta);
    const Floats k = broadcast(tile.kappa);
    Floats zs = broadcast(0.0f), zt = broadcast(0.0f), g = broadcast(0.0f);
    for (int begin = 0; begin < columns; begin += kRun) {
        const int end = std::min(columns, begin + kRun);
        Floats run_s = broadcast(0.0f), run_t = broadcast(0.0f), run_g = broadcast(0.0f);
        for (int i = begin; i < end; i += Floats::lanes) {
            const Floats second = load(s + i), first = load(t + i);
            const Floats q = exp2(exponent(second, ms)), p = exp2(exponent(first, mt));
            // Nearly exact where the rows are close, and the same but for its sign with the rows exchanged.
            const Floats u = (first - second) - d;
            run_s = run_s + q;
            run_t = run_t + p;
            run_g = run_g + (far ? fma(p, u, q * k - p) : kl_term(p, q * k, u));
            if constexpr (park == Park::both) {
                store(x + i, q);
                store(y + i, p);
            } else if constexpr (park == Park::weighted) {
                store(x + i, p);
                store(y + i, p * u);
            }
        }
        zs = zs + run_s;
        zt = zt + run_t;
        g = g + run_g;
    }
    *sums = {sum(zs), sum(zt), sum(g)};
}

template <Park park>
__attribute__((flatten)) void online_hellinger(const float* s, const float* t, int columns, const OnlineTile& tile,
                                               OnlineSums* sums, float* x, float* y) {
    const Floats ms = broadcast(0.5f * tile.m_second), mt = broadcast(0.5f * tile.m_first);
    const Floats half = broadcast(0.5f * kLog2e), k = broadcast(std::sqrt(tile.kappa));
    Floats zs = broadcast(0.0f), zt = broadcast(0.0f), g = broadcast(0.0f);
    for (int begin = 0; begin < columns; begin += kRun) {
        const int end = std::min(columns, begin + kRun);
        Floats run_s = broadcast(0.0f), run_t = broadcast(0.0f), run_g = broadcast(0.0f);
        for (int i = begin; i < end; i += Floats::lanes) {
            const Floats root_q = exp2(fma(load(s + i), half, -ms)), root_p = exp2(fma(load(t + i), half, -mt));
            const Floats q = root_q * root_q;
            run_s = run_s + q;
            run_t = run_t + root_p * root_p;  // rounded as q is: equal rows have equal sums
            const Floats difference = root_p - root_q * k;
            run_g = fma(difference, difference, run_g);
            if constexpr (park != Park::none) {
                store(x + i, q);
                store(y + i, root_p * root_q);
            }
        }
        zs = zs + run_s;
        zt = zt + run_t;
        g = g + run_g;
    }
    *sums = {sum(zs), sum(zt), 0.5 * sum(g)};
}
