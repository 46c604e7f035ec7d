// Tensors to tiles and back: loads from float32, bfloat16 and float16, and stores to them, rounding to nearest even.
// Included inside namespace KLDIV_ISA, after the lanes.

inline float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
inline uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float half_to_float(uint16_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, rest = h & 0x7fffu;
    if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
    // Half's exponent bias is 15: as float bits the value is 2^112 too small, denormals included.
    const float magnitude = from_bits(rest << 13) * 0x1p112f;
    return from_bits(sign | to_bits(magnitude));
}
inline uint16_t float_to_half(float x) {
    const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000u;
    const float magnitude = from_bits(bits & 0x7fffffffu);
    if (!(magnitude < 65520.0f)) return static_cast<uint16_t>(sign | (magnitude != magnitude ? 0x7e00u : 0x7c00u));
    if (magnitude < 0x1p-14f) return static_cast<uint16_t>(sign | (to_bits(magnitude + 0.5f) - to_bits(0.5f)));
    const uint32_t m = to_bits(magnitude) - (112u << 23);
    return static_cast<uint16_t>(sign | ((m + 0xfffu + ((m >> 13) & 1u)) >> 13));
}
inline uint16_t float_to_bfloat16(float x) {
    const uint32_t bits = to_bits(x);
    return static_cast<uint16_t>(x != x ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <Dtype dtype>
inline float convert_one(const void* from, int i) {
    if constexpr (dtype == Dtype::float32) return static_cast<const float*>(from)[i];
    const uint16_t raw = static_cast<const uint16_t*>(from)[i];
    return dtype == Dtype::bfloat16 ? from_bits(static_cast<uint32_t>(raw) << 16) : half_to_float(raw);
}
template <Dtype dtype>
inline void store_one(float x, int i, void* to) {
    if constexpr (dtype == Dtype::float32)
        static_cast<float*>(to)[i] = x;
    else
        static_cast<uint16_t*>(to)[i] = dtype == Dtype::bfloat16 ? float_to_bfloat16(x) : float_to_half(x);
}

#ifdef KLDIV_AVX512
constexpr int kStoreRun = 32;  // 64 bytes of 16-bit floats

template <Dtype dtype>
inline Floats convert(const void* from, int i) {
    if constexpr (dtype == Dtype::float32) return load(static_cast<const float*>(from) + i);
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(from) + i));
    if constexpr (dtype == Dtype::bfloat16)
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
    return {_mm512_cvtph_ps(raw)};
}

inline __m256i round_to_bfloat16(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0)));
}

template <Dtype dtype>
inline void store_run(const float* from, int i, void* to) {
    if constexpr (dtype == Dtype::float32) {
        float* out = static_cast<float*>(to) + i;
        for (int j = 0; j < kStoreRun; j += 16) {
            _mm512_storeu_ps(out + j, _mm512_loadu_ps(from + i + j));
        }
        return;
    }
    const __m512 low = _mm512_loadu_ps(from + i), high = _mm512_loadu_ps(from + i + 16);
    __m256i a, b;
    if constexpr (dtype == Dtype::bfloat16) {
        a = round_to_bfloat16(low);
        b = round_to_bfloat16(high);
    } else {
        a = _mm512_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT);
        b = _mm512_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT);
    }
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
    _mm512_storeu_si512(static_cast<uint16_t*>(to) + i, both);
}
#else
constexpr int kStoreRun = Floats::lanes;

typedef uint16_t short_lanes __attribute__((vector_size(2 * KLDIV_LANES)));
typedef uint32_t word_lanes __attribute__((vector_size(4 * KLDIV_LANES)));

template <Dtype dtype>
inline Floats convert(const void* from, int i) {
    if constexpr (dtype == Dtype::float32) return load(static_cast<const float*>(from) + i);
    const uint16_t* raw = static_cast<const uint16_t*>(from) + i;
    if constexpr (dtype == Dtype::bfloat16) {
        short_lanes x;
        std::memcpy(&x, raw, sizeof x);
        return {(float_lanes)(__builtin_convertvector(x, word_lanes) << 16)};
    }
#ifdef KLDIV_AVX2
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(raw)))};
#else
    Floats x;
    for (int j = 0; j < KLDIV_LANES; ++j) x.v[j] = half_to_float(raw[j]);
    return x;
