// Launches: which thread runs next, and the life of a cluster.
#include "machine.h"

#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <mutex>
#include <new>
#include <numeric>
#include <stdexcept>

#include "cluster.h"
#include "device.h"

namespace kldiv::gpu::host {

Thread* current = nullptr;
int patience = 0;
Machine machine;

namespace {

constexpr uint64_t kMostSteps = 200'000'000;
constexpr int kPatienceInTurn = 4096;
// Bytes behind a CTA's shared memory that must stay as they are; AddressSanitizer watches better.
#ifdef KLDIV_HOST_ASAN
constexpr int64_t kFence = 0;
#else
constexpr int64_t kFence = 128;
#endif
constexpr int kFenceByte = 0xa5, kPoison = 0xff;

uint64_t environment(const char* name, uint64_t otherwise) {
    const char* text = std::getenv(name);
    return text == nullptr || *text == 0 ? otherwise : std::strtoull(text, nullptr, 10);
}

void release_held() {
    for (Fiber* fiber : machine.held) machine.ready.push(fiber);
    machine.held.clear();
    machine.held_warp = nullptr;
    machine.held_cta = nullptr;
}

// For a while nobody waits, or the threads of one warp or CTA do, whatever the others get to meanwhile.
void choose_held() {
    release_held();
    const uint64_t choice = machine.random.below(8);
    machine.hold_until = machine.steps + (16ull << machine.random.below(11));
    if (choice < 3) machine.held_warp = &machine.warps[machine.random.below(machine.warps.size())];
    if (choice == 3) machine.held_cta = &machine.ctas[machine.random.below(machine.ctas.size())];
}

Fiber* take() {
    Ready& ready = machine.ready;
    if (machine.in_turn) return ready.first();
    switch (machine.order) {
        case Machine::Order::any:
            break;
        case Machine::Order::mostly_first:
            if (machine.random.below(16) != 0) return ready.first();
            break;
        case Machine::Order::mostly_last:
            if (machine.random.below(16) != 0) return ready.last();
            break;
    }
    return ready.any(machine.random.below(ready.size()));
}

Fiber* next() {
    for (;;) {
        if (++machine.steps > machine.most_steps) fail("no end after " + std::to_string(machine.most_steps) + " steps");
        if (!machine.pieces.empty() && machine.copies_every != 0 && machine.random.below(machine.copies_every) == 0)
            advance_copies();
        if (!machine.in_turn && machine.steps >= machine.hold_until) choose_held();
        if (machine.ready.empty()) {
            if (!machine.held.empty() && (machine.pieces.empty() || machine.random.below(4) == 0))
                release_held();
            else if (!machine.pieces.empty())
                advance_copies();
            else
                fail("deadlock: " + waiting_threads());
            continue;
        }
        Fiber* fiber = take();
        if (fiber->warp == machine.held_warp || fiber->cta == machine.held_cta) {
            machine.held.push_back(fiber);
            continue;
        }
        return fiber;
    }
}

void give_way() {
    Fiber* const from = static_cast<Fiber*>(current);
    Fiber* const to = next();
    if (to == from) return;
    current = to;
    change(&from->context, &to->context);
}

void end_cta(Cta* cta) {
    end_copies(*cta);
    for (int64_t i = 0; i < kFence; ++i)
        if (static_cast<unsigned char>(cta->shared[machine.shared_bytes + i]) != kFenceByte)
            fail("CTA " + std::to_string(cta->block) + " wrote behind its shared memory");
}

void thread_main() {
    arrived();
    Fiber& fiber = self();
    Fiber* to = nullptr;
    // No fiber is left while it handles an exception: the C++ runtime keeps those by the thread of the host.
    try {
        machine.entry(machine.argument);
        if (fiber.unwaited) fail("a thread has ended without bulk_wait_read after its bulk_store");
        fiber.wait = Wait::ended;
        if (--fiber.cta->live == 0) end_cta(fiber.cta);
        if (--machine.live > 0) to = next();
    } catch (const std::exception& error) {
        machine.error =
            "thread " + std::to_string(fiber.index) + " of CTA " + std::to_string(fiber.block) + ": " + error.what();
    }
    current = to;
    leave(&fiber.context, to == nullptr ? &machine.caller : &to->context);
}

void start_cta(int rank, int64_t block, int64_t blocks) {
    Cta& cta = machine.ctas[static_cast<size_t>(rank)];
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, static_cast<size_t>(machine.shared_bytes + kFence)) != 0) throw std::bad_alloc();
    cta.shared = static_cast<char*>(memory);
    std::memset(cta.shared, kPoison, static_cast<size_t>(machine.shared_bytes));
    std::memset(cta.shared + machine.shared_bytes, kFenceByte, kFence);
    cta.rank = static_cast<uint32_t>(rank);
    cta.block = block;
    cta.live = machine.threads;
    for (int i = 0; i < machine.threads; ++i) {
        const size_t slot = static_cast<size_t>(rank * machine.threads + i);
        Fiber& fiber = machine.fibers[slot];
        static_cast<Thread&>(fiber) = {i, machine.threads, block, blocks, cta.shared};
        fiber.cta = &cta;
        fiber.warp = &machine.warps[slot / kWarp];
        fiber.lane = i % kWarp;
        fiber.wait = Wait::none;
        fiber.unread = 0;
        fiber.unwaited = fiber.met_cluster = false;
        if (fiber.lane == 0) {
            fiber.warp->arrived = fiber.warp->turn = 0;
            fiber.warp->first = &fiber;
        }
        prepare(&fiber.context, slot, thread_main);
        machine.ready.push(&fiber);
    }
}

