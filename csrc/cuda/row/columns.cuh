// Eight neighbouring columns of a row at a time, in registers: how they are read, rounded and written.
#pragma once

#include "../../plan.h"
#include "../machine/lanes.cuh"

namespace kldiv::gpu {

constexpr int kColumns = 8;
// A logit at or below this, times the temperature where that is below 1, counts as -inf; finite, so that differences
// stay finite.
constexpr float kNoMass = -1e30f;

template <int element>
constexpr int kElementBytes = element == kFloat32 ? 4 : 2;
KLDIV_HOST_DEVICE int element_bytes(int element) { return element == kFloat32 ? 4 : 2; }

// As they stand in memory; 16-bit columns take the first half.
template <int element>
struct Raw {
    Words words[element == kFloat32 ? 2 : 1];
};

struct Columns {
    float x[kColumns];
};
struct Range {
    float smallest, largest;  // NaN apart
};

KLDIV_DEVICE float low_bfloat16(uint32_t both) { return bits_float(both << 16); }
KLDIV_DEVICE float high_bfloat16(uint32_t both) { return bits_float(both & 0xffff0000u); }

template <int element>
KLDIV_DEVICE Columns unpack(const Raw<element>& raw) {
    Columns out;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
        if constexpr (element == kFloat32) out.x[i] = bits_float(raw.words[i / 4].w[i % 4]);
    }
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) {
        const uint32_t both = raw.words[0].w[i];
        if constexpr (element == kBfloat16) {
            out.x[2 * i] = low_bfloat16(both);
            out.x[2 * i + 1] = high_bfloat16(both);
        } else if constexpr (element == kFloat16) {
            unpack_f16x2(both, &out.x[2 * i], &out.x[2 * i + 1]);
        }
    }
    return out;
}

KLDIV_DEVICE Range range_of(const Columns& columns) {
    Range out = {columns.x[0], columns.x[0]};
#pragma unroll
    for (int i = 1; i < kColumns; ++i) out = {::fminf(out.smallest, columns.x[i]), ::fmaxf(out.largest, columns.x[i])};
    return out;
}

// The smallest and the largest logit of many columns, two 16-bit columns in a word at a time. Of `smallest` only that
// is true which asks for masks: where some column is negative it is the smallest, else any.
template <int element>
struct Extremes {
    uint32_t low = 0, high = element == kBfloat16 ? 0xff80ff80u : 0xfc00fc00u;

    KLDIV_DEVICE void add(const Raw<element>& raw) {
        const uint32_t* w = raw.words[0].w;
        lower(w[0], w[1]);
        lower(w[2], w[3]);
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i)
            high = element == kBfloat16 ? max_bf16x2(high, w[i]) : max_f16x2(high, w[i]);
    }
    KLDIV_DEVICE Range range() const {
        float low2[2], high2[2];
        unpack_two(low, low2);
        unpack_two(high, high2);
        return {::fminf(low2[0], low2[1]), ::fmaxf(high2[0], high2[1])};
    }

  private:
    KLDIV_DEVICE void lower(uint32_t a, uint32_t b) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
        // As unsigned numbers, negative 16-bit floats are above all others, and in the opposite order.
        low = max_u16x2(low, a, b);
#else
        const auto least = [](uint32_t x, uint32_t y) {
            return element == kBfloat16 ? min_bf16x2(x, y) : min_f16x2(x, y);
        };
        low = least(least(low, a), b);
#endif
    }
    KLDIV_DEVICE static void unpack_two(uint32_t both, float* x) {
        if constexpr (element == kBfloat16)
            x[0] = low_bfloat16(both), x[1] = high_bfloat16(both);
        else
            unpack_f16x2(both, &x[0], &x[1]);
    }
};
template <>
struct Extremes<kFloat32> {
    float low = std::numeric_limits<float>::infinity(), high = -std::numeric_limits<float>::infinity();

    KLDIV_DEVICE void add(const Raw<kFloat32>& raw) {
        const Range here = range_of(unpack<kFloat32>(raw));
        low = ::fminf(low, here.smallest);
        high = ::fmaxf(high, here.largest);
    }
    KLDIV_DEVICE Range range() const { return {low, high}; }
};

template <int element>
KLDIV_DEVICE Raw<element> pack(const Columns& columns) {
    Raw<element> out;
    if constexpr (element == kFloat32) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) out.words[i / 4].w[i % 4] = float_bits(columns.x[i]);
    } else {
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i)
            out.words[0].w[i] = element == kBfloat16 ? pack_bf16x2(columns.x[2 * i], columns.x[2 * i + 1])
                                                     : pack_f16x2(columns.x[2 * i], columns.x[2 * i + 1]);
    }
    return out;
}

// The same; beyond float16's range its largest numbers.
template <int element>
KLDIV_DEVICE Raw<element> pack_finite(const Columns& columns) {
    static_assert(element != kBfloat16);
    if constexpr (element == kFloat32) return pack<element>(columns);
    Raw<element> out;
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i)
        out.words[0].w[i] = pack_finite_f16x2(columns.x[2 * i], columns.x[2 * i + 1]);
    return out;
}

