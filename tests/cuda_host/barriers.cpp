// Where threads meet: warps, named barriers, the cluster's barrier, mbarriers.
#include "cluster.h"

#include "cuda/machine/ptx.cuh"

namespace kldiv::gpu {
namespace host {
namespace {

constexpr int kSync = -1;  // in place of a shuffle's lanes
constexpr uint64_t kLive = 0x6d626172;
constexpr uint32_t kMostArrivals = (1 << 20) - 1;
constexpr int64_t kMostBytes = (1 << 20) - 1;

uint32_t meet(uint32_t value, int lanes) {
    Fiber& fiber = self();
    Warp& warp = *fiber.warp;
    if (warp.arrived == 0) warp.lanes = lanes;
    if (warp.lanes != lanes)
        fail("lanes of a warp are at different calls: " + std::string(lanes == kSync ? "warp_sync" : "shuffle_xor") +
             " and " + (warp.lanes == kSync ? "warp_sync" : "shuffle_xor by " + std::to_string(warp.lanes)));
    const int turn = warp.turn;
    warp.values[turn][fiber.lane] = value;
    if (++warp.arrived == kWarp) {
        warp.arrived = 0;
        warp.turn ^= 1;
        for (int lane = 0; lane < kWarp; ++lane)
            if (lane != fiber.lane) machine.wake(warp.first + lane);
        perhaps_pause(16);
    } else {
        machine.block(Wait::warp);
    }
    return lanes == kSync ? 0 : warp.values[turn][fiber.lane ^ lanes];
}

// The barrier's word says which of the CTA's mbarriers it is, so that one that was overwritten is known.
Mbarrier& mbarrier(const char* what, Cta* cta, const uint64_t* word) {
    const size_t index = *word & 0xffffffff;
    if (*word >> 32 != kLive || index >= cta->mbarriers.size() ||
        cta->mbarriers[index].offset != reinterpret_cast<const char*>(word) - cta->shared)
        fail(std::string(what) + ": no initialised mbarrier at shared memory + " +
             std::to_string(reinterpret_cast<const char*>(word) - cta->shared));
    return cta->mbarriers[index];
}

Mbarrier& own_mbarrier(const char* what, const uint64_t* word) {
    need_clusters(what);
    shared_offset(what, word, 8, 8);
    return mbarrier(what, self().cta, word);
}

void perhaps_complete(Mbarrier* barrier) {
    if (barrier->pending != 0 || barrier->bytes != 0) return;
    ++barrier->phase;
    barrier->pending = barrier->arrivals;
    machine.wake(&barrier->waiting);
}

void arrive(const char* what, uint64_t* word, uint32_t bytes) {
    Mbarrier& barrier = own_mbarrier(what, word);
    if (barrier.pending == 0)
        fail(std::string(what) + ": more than the " + std::to_string(barrier.arrivals) +
             " arrivals of the mbarrier at " + std::to_string(barrier.offset));
    barrier.bytes += bytes;
    if (barrier.bytes > kMostBytes) fail(std::string(what) + ": an mbarrier cannot wait for 2^20 bytes or more");
    --barrier.pending;
    perhaps_complete(&barrier);
    perhaps_pause(16);
}

}  // namespace

uint32_t shuffle_xor(uint32_t bits, int lanes) {
    if (lanes < 0 || lanes >= kWarp) fail("shuffle_xor: a warp has no lane " + std::to_string(lanes));
    return meet(bits, lanes);
}

void require_mbarrier(const char* what, Cta* cta, uint64_t* barrier) { mbarrier(what, cta, barrier); }

void complete_bytes(Cta* cta, uint64_t* word, uint32_t bytes) {
    Mbarrier& barrier = mbarrier("complete_tx", cta, word);
    barrier.bytes -= bytes;
    if (barrier.bytes < -kMostBytes) fail("2^20 bytes or more arrived at an mbarrier that does not expect them");
    perhaps_complete(&barrier);
}

}  // namespace host

using namespace host;

void warp_sync() { meet(0, kSync); }

void block_sync(int id, int threads) {
    Fiber& fiber = self();
    if (id < 0 || id > 15) fail("block_sync: there is no barrier " + std::to_string(id));
    if (threads <= 0 || threads % kWarp || threads > fiber.block_threads)
        fail("block_sync: " + std::to_string(threads) + " is no number of whole warps of the block");
    NamedBarrier& barrier = fiber.cta->named[id];
    if (barrier.arrived == 0) barrier.threads = threads;
    if (barrier.threads != threads)
        fail("block_sync: barrier " + std::to_string(id) + " is waited for with " + std::to_string(threads) +
             " threads and with " + std::to_string(barrier.threads));
    ++barrier.of_warp[fiber.index / kWarp];
    if (++barrier.arrived < threads) {
        barrier.waiting.push(&fiber);
        return machine.block(Wait::block, id);
    }
    for (uint8_t& lanes : barrier.of_warp) {
        if (lanes % kWarp) fail("block_sync: more than " + std::to_string(threads) + " threads, or a part of a warp");
        lanes = 0;
    }
    barrier.arrived = 0;
    machine.wake(&barrier.waiting);
    perhaps_pause(16);
}

uint32_t cluster_rank() {
    need_clusters("cluster_rank");
    return self().cta->rank;
}

// All threads of the cluster, those that have ended included: the hardware would not wait for those.
void cluster_sync() {
    need_clusters("cluster_sync");
    Fiber& fiber = self();
    fiber.met_cluster = true;
    if (++machine.cluster_arrived < machine.cluster * machine.threads) {
        machine.cluster_waiting.push(&fiber);
        return machine.block(Wait::cluster);
    }
    machine.cluster_arrived = 0;
    machine.wake(&machine.cluster_waiting);
    perhaps_pause(16);
}

void mbarrier_init(uint64_t* word, uint32_t arrivals) {
    need_clusters("mbarrier_init");
    const int64_t offset = shared_offset("mbarrier_init", word, 8, 8);
    if (arrivals < 1 || arrivals > kMostArrivals)
        fail("mbarrier_init: an mbarrier cannot wait for " + std::to_string(arrivals) + " arrivals");
    std::vector<Mbarrier>& all = self().cta->mbarriers;
    for (const Mbarrier& other : all)
        if (other.offset == offset) fail("mbarrier_init: twice, at shared memory + " + std::to_string(offset));
    *word = kLive << 32 | all.size();
    all.emplace_back();
    all.back().offset = offset;
    all.back().arrivals = all.back().pending = arrivals;
    perhaps_pause(16);
}

void mbarrier_arrive(uint64_t* barrier) { arrive("mbarrier_arrive", barrier, 0); }
void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) { arrive("mbarrier_arrive_expect", barrier, bytes); }

void mbarrier_wait(uint64_t* word, uint32_t parity) {
    if (parity > 1) fail("mbarrier_wait: parity " + std::to_string(parity));
    // The hardware's test may come as late as the thread does: one that is late by a whole phase waits for the next.
    while ((own_mbarrier("mbarrier_wait", word).phase & 1) == parity) {
        Mbarrier& barrier = own_mbarrier("mbarrier_wait", word);
        barrier.waiting.push(&self());
        machine.block(Wait::mbarrier, barrier.offset, parity);
    }
    perhaps_pause(16);
}

void fence_mbarrier_init() { need_clusters("fence_mbarrier_init"); }
void fence_async_proxy() { need_clusters("fence_async_proxy"); }
void fence_cluster() { need_clusters("fence_cluster"); }

}  // namespace kldiv::gpu