void end_cluster() {
    for (Cta& cta : machine.ctas) {
        std::free(cta.shared);
        cta = Cta{};
    }
    machine.cluster_arrived = 0;
    machine.cluster_waiting = {};
}

void run_cluster(int64_t first_block, int64_t blocks) {
    for (int rank = 0; rank < machine.cluster; ++rank) start_cta(rank, first_block + rank, blocks);
    machine.live = machine.cluster * machine.threads;
    Fiber* const first = next();
    current = first;
    change(&machine.caller, &first->context);
    current = nullptr;
    if (!machine.error.empty()) throw std::runtime_error(machine.error);
    end_cluster();
}

void choose_order(const LaunchShape& shape, const std::string& what) {
    const uint64_t seed = environment("KLDIV_HOST_SEED", 0);
    // The same for a launch whatever was launched before.
    machine.random.seed(seed * 0x2545f4914f6cdd1d + std::hash<std::string>()(what) +
                        static_cast<uint64_t>(shape.blocks) + static_cast<uint64_t>(shape.threads) * 1000003 +
                        static_cast<uint64_t>(shape.shared_bytes) * 31);
    machine.in_turn = seed == 0;
    machine.order = static_cast<Machine::Order>(machine.random.below(3));
    const uint64_t rates[] = {0, 1, 4, 64, 1024};
    machine.copies_every = machine.in_turn ? 16 : rates[machine.random.below(5)];
    machine.most_patience = 64 << 4 * machine.random.below(3);
    patience = machine.in_turn ? kPatienceInTurn : machine.most_patience;
    machine.hold_until = 0;
}

struct Clean {
    ~Clean() {
        if (!machine.error.empty()) clean_stacks();
        current = nullptr;
        end_cluster();
        machine.pieces.clear();
        machine.held.clear();
        machine.held_warp = nullptr;
        machine.held_cta = nullptr;
    }
};

}  // namespace

void Machine::wake(Queue* queue) {
    for (Fiber* fiber = queue->first; fiber != nullptr;) {
        Fiber* const following = fiber->next;
        wake(fiber);
        fiber = following;
    }
    *queue = {};
}

void Machine::block(Wait wait, int64_t where, int64_t parity) {
    Fiber& fiber = self();
    fiber.wait = wait;
    fiber.where = where;
    fiber.parity = parity;
    give_way();
}

void pause() {
    patience = machine.in_turn
                   ? kPatienceInTurn
                   : static_cast<int>(machine.random.below(2 * static_cast<uint64_t>(machine.most_patience)));
    machine.ready.push(&self());
    give_way();
}

void fail(const std::string& message) { throw std::runtime_error(message); }

void run(const void* kernel, const LaunchShape& shape, Entry entry, const void* argument, const std::string& what) {
    static std::mutex lock;
    const std::lock_guard<std::mutex> guard(lock);
    const std::string refusal = why_not_launched(kernel, shape);
    if (!refusal.empty()) throw std::runtime_error("kldiv_kernels: " + what + ": " + refusal);
    const Clean clean;
    machine.capability = device_info().capability;
    machine.cluster = shape.cluster;
    machine.threads = shape.threads;
    machine.shared_bytes = shape.shared_bytes;
    machine.entry = entry;
    machine.argument = argument;
    machine.error.clear();
    machine.steps = 0;
    machine.most_steps = environment("KLDIV_HOST_STEPS", kMostSteps);
    const auto fibers = static_cast<size_t>(shape.cluster * shape.threads);
    if (machine.fibers.size() < fibers) machine.fibers = std::vector<Fiber>(fibers);
    machine.warps.resize(fibers / kWarp);
    machine.ctas.resize(static_cast<size_t>(shape.cluster));
    machine.ready.reserve(fibers);
    choose_order(shape, what);
    std::vector<int64_t> order(static_cast<size_t>(shape.blocks / shape.cluster));
    std::iota(order.begin(), order.end(), int64_t{0});
    if (!machine.in_turn)
        for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[machine.random.below(i)]);
    try {
        for (const int64_t cluster : order) run_cluster(cluster * shape.cluster, shape.blocks);
        flush_copies();
    } catch (const std::runtime_error& error) {
        throw std::runtime_error("kldiv_kernels: " + what + ": " + error.what());
    }
}

}  // namespace kldiv::gpu::host
