// Sixteen float lanes through AVX-512 F, BW, DQ, VL. Included inside namespace KLDIV_ISA.

struct Floats {
    static constexpr int lanes = 16;
    __m512 v;
};
struct Mask {
    __mmask16 v;
};

inline Floats broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Floats load(const float* from) { return {_mm512_loadu_ps(from)}; }
inline void store(float* to, Floats x) { _mm512_storeu_ps(to, x.v); }

inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats operator-(Floats a) { return {_mm512_sub_ps(_mm512_set1_ps(-0.0f), a.v)}; }
inline Mask operator<(Floats a, Floats b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline Mask operator!(Mask m) { return {static_cast<__mmask16>(~m.v)}; }
inline Mask operator&(Mask a, Mask b) { return {static_cast<__mmask16>(a.v & b.v)}; }
inline bool any(Mask m) { return m.v != 0; }
inline Floats select(Mask m, Floats yes, Floats no) { return {_mm512_mask_blend_ps(m.v, no.v, yes.v)}; }

// The second operand where either is NaN, so that a NaN in the data survives max(bound, data).
inline Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats abs(Floats a) { return {_mm512_abs_ps(a.v)}; }
inline Floats sign(Floats a) {
    const __m512 zero = _mm512_setzero_ps();
    const __m512 up = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(zero, a.v, _CMP_LT_OQ), _mm512_set1_ps(1.0f));
    return {_mm512_mask_mov_ps(up, _mm512_cmp_ps_mask(a.v, zero, _CMP_LT_OQ), _mm512_set1_ps(-1.0f))};
}

// x = mantissa * 2^exponent with mantissa in [2/3, 4/3), for a positive normal x.
inline Floats split(Floats x, Floats* exponent) {
    const __m512i bits = _mm512_castps_si512(x.v);
    const __m512i e = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f2aaaab)), 23);
    exponent->v = _mm512_cvtepi32_ps(e);
    return {_mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(e, 23)))};
}

// As in simd_generic.h: powers of two of this instruction set have no least one, and its integers are plain numbers.
inline Floats least_power(Floats x) { return x; }
inline Floats rounded(Floats x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Floats integer(Floats n) { return n; }
inline Floats times_power_of_two(Floats x, Floats n) { return {_mm512_scalef_ps(x.v, n.v)}; }

inline float sum(Floats a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Floats a) { return _mm512_reduce_max_ps(a.v); }
