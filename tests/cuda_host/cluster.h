// What the machine keeps of the cluster that runs. For the files of this folder alone.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "machine.h"

#include "cuda/machine/runtime.cuh"

namespace kldiv::gpu::host {

constexpr int kWarp = 32;

enum class Wait : uint8_t { none, warp, block, cluster, mbarrier, stores, ended };

struct Cta;
struct Warp;

struct Fiber : Thread {
    Context context;
    Cta* cta = nullptr;
    Warp* warp = nullptr;
    int lane = 0;
    Wait wait = Wait::none;
    int64_t where = 0, parity = 0;  // which barrier, for reports
    Fiber* next = nullptr;          // behind it in a Queue
    int unread = 0;                 // pieces of its bulk stores that have yet to read shared memory
    bool unwaited = false;          // it issued bulk stores and has not waited for them
    bool met_cluster = false;
};

struct Queue {
    Fiber *first = nullptr, *last = nullptr;

    void push(Fiber* fiber) {
        (first == nullptr ? first : last->next) = fiber;
        last = fiber;
        fiber->next = nullptr;
    }
};

struct Warp {
    // Lanes may be one shuffle ahead of those that have yet to take their value.
    uint32_t values[2][kWarp];
    int turn = 0, arrived = 0, lanes = 0;
    Fiber* first = nullptr;
};

struct NamedBarrier {
    int threads = 0, arrived = 0;
    uint8_t of_warp[kWarp] = {};
    Queue waiting;
};

struct Mbarrier {
    int64_t offset = 0;
    uint32_t arrivals = 0, pending = 0;
    int64_t bytes = 0;  // negative while bytes have completed that were not yet expected
    uint64_t phase = 0;
    Queue waiting;
};

// Shared memory that a bulk store reads, until the thread that issued it has waited.
struct Reading {
    const Fiber* issuer;
    const char* shared;
    uint32_t bytes;
};

struct Cta {
    uint32_t rank = 0;
    int64_t block = 0;
    char* shared = nullptr;
    int live = 0;
    int copies = 0;  // pieces that will yet read or write its shared memory
    NamedBarrier named[16];
    std::vector<Mbarrier> mbarriers;
    std::vector<Reading> readings;
};

// A part of an asynchronous copy. A store is two: shared memory is read, and later global memory is written.
struct Piece {
    enum Kind : uint8_t { load, words, read, write } kind;
    Cta* cta;
    char* shared;
    char* global;
    uint32_t bytes;
    uint64_t* barrier;
    Fiber* issuer;
    std::vector<char> data;
};

class Random {
  public:
    void seed(uint64_t seed) { state_ = seed; }
    uint64_t operator()() {  // splitmix64
        uint64_t z = state_ += 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        return z ^ z >> 31;
    }
    uint64_t below(uint64_t limit) { return ((*this)() >> 32) * limit >> 32; }

  private:
    uint64_t state_ = 0;
};

// Fibers that can run. In a ring, from which one is taken in turn, or any.
class Ready {
  public:
    void reserve(size_t count) {
        size_t size = 1;
        while (size < count) size *= 2;
        ring_.resize(size);
        mask_ = size - 1;
        begin_ = end_ = 0;
    }
    bool empty() const { return begin_ == end_; }
    size_t size() const { return end_ - begin_; }
    void push(Fiber* fiber) { ring_[end_++ & mask_] = fiber; }
    Fiber* first() { return ring_[begin_++ & mask_]; }
    Fiber* last() { return ring_[--end_ & mask_]; }
    Fiber* any(uint64_t index) {
        std::swap(ring_[(begin_ + index) & mask_], ring_[begin_ & mask_]);
        return first();
    }

  private:
    std::vector<Fiber*> ring_;
    size_t mask_ = 0, begin_ = 0, end_ = 0;
};

struct Machine {
    // The launch.
    int capability = 0, cluster = 1, threads = 0;
    int64_t shared_bytes = 0;
    Entry entry = nullptr;
    const void* argument = nullptr;
    std::string error;
    uint64_t steps = 0, most_steps = 0;
    std::vector<Piece> pieces;
    // The cluster.
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<Cta> ctas;
    int live = 0, cluster_arrived = 0;
    Queue cluster_waiting;
    // The order of things.
    bool in_turn = true;
    enum class Order { any, mostly_first, mostly_last } order = Order::any;
    uint64_t copies_every = 1;  // a power of two; 0: when nothing else can be done
    int most_patience = 0;
    Random random;
    Ready ready;
    std::vector<Fiber*> held;  // ready, but of the warp or CTA that is kept waiting
    const Warp* held_warp = nullptr;
    const Cta* held_cta = nullptr;
    uint64_t hold_until = 0;
    Context caller;

    void wake(Fiber* fiber) {
        fiber->wait = Wait::none;
        ready.push(fiber);
    }
    void wake(Queue* queue);
    // The running thread waits until it is woken.
    void block(Wait wait, int64_t where = 0, int64_t parity = 0);
};

extern Machine machine;

inline Fiber& self() { return *static_cast<Fiber*>(current); }

// The CTA's offset of `pointer`, `bytes` of which must lie in it at a multiple of `alignment`.
int64_t shared_offset(const char* what, const void* pointer, int64_t bytes, int64_t alignment);
void need_clusters(const char* what);
void complete_bytes(Cta* cta, uint64_t* barrier, uint32_t bytes);
void require_mbarrier(const char* what, Cta* cta, uint64_t* barrier);
// One piece of a copy arrives.
void advance_copies();
// Before a CTA's memory goes.
void end_copies(const Cta& cta);
void flush_copies();
std::string waiting_threads();

}  // namespace kldiv::gpu::host
