// Everything the kernels ask of the machine beyond C++: one small function an instruction.
//
// tests/cuda_host/ptx.h is a second implementation, under KLDIV_CUDA_HOST: threads are fibers of the host, so that the
// kernels' own source runs, under sanitizers and in any order of threads, where there is no GPU. What that model cannot
// show is said at the function; it is left to compute-sanitizer's racecheck on a GPU.
//
// mbarriers and exchange buffers are named by their generic address in this CTA's shared memory; a peer's is the same
// address in the peer (`store_async`).
#pragma once

#ifdef KLDIV_CUDA_HOST
#include "ptx.h"
#else

#include <cuda_fp16.h>
#include <stdint.h>

#define KLDIV_DEVICE __device__ __forceinline__
#define KLDIV_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace kldiv::gpu {

// --- where a thread is -----------------------------------------------------------------------------------------------
KLDIV_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
KLDIV_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
KLDIV_DEVICE int64_t block_index() { return blockIdx.x; }
KLDIV_DEVICE int64_t grid_blocks() { return gridDim.x; }
KLDIV_DEVICE char* shared_memory() {
    extern __shared__ __align__(128) char kldiv_shared_memory[];
    return kldiv_shared_memory;
}
KLDIV_DEVICE uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- arithmetic ------------------------------------------------------------------------------------------------------
// 2^x, relative error 2^-22; 0 below the normal range.
KLDIV_DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// log2 x to 2^-22, absolute between 1/2 and 2 and relative elsewhere.
KLDIV_DEVICE float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
KLDIV_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
KLDIV_DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }
// x, of which the compiler knows nothing: so it does not compute ahead of a branch what all of them have in common, for
// which registers would not do.
KLDIV_DEVICE float opaque(float x) {
    asm volatile("" : "+f"(x));
    return x;
}
// Two bfloat16 (float16) in a word, the first in the low half. max: NaN where either is; min: the other one.
KLDIV_DEVICE uint32_t max_bf16x2(uint32_t a, uint32_t b) {
    asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
    return a;
}
KLDIV_DEVICE uint32_t min_bf16x2(uint32_t a, uint32_t b) {
    asm("min.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
    return a;
}
KLDIV_DEVICE uint32_t max_f16x2(uint32_t a, uint32_t b) {
    asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
    return a;
}
KLDIV_DEVICE uint32_t min_f16x2(uint32_t a, uint32_t b) {
    asm("min.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
    return a;
}
KLDIV_DEVICE uint32_t pack_bf16x2(float low, float high) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
KLDIV_DEVICE uint32_t pack_f16x2(float low, float high) {
    uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
// The same, beyond float16's range its largest numbers.
KLDIV_DEVICE uint32_t pack_finite_f16x2(float low, float high) {
    uint32_t both;
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
KLDIV_DEVICE void unpack_f16x2(uint32_t both, float* low, float* high) {
    const float2 floats = __half22float2(*reinterpret_cast<const __half2*>(&both));
    *low = floats.x;
    *high = floats.y;
}

// --- warps and blocks ------------------------------------------------------------------------------------------------
KLDIV_DEVICE float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }
KLDIV_DEVICE double shuffle_xor(double x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }
KLDIV_DEVICE int shuffle_xor(int x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }
// Lanes of the warp wait for each other and see each other's memory.
KLDIV_DEVICE void warp_sync() { __syncwarp(); }
// Whether it is so in some lane of the warp.
KLDIV_DEVICE bool any_lane(bool so) { return __any_sync(0xffffffffu, so) != 0; }
// `threads` threads, whole warps, meet at barrier `id` (0 to 15) of their block.
KLDIV_DEVICE void block_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Sets bits of a word in shared memory that other threads set bits of, too; what it was before.
KLDIV_DEVICE uint32_t shared_or(uint32_t* word, uint32_t bits) {
    uint32_t before;
    asm volatile("atom.shared.or.b32 %0, [%1], %2;" : "=r"(before) : "r"(shared_address(word)), "r"(bits) : "memory");
    return before;
}

// --- global memory ---------------------------------------------------------------------------------------------------
struct alignas(16) Words {
    uint32_t w[4];
};
// 16 aligned bytes that no one writes meanwhile.
KLDIV_DEVICE Words load_words(const void* from) {
    Words x;
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(x.w[0]), "=r"(x.w[1]), "=r"(x.w[2]), "=r"(x.w[3])
        : "l"(from));
    return x;
}
// 16 aligned bytes that this kernel does not read again.
KLDIV_DEVICE void store_words(void* to, const Words& x) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.w[0]), "r"(x.w[1]), "r"(x.w[2]),
                 "r"(x.w[3])
                 : "memory");
}

// --- clusters, mbarriers, bulk copies: sm_90 and later ---------------------------------------------------------------
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// The largest of three, as unsigned numbers, in each half of a word: an instruction from sm_90 on.
KLDIV_DEVICE uint32_t max_u16x2(uint32_t a, uint32_t b, uint32_t c) { return __vimax3_u16x2(a, b, c); }
KLDIV_DEVICE uint32_t cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// All threads of the cluster meet; what was written before is seen after.
KLDIV_DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
KLDIV_DEVICE void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// After mbarrier_init and before cluster_sync: peers and the copy engine see the barrier. The host model has one order
// of memory and cannot show its absence.
KLDIV_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
KLDIV_DEVICE void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and lets the phase wait for so many bytes more.
KLDIV_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// Until the phase of that parity (0 for the first, then alternating) has completed; what this CTA's threads and copies
// wrote before it is seen then.
KLDIV_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}
// The same where other CTAs of the cluster wrote (`store_async`). Such a wait also empties the first-level cache. The
// host model has one order of memory and takes both for one.
KLDIV_DEVICE void mbarrier_wait_cluster(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}
// A multiple of 16 aligned bytes into this CTA's shared memory; completes `bytes` on the barrier.
KLDIV_DEVICE void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}
KLDIV_DEVICE void bulk_store(void* global, const void* shared, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
                 "r"(shared_address(shared)), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until this thread's bulk stores have read their shared memory.
KLDIV_DEVICE void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// Between this thread's writes to shared memory and a bulk copy of them. The host model has one order of memory and
// cannot show its absence.
KLDIV_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Between this thread's reads of memory and a `store_async` that lets a peer write there. The host model has one order
// of memory and cannot show its absence.
KLDIV_DEVICE void fence_cluster() { asm volatile("fence.acq_rel.cluster;" ::: "memory"); }
// 16 bytes to the address `to` in the shared memory of CTA `rank`, completing them on the barrier at that address
// there.
KLDIV_DEVICE void store_async(void* to, uint64_t* barrier, uint32_t rank, const Words& x) {
    uint32_t remote, remote_barrier;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(to)), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote_barrier) : "r"(shared_address(barrier)), "r"(rank));
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(remote),
        "r"(x.w[0]), "r"(x.w[1]), "r"(x.w[2]), "r"(x.w[3]), "r"(remote_barrier)
        : "memory");
}
#endif

}  // namespace kldiv::gpu
#endif