// Columns at or below the floor, as the floor. NaN stays.
KLDIV_DEVICE void raise_to(float floor, Columns& columns) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) columns.x[i] = columns.x[i] <= floor ? floor : columns.x[i];
}

// One of the columns replaced; `at` outside of them replaces none.
KLDIV_DEVICE void replace(int at, float value, Columns& columns) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) columns.x[i] = at == i ? value : columns.x[i];
}

// --- global memory of any element and alignment ----------------------------------------------------------------------
KLDIV_DEVICE float load_column(const char* row, int element, int64_t column) {
    if (element == kFloat32) return reinterpret_cast<const float*>(row)[column];
    const uint32_t bits = reinterpret_cast<const uint16_t*>(row)[column];
    if (element == kBfloat16) return low_bfloat16(bits);
    float low, high;
    unpack_f16x2(bits, &low, &high);
    return low;
}

KLDIV_DEVICE void store_column(char* row, int element, int64_t column, float x) {
    if (element == kFloat32)
        reinterpret_cast<float*>(row)[column] = x;
    else
        reinterpret_cast<uint16_t*>(row)[column] =
            static_cast<uint16_t>(element == kBfloat16 ? pack_bf16x2(x, 0.0f) : pack_f16x2(x, 0.0f));
}

// Whether eight columns from `start` on, and others a multiple of eight further, are 16-byte words in memory.
KLDIV_DEVICE bool aligned(const char* row, int element, int64_t start) {
    return reinterpret_cast<uintptr_t>(row + start * element_bytes(element)) % 16 == 0;
}
template <int element>
KLDIV_DEVICE Raw<element> load_aligned(const char* from) {
    Raw<element> raw;
#pragma unroll
    for (int i = 0; i < kElementBytes<element> / 2; ++i) raw.words[i] = load_words(from + 16 * i);
    return raw;
}
// Columns [start, start + 8) of a row, -inf from `limit` on, one by one.
KLDIV_DEVICE Columns load_single(const char* row, int element, int64_t start, int64_t limit) {
    Columns out;
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
        out.x[i] = start + i < limit ? load_column(row, element, start + i) : -std::numeric_limits<float>::infinity();
    return out;
}
// The same. Every thread of a launch has the same element.
KLDIV_DEVICE Columns load_columns(const char* row, int element, int64_t start, int64_t limit) {
    if (start + kColumns <= limit && aligned(row, element, start)) {
        const char* from = row + start * element_bytes(element);
        if (element == kBfloat16) return unpack<kBfloat16>(load_aligned<kBfloat16>(from));
        if (element == kFloat32) return unpack<kFloat32>(load_aligned<kFloat32>(from));
        return unpack<kFloat16>(load_aligned<kFloat16>(from));
    }
    return load_single(row, element, start, limit);
}
// The same as they stand in memory: what is read ahead takes no more registers, and nobody waits for it before it is
// used.
KLDIV_DEVICE Raw<kFloat32> load_ahead(const char* row, int element, int64_t start, int64_t limit) {
    if (start + kColumns <= limit && aligned(row, element, start)) {
        const char* from = row + start * element_bytes(element);
        if (element == kFloat32) return load_aligned<kFloat32>(from);
        return {{load_words(from), {}}};
    }
    const Columns columns = load_single(row, element, start, limit);
    if (element == kFloat32) return pack<kFloat32>(columns);
    return {{element == kBfloat16 ? pack<kBfloat16>(columns).words[0] : pack<kFloat16>(columns).words[0], {}}};
}
KLDIV_DEVICE Columns unpack_any(const Raw<kFloat32>& raw, int element) {
    if (element == kFloat32) return unpack<kFloat32>(raw);
    if (element == kBfloat16) return unpack<kBfloat16>({{raw.words[0]}});
    return unpack<kFloat16>({{raw.words[0]}});
}

template <int element>
KLDIV_DEVICE void store_aligned(char* to, const Columns& columns) {
    const Raw<element> raw = pack<element>(columns);
#pragma unroll
    for (int i = 0; i < kElementBytes<element> / 2; ++i) store_words(to + 16 * i, raw.words[i]);
}

// The same columns of a gradient, those from `limit` on left alone.
KLDIV_DEVICE void store_columns(char* row, int element, int64_t start, int64_t limit, const Columns& columns) {
    char* to = row + start * element_bytes(element);
    if (start + kColumns <= limit && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
        if (element == kBfloat16) return store_aligned<kBfloat16>(to, columns);
        if (element == kFloat32) return store_aligned<kFloat32>(to, columns);
        return store_aligned<kFloat16>(to, columns);
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
        if (start + i < limit) store_column(row, element, start + i, columns.x[i]);
}

}  // namespace kldiv::gpu
