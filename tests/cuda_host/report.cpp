// Where the threads of a cluster wait, for the error of one that cannot go on.
#include "cluster.h"

namespace kldiv::gpu::host {
namespace {

constexpr int kMostGroups = 24;

std::string place(const Fiber& fiber) {
    const auto of = [](int64_t part, int64_t whole) { return std::to_string(part) + " of " + std::to_string(whole); };
    switch (fiber.wait) {
        case Wait::none:
            return "can run";
        case Wait::ended:
            return "have ended";
        case Wait::warp:
            return std::string(fiber.warp->lanes < 0 ? "warp_sync" : "shuffle_xor") + ", " +
                   of(fiber.warp->arrived, kWarp) + " lanes there";
        case Wait::block: {
            const NamedBarrier& barrier = fiber.cta->named[fiber.where];
            return "block_sync " + std::to_string(fiber.where) + ", " + of(barrier.arrived, barrier.threads) +
                   " threads there";
        }
        case Wait::cluster:
            return "cluster_sync, " + of(machine.cluster_arrived, machine.cluster * machine.threads) + " threads there";
        case Wait::stores:
            return "bulk_wait_read";
        case Wait::mbarrier:
            break;
    }
    for (const Mbarrier& barrier : fiber.cta->mbarriers)
        if (barrier.offset == fiber.where)
            return "mbarrier_wait at shared memory + " + std::to_string(fiber.where) + " for parity " +
                   std::to_string(fiber.parity) + " (phase " + std::to_string(barrier.phase) + ", " +
                   of(barrier.pending, barrier.arrivals) + " arrivals and " + std::to_string(barrier.bytes) +
                   " bytes to come)";
    return "mbarrier_wait";
}

}  // namespace

std::string waiting_threads() {
    std::string report;
    int groups = 0;
    for (const Cta& cta : machine.ctas) {
        const Fiber* const fibers = &machine.fibers[cta.rank * static_cast<size_t>(machine.threads)];
        for (int first = 0, last; first < machine.threads; first = last) {
            const std::string there = place(fibers[first]);
            last = first + 1;
            while (last < machine.threads && place(fibers[last]) == there) ++last;
            if (++groups > kMostGroups) return report + "\n  ...";
            report += "\n  CTA " + std::to_string(cta.block) + ", threads " + std::to_string(first) + " to " +
                      std::to_string(last - 1) + ": " + there;
        }
    }
    return report;
}

}  // namespace kldiv::gpu::host
