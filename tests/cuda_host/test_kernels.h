// Kernels of machine_test.cpp that use several parts of the machine together, each with what may be left out of it.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/machine/ptx.cuh"
#include "cuda/machine/runtime.cuh"

namespace kldiv::gpu {

template <class Arguments>
void start(Kernel<Arguments> kernel, const LaunchShape& shape, const Arguments& arguments) {
    active_clusters<Arguments>(kernel, shape);
    launch<Arguments>(kernel, shape, nullptr, arguments, [] { return "a test"; });
}

// --- warps and named barriers ----------------------------------------------------------------------------------------
struct Sums {
    float* out;
    int rounds;
    bool sync;
};

KLDIV_KERNEL(128, 1) warp_sums(Sums a) {
    float sum = 0;
    for (int round = 0; round < a.rounds; ++round) {
        float x = static_cast<float>(thread_index() + round);
        for (int lanes = 16; lanes; lanes /= 2) x += shuffle_xor(x, lanes);
        sum += x + static_cast<float>(shuffle_xor(thread_index(), 5) ^ thread_index());
    }
    a.out[block_index() * block_threads() + thread_index()] = sum;
}

inline bool warps() {
    std::vector<float> out(3 * 128);
    start(warp_sums, {3, 128, 1, 0}, Sums{out.data(), 20, true});
    for (size_t i = 0; i < out.size(); ++i) {
        const auto warp = static_cast<float>(i % 128 / 32);
        if (out[i] != 20 * (32 * 32 * warp + 496 + 5) + 32 * 190) return false;
    }
    return true;
}

// Each half of the block turns its numbers round, at a barrier of its own.
KLDIV_KERNEL(128, 1) halves_turned(Sums a) {
    auto* numbers = reinterpret_cast<float*>(shared_memory());
    const int half = thread_index() / 64, here = thread_index() % 64;
    numbers[thread_index()] = static_cast<float>(thread_index());
    for (int round = 0; round < a.rounds; ++round) {
        if (a.sync) block_sync(1 + half, 64);
        const float x = numbers[half * 64 + 63 - here];
        if (a.sync) block_sync(1 + half, 64);
        (void)shuffle_xor(x, 1);
        numbers[thread_index()] = x;
    }
    block_sync(0, 128);
    a.out[thread_index()] = numbers[thread_index()];
}

inline bool halves(bool sync) {
    std::vector<float> out(128);
    start(halves_turned, {1, 128, 1, 512}, Sums{out.data(), 7, sync});
    for (int i = 0; i < 128; ++i)
        if (out[static_cast<size_t>(i)] != static_cast<float>(i / 64 * 64 + 63 - i % 64)) return false;
    return true;
}

// --- a ring of stages, as the one-read kernel has --------------------------------------------------------------------
enum Omit { nothing, full_wait, empty_wait, arrival, read_wait, last_read_wait, load };

struct Ring {
    const float* in;
    float* out;
    int chunks;
    Omit omit;
};
constexpr int kStages = 2, kChunk = 64;

// One warp loads chunks of the row; two double them in place, and one of those stores them.
KLDIV_KERNEL(96, 1) doubled(Ring a) {
    auto* full = reinterpret_cast<uint64_t*>(shared_memory());
    uint64_t* empty = full + kStages;
    auto* slots = reinterpret_cast<float*>(shared_memory() + 128);
    if (thread_index() == 0)
        for (int i = 0; i < kStages; ++i) mbarrier_init(full + i, 1), mbarrier_init(empty + i, 1);
    fence_mbarrier_init();
    block_sync(0, 96);
    for (int chunk = 0; chunk < a.chunks; ++chunk) {
        const int stage = chunk % kStages;
        const auto parity = static_cast<uint32_t>(chunk / kStages & 1);
        float* slot = slots + stage * kChunk;
        if (thread_index() >= 64) {
            if (thread_index() > 64) continue;
            if (a.omit != empty_wait) mbarrier_wait(empty + stage, parity ^ 1);
            mbarrier_arrive_expect(full + stage, kChunk * 4);
            if (a.omit == load && chunk == a.chunks - 1) continue;
            bulk_load(slot, a.in + chunk * kChunk, kChunk * 4, full + stage);
            continue;
        }
        if (a.omit != full_wait) mbarrier_wait(full + stage, parity);
        slot[thread_index()] *= 2;
        fence_async_proxy();
        block_sync(1, 64);
        if (thread_index() != 0) continue;
        bulk_store(a.out + chunk * kChunk, slot, kChunk * 4);
        if (a.omit != read_wait && !(a.omit == last_read_wait && chunk == a.chunks - 1)) bulk_wait_read();
        if (a.omit != arrival) mbarrier_arrive(empty + stage);
    }
    if (thread_index() == 0 && a.omit == read_wait) bulk_wait_read();
}

inline bool ring(Omit omit) {
    constexpr int chunks = 9;
    std::vector<float> in(chunks * kChunk), storage(in.size() + 4, -1);
    auto* const out = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(storage.data()) + 15) / 16 * 16);
    for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i);
    start(doubled, {1, 96, 1, 128 + kStages * kChunk * 4}, Ring{in.data(), out, chunks, omit});
    for (size_t i = 0; i < in.size(); ++i)
        if (out[i] != 2 * in[i]) return false;
    return true;
}

// --- clusters --------------------------------------------------------------------------------------------------------
enum Without { none, first_sync, wait, expectation };

struct Exchange {
    float* out;
    int cluster, rounds;
    Without without;
};

// Every CTA sends its number to all; each adds them up in the order of ranks. Two barriers take turns, because a peer
// that is one round ahead sends before others have.
KLDIV_KERNEL(32, 1) cluster_sums(Exchange a) {
    auto* barriers = reinterpret_cast<uint64_t*>(shared_memory());
    auto* received = reinterpret_cast<Words*>(shared_memory() + 16);
    const uint32_t rank = cluster_rank();
    if (thread_index() == 0) mbarrier_init(barriers, 1), mbarrier_init(barriers + 1, 1);
    fence_mbarrier_init();
    a.without != first_sync ? cluster_sync() : warp_sync();
    float total = 0;
    for (int round = 0; round < a.rounds; ++round) {
        Words* const slots = received + round % 2 * a.cluster;
        uint64_t* const barrier = barriers + round % 2;
        if (thread_index() == 0 && a.without != expectation)
            mbarrier_arrive_expect(barrier, static_cast<uint32_t>(a.cluster) * 16);
        if (thread_index() < a.cluster) {
            const uint32_t x = float_bits(static_cast<float>(block_index() + round));
            store_async(slots + rank, barrier, static_cast<uint32_t>(thread_index()), {{x, x, x, x}});
        }
        if (a.without != wait) mbarrier_wait(barrier, round / 2 & 1);
        for (int i = 0; i < a.cluster; ++i) total += bits_float(slots[i].w[3]);
        warp_sync();
    }
    if (thread_index() == 7) a.out[block_index()] = total;
}

inline bool exchange(int cluster, Without without = none) {
    std::vector<float> out(static_cast<size_t>(3 * cluster));
    start(cluster_sums, {3 * cluster, 32, cluster, 16 + 32 * cluster}, Exchange{out.data(), cluster, 5, without});
    for (int i = 0; i < 3 * cluster; ++i) {
        float total = 0;
        for (int round = 0; round < 5; ++round)
            for (int rank = 0; rank < cluster; ++rank)
                total += static_cast<float>(i / cluster * cluster + rank + round);
        if (out[static_cast<size_t>(i)] != total) return false;
    }
    return true;
}

}  // namespace kldiv::gpu
