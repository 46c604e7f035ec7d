// KLDIV_LANES float lanes through the compiler's vector extension: the baseline (4) on any architecture, and
// AVX2 (8). Included once per instruction set, inside namespace KLDIV_ISA.

typedef float float_lanes __attribute__((vector_size(4 * KLDIV_LANES)));
typedef int32_t int_lanes __attribute__((vector_size(4 * KLDIV_LANES)));

struct Floats {
    static constexpr int lanes = KLDIV_LANES;
    float_lanes v;
};
struct Mask {
    int_lanes v;
};

inline Floats broadcast(float x) { return {float_lanes{} + x}; }
inline Floats load(const float* from) {
    Floats x;
    std::memcpy(&x.v, from, sizeof x.v);
    return x;
}
inline void store(float* to, Floats x) { std::memcpy(to, &x.v, sizeof x.v); }

inline Floats operator+(Floats a, Floats b) { return {a.v + b.v}; }
inline Floats operator-(Floats a, Floats b) { return {a.v - b.v}; }
inline Floats operator*(Floats a, Floats b) { return {a.v * b.v}; }
inline Floats operator/(Floats a, Floats b) { return {a.v / b.v}; }
inline Floats operator-(Floats a) { return {-a.v}; }
inline Mask operator<(Floats a, Floats b) { return {a.v < b.v}; }
inline Mask operator!(Mask m) { return {~m.v}; }
inline Mask operator&(Mask a, Mask b) { return {a.v & b.v}; }
inline bool any(Mask m) {
#ifdef KLDIV_AVX2
    return _mm256_movemask_ps(_mm256_castsi256_ps((__m256i)m.v)) != 0;
#endif
    const int_lanes bits = m.v;
    int32_t found = 0;
    for (int i = 0; i < KLDIV_LANES; ++i) found |= bits[i];
    return found != 0;
}
inline Floats select(Mask m, Floats yes, Floats no) { return {m.v ? yes.v : no.v}; }

// The second operand where either is NaN, so that a NaN in the data survives max(bound, data).
inline Floats max(Floats a, Floats b) { return {a.v > b.v ? a.v : b.v}; }
inline Floats min(Floats a, Floats b) { return {a.v < b.v ? a.v : b.v}; }
#ifdef KLDIV_AVX2
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
#elif defined(__aarch64__)
inline Floats fma(Floats a, Floats b, Floats c) {
    return {(float_lanes)vfmaq_f32((float32x4_t)c.v, (float32x4_t)a.v, (float32x4_t)b.v)};
}
#else
inline Floats fma(Floats a, Floats b, Floats c) { return {a.v * b.v + c.v}; }
#endif
inline Floats abs(Floats a) { return {(float_lanes)((int_lanes)a.v & (int_lanes{} + 0x7fffffff))}; }
inline Floats sign(Floats a) {
    const float_lanes zero{}, one = zero + 1.0f;
    return {a.v > zero ? one : (a.v < zero ? -one : zero)};
}

// x = mantissa * 2^exponent with mantissa in [2/3, 4/3), for a positive normal x.
inline Floats split(Floats x, Floats* exponent) {
    const int_lanes bits = (int_lanes)x.v;
    const int_lanes e = (bits - 0x3f2aaaab) >> 23;
    exponent->v = __builtin_convertvector(e, float_lanes);
    return {(float_lanes)(bits - (e << 23))};
}

// An exponent from which on powers of two are 0, where x is below it.
inline Floats least_power(Floats x) { return max(broadcast(-127.0f), x); }
// x, at most 128, rounded to an integer in the form whose low bits are the exponent of 2^n: n + 127 + 1.5 * 2^23.
constexpr float kIntegers = 12582912.0f + 127.0f;
inline Floats rounded(Floats x) { return x + broadcast(kIntegers); }
inline Floats integer(Floats n) { return n - broadcast(kIntegers); }
inline Floats times_power_of_two(Floats x, Floats n) { return {x.v * (float_lanes)((int_lanes)n.v << 23)}; }

inline float sum(Floats a) {
    float partial[KLDIV_LANES];
    store(partial, a);
    for (int width = KLDIV_LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) partial[i] += partial[i + width];
    return partial[0];
}
inline float largest(Floats a) {
    float best = a.v[0];
    for (int i = 1; i < KLDIV_LANES; ++i) best = best < a.v[i] ? a.v[i] : best;
    return best;
}