#endif
}

template <Dtype dtype>
inline void store_run(const float* from, int i, void* to) {
    if constexpr (dtype == Dtype::float32) {
        std::memcpy(static_cast<float*>(to) + i, from + i, sizeof(float_lanes));
        return;
    }
    uint16_t* out = static_cast<uint16_t*>(to) + i;
    if constexpr (dtype == Dtype::bfloat16) {
        const Floats x = load(from + i);
        const word_lanes bits = (word_lanes)x.v;
        const word_lanes rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        const short_lanes y = __builtin_convertvector(x.v != x.v ? word_lanes{} + 0x7fc0u : rounded, short_lanes);
        std::memcpy(out, &y, sizeof y);
        return;
    }
#ifdef KLDIV_AVX2
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int j = 0; j < KLDIV_LANES; ++j) out[j] = float_to_half(from[i + j]);
#endif
}
#endif

template <Dtype dtype>
void store_tile(const float* from, int columns, void* to) {
    const int whole = columns - columns % kStoreRun;
    for (int i = 0; i < whole; i += kStoreRun) store_run<dtype>(from, i, to);
    for (int i = whole; i < columns; ++i) store_one<dtype>(from[i], i, to);
}

#ifdef KLDIV_AVX512
// The same through the processor's own conversion, which takes denormals as 0.
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))) inline void store_bfloat16_tile(
    const float* from, int columns, void* to) {
    const int whole = columns - columns % kStoreRun;
    for (int i = 0; i < whole; i += kStoreRun) {
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + i + 16), _mm512_loadu_ps(from + i));
        _mm512_storeu_si512(static_cast<uint16_t*>(to) + i, both);
    }
    for (int i = whole; i < columns; ++i) store_one<Dtype::bfloat16>(from[i], i, to);
}
#endif

// What stands for a logit: (x - offset) * scale, kNoMass where x has no mass, and above it where x has some.
inline Floats scaled(Floats x, Floats offset, Floats scale) {
    const Floats y = max(broadcast(kAboveNoMass), (x - offset) * scale);
    return select(x < broadcast(kAboveNoMass), broadcast(kNoMass), y);
}

// The first sweep also measures the tile; the later ones only convert it. A tile all of whose logits have mass, as most
// have, takes no more than a difference and a product.
template <Dtype dtype, bool measured>
Loaded load_tile(const void* from, int columns, float scale, float offset, float* to) {
    constexpr float inf = std::numeric_limits<float>::infinity();
    const int whole = columns - columns % Floats::lanes;
    const Floats factor = broadcast(scale), shift = broadcast(offset);
    Floats largest = broadcast(-inf), smallest = broadcast(inf);
    for (int i = 0; i < whole; i += Floats::lanes) {
        const Floats x = convert<dtype>(from, i);
        if constexpr (measured) largest = max(x, largest);
        smallest = min(x, smallest);
        store(to + i, (x - shift) * factor);
    }
    const float least = -kldiv::KLDIV_ISA::largest(-smallest);
    if (!(least > kNoMass && (least - offset) * scale > kAboveNoMass))
        for (int i = 0; i < whole; i += Floats::lanes) store(to + i, scaled(convert<dtype>(from, i), shift, factor));
    Loaded out{kldiv::KLDIV_ISA::largest(largest), least <= kNoMass};
    for (int i = whole; i < columns; ++i) {
        const float x = convert_one<dtype>(from, i);
        out.largest = out.largest > x ? out.largest : x;
        out.has_no_mass |= x <= kNoMass;
        to[i] = scaled_one(x, offset, scale);
    }
    for (int i = columns; i % kPad != 0; ++i) to[i] = kNoMass;
    return out;
}

// data *= factor, rounded once.
template <Dtype dtype>
void scale_tile(void* data, int columns, float factor) {
    alignas(64) float buffer[kTile];
    const int whole = columns - columns % Floats::lanes;
    for (int i = 0; i < whole; i += Floats::lanes) store(buffer + i, convert<dtype>(data, i) * broadcast(factor));
    for (int i = whole; i < columns; ++i) buffer[i] = convert_one<dtype>(data, i) * factor;
    store_tile<dtype>(buffer, columns, data);
}
