// csrc/cuda/machine/ptx.cuh for the host: the same names, on the machine of machine.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "machine.h"

#define KLDIV_DEVICE inline
// Launch bounds are the compiler's: nothing here knows them.
#define KLDIV_KERNEL(threads, blocks) inline void

namespace kldiv::gpu {

// --- where a thread is -----------------------------------------------------------------------------------------------
KLDIV_DEVICE int thread_index() { return host::current->index; }
KLDIV_DEVICE int block_threads() { return host::current->block_threads; }
KLDIV_DEVICE int64_t block_index() { return host::current->block; }
KLDIV_DEVICE int64_t grid_blocks() { return host::current->blocks; }
KLDIV_DEVICE char* shared_memory() { return host::current->shared; }
KLDIV_DEVICE uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(static_cast<const char*>(pointer) - host::current->shared);
}

// --- arithmetic ------------------------------------------------------------------------------------------------------
KLDIV_DEVICE uint32_t float_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
KLDIV_DEVICE float bits_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

KLDIV_DEVICE float opaque(float x) { return x; }

namespace host {

inline float flushed(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }

// PTX gives one NaN, whatever NaN it was given.
constexpr uint16_t kNan16 = 0x7fff;

inline float from_bf16(uint16_t x) { return bits_float(static_cast<uint32_t>(x) << 16); }
inline uint16_t to_bf16(float x) {
    if (std::isnan(x)) return kNan16;
    const uint32_t bits = float_bits(x);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_f16(uint16_t x) {
    const float sign = x & 0x8000 ? -1.0f : 1.0f;
    const int exponent = x >> 10 & 31, mantissa = x & 1023;
    if (exponent == 31) return mantissa ? std::numeric_limits<float>::quiet_NaN() : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
    return bits_float(static_cast<uint32_t>(x & 0x8000) << 16 | static_cast<uint32_t>(exponent + 112) << 23 |
                      static_cast<uint32_t>(mantissa) << 13);
}
inline uint16_t to_f16(float x) {
    if (std::isnan(x)) return kNan16;
    const uint16_t sign = static_cast<uint16_t>(float_bits(x) >> 16 & 0x8000);
    const float size = std::fabs(x);
    if (size >= 65520.0f) return sign | 0x7c00;
    // Adding 1/2 rounds to a multiple of 2^-24, the step below the normal range.
    if (size < 0x1p-14f) return static_cast<uint16_t>(sign | (float_bits(size + 0.5f) - float_bits(0.5f)));
    const uint32_t bits = float_bits(size) - (112u << 23);
    return static_cast<uint16_t>(sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13);
}

using Widen = float (*)(uint16_t);
template <Widen widen>
inline uint16_t max_nan(uint16_t a, uint16_t b) {
    const float x = widen(a), y = widen(b);
    if (std::isnan(x) || std::isnan(y)) return kNan16;
    if (x == y) return a & b;  // +0 is above -0
    return x > y ? a : b;
}
template <Widen widen>
inline uint16_t min_number(uint16_t a, uint16_t b) {
    const float x = widen(a), y = widen(b);
    if (std::isnan(x)) return std::isnan(y) ? kNan16 : b;
    if (std::isnan(y)) return a;
    if (x == y) return a | b;
    return x < y ? a : b;
}
inline uint32_t pair(uint16_t low, uint16_t high) { return low | static_cast<uint32_t>(high) << 16; }
inline uint16_t low(uint32_t both) { return static_cast<uint16_t>(both); }
inline uint16_t high(uint32_t both) { return static_cast<uint16_t>(both >> 16); }

}  // namespace host

namespace host {

// -1 to 1, another for every word.
inline float noise(uint32_t word) {
    word *= 0x9e3779b1u;
    word = (word ^ word >> 15) * 0x85ebca6bu;
    return std::ldexp(static_cast<float>(static_cast<int32_t>(word ^ word >> 13)), -31);
}
// What ex2.approx and lg2.approx are off by, 2^-22 at most: three quarters as of a table that is interpolated in 64
// parts of a power of two, alike for numbers next to each other, so that it does not average out in a sum; the rest as
// of rounding.
inline float approximation_error(float x) {
    const uint32_t bits = float_bits(x), part = bits >> 17;
    const float at = static_cast<float>(bits & 0x1ffff) * 0x1p-17f;
    const float of_table = noise(part) + at * (noise(part + 1) - noise(part));
    return 0x1p-22f * (0.75f * of_table + 0.25f * noise(~bits));
}

}  // namespace host

// 1 at 0, which PTX promises, and so next to it.
KLDIV_DEVICE float exp2_approx(float x) {
    x = host::flushed(x);
    const float exact = std::exp2(x), error = host::approximation_error(x) * std::min(1.0f, 64 * std::fabs(x));
    return std::isfinite(exact) ? host::flushed(exact + exact * error) : exact;
}
KLDIV_DEVICE float log2_approx(float x) {
    x = host::flushed(x);
    const float exact = std::log2(x), error = host::approximation_error(x) * (x > 0.5f && x < 2 ? 1.0f : exact);
    return x == 1 || !std::isfinite(exact) ? exact : host::flushed(exact + error);
}
KLDIV_DEVICE uint32_t max_bf16x2(uint32_t a, uint32_t b) {
    using namespace host;
    return pair(max_nan<from_bf16>(low(a), low(b)), max_nan<from_bf16>(high(a), high(b)));
}
KLDIV_DEVICE uint32_t min_bf16x2(uint32_t a, uint32_t b) {
    using namespace host;
    return pair(min_number<from_bf16>(low(a), low(b)), min_number<from_bf16>(high(a), high(b)));
}
KLDIV_DEVICE uint32_t max_f16x2(uint32_t a, uint32_t b) {
    using namespace host;
    return pair(max_nan<from_f16>(low(a), low(b)), max_nan<from_f16>(high(a), high(b)));
}
KLDIV_DEVICE uint32_t min_f16x2(uint32_t a, uint32_t b) {
    using namespace host;
    return pair(min_number<from_f16>(low(a), low(b)), min_number<from_f16>(high(a), high(b)));
}
KLDIV_DEVICE uint32_t pack_bf16x2(float low, float high) { return host::pair(host::to_bf16(low), host::to_bf16(high)); }
KLDIV_DEVICE uint32_t pack_f16x2(float low, float high) { return host::pair(host::to_f16(low), host::to_f16(high)); }
KLDIV_DEVICE uint32_t pack_finite_f16x2(float low, float high) {
    const auto finite = [](float x) { return x < -65504.0f ? -65504.0f : (x > 65504.0f ? 65504.0f : x); };
    return pack_f16x2(finite(low), finite(high));
}
KLDIV_DEVICE uint32_t max_u16x2(uint32_t a, uint32_t b, uint32_t c) {
    using namespace host;
    return pair(std::max({low(a), low(b), low(c)}), std::max({high(a), high(b), high(c)}));
}
KLDIV_DEVICE void unpack_f16x2(uint32_t both, float* low, float* high) {
    *low = host::from_f16(host::low(both));
    *high = host::from_f16(host::high(both));
}

// --- warps and blocks: barriers.cpp ----------------------------------------------------------------------------------
KLDIV_DEVICE float shuffle_xor(float x, int lanes) { return bits_float(host::shuffle_xor(float_bits(x), lanes)); }
KLDIV_DEVICE int shuffle_xor(int x, int lanes) {
    return static_cast<int>(host::shuffle_xor(static_cast<uint32_t>(x), lanes));
}
KLDIV_DEVICE double shuffle_xor(double x, int lanes) {
    uint32_t halves[2];
    std::memcpy(halves, &x, sizeof x);
    for (uint32_t& half : halves) half = host::shuffle_xor(half, lanes);
    std::memcpy(&x, halves, sizeof x);
    return x;
}
KLDIV_DEVICE bool any_lane(bool so) {
    uint32_t any = so;
    for (int lanes = 16; lanes > 0; lanes /= 2) any |= host::shuffle_xor(any, lanes);
    return any != 0;
}
void warp_sync();
void block_sync(int id, int threads);
KLDIV_DEVICE uint32_t shared_or(uint32_t* word, uint32_t bits) {
    host::perhaps_pause(1);
    const uint32_t before = *word;
    *word |= bits;
    return before;
}

// --- global memory ---------------------------------------------------------------------------------------------------
struct Words {
    uint32_t w[4];
};
KLDIV_DEVICE Words load_words(const void* from) {
    if (reinterpret_cast<uintptr_t>(from) % 16) host::fail("load_words: the address is not a multiple of 16");
    host::perhaps_pause(1);
    Words x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
KLDIV_DEVICE void store_words(void* to, const Words& x) {
    if (reinterpret_cast<uintptr_t>(to) % 16) host::fail("store_words: the address is not a multiple of 16");
    host::perhaps_pause(1);
    std::memcpy(to, &x, sizeof x);
}

// --- clusters, mbarriers: barriers.cpp; bulk copies: copies.cpp ------------------------------------------------------
uint32_t cluster_rank();
void cluster_sync();
void mbarrier_init(uint64_t* barrier, uint32_t arrivals);
void mbarrier_arrive(uint64_t* barrier);
void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes);
void mbarrier_wait(uint64_t* barrier, uint32_t parity);
KLDIV_DEVICE void mbarrier_wait_cluster(uint64_t* barrier, uint32_t parity) { mbarrier_wait(barrier, parity); }
void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier);
void bulk_store(void* global, const void* shared, uint32_t bytes);
void bulk_wait_read();
void store_async(void* to, uint64_t* barrier, uint32_t rank, const Words& x);
void fence_mbarrier_init();
void fence_async_proxy();
void fence_cluster();

}  // namespace kldiv::gpu
