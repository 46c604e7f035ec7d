// Copies that happen later than they are asked for, in pieces, and in any order.
#include "cluster.h"

#include <algorithm>
#include <cstring>

#include "cuda/machine/ptx.cuh"

#ifdef KLDIV_HOST_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace kldiv::gpu {
namespace host {
namespace {

// NaN in every type: what is read where bytes have yet to arrive.
constexpr int kPoison = 0xff;
constexpr uint64_t kMostPieces = 4;

void check_global(const char* what, const void* global, uint32_t bytes) {
    if (bytes == 0 || bytes % 16 || reinterpret_cast<uintptr_t>(global) % 16)
        fail(std::string(what) + ": " + std::to_string(bytes) + " bytes of global memory at an address " +
             std::to_string(reinterpret_cast<uintptr_t>(global) % 16) + " modulo 16; both must be multiples of 16");
#ifdef KLDIV_HOST_ASAN
    if (__asan_region_is_poisoned(const_cast<void*>(global), bytes) != nullptr)
        fail(std::string(what) + ": " + std::to_string(bytes) + " bytes reach out of their global memory");
#endif
}

// `shared` is about to be written (or read, by a store) by the copy engine. That a store has read already is not enough
// where nobody has waited to know it.
void check_unused(const char* what, const Cta& cta, const char* shared, uint32_t bytes, bool written) {
    for (const Reading& reading : cta.readings)
        if (written && reading.shared < shared + bytes && shared < reading.shared + reading.bytes)
            fail(std::string(what) + ": no bulk_wait_read since a bulk_store from shared memory + " +
                 std::to_string(reading.shared - cta.shared));
    if (cta.copies == 0) return;
    for (const Piece& piece : machine.pieces) {
        if (piece.kind == Piece::write || piece.kind == Piece::read || piece.cta != &cta) continue;
        if (piece.shared < shared + bytes && shared < piece.shared + piece.bytes)
            fail(std::string(what) + ": another copy has yet to arrive in shared memory + " +
                 std::to_string(piece.shared - cta.shared));
    }
}

int issue(Piece piece) {
    const uint64_t units = piece.bytes / 16;
    uint64_t pieces = 1 + machine.random.below(kMostPieces);
    if (pieces > units) pieces = units;
    char* shared = piece.shared;
    char* global = piece.global;
    for (uint64_t i = 0; i < pieces; ++i) {
        piece.shared = shared + units * i / pieces * 16;
        if (global != nullptr) piece.global = global + units * i / pieces * 16;
        piece.bytes = static_cast<uint32_t>((units * (i + 1) / pieces - units * i / pieces) * 16);
        machine.pieces.push_back(piece);
    }
    piece.cta->copies += static_cast<int>(pieces);
    return static_cast<int>(pieces);
}

}  // namespace

void advance_copies() {
    std::vector<Piece>& pieces = machine.pieces;
    Piece& place = pieces[machine.random.below(pieces.size())];
    Piece piece = std::move(place);
    if (&place != &pieces.back()) place = std::move(pieces.back());
    pieces.pop_back();
    if (piece.kind == Piece::write) {
        std::memcpy(piece.global, piece.data.data(), piece.bytes);
        return;
    }
    --piece.cta->copies;
    if (piece.kind == Piece::read) {
        piece.data.assign(piece.shared, piece.shared + piece.bytes);
        piece.kind = Piece::write;
        Fiber* issuer = piece.issuer;
        pieces.push_back(std::move(piece));
        if (--issuer->unread == 0 && issuer->wait == Wait::stores) machine.wake(issuer);
        return;
    }
    std::memcpy(piece.shared, piece.kind == Piece::load ? piece.global : piece.data.data(), piece.bytes);
    complete_bytes(piece.cta, piece.barrier, piece.bytes);
}

void end_copies(const Cta& cta) {
    if (cta.copies == 0) return;
    for (const Piece& piece : machine.pieces)
        if (piece.kind != Piece::write && piece.cta == &cta)
            fail("the CTA has ended, and a " +
                 std::string(piece.kind == Piece::read   ? "bulk_store has yet to read"
                             : piece.kind == Piece::load ? "bulk_load has yet to arrive in"
                                                         : "store_async has yet to arrive in") +
                 " its shared memory + " + std::to_string(piece.shared - cta.shared));
}

void flush_copies() {
    while (!machine.pieces.empty()) advance_copies();
}

}  // namespace host

using namespace host;

void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
    need_clusters("bulk_load");
    check_global("bulk_load", global, bytes);
    shared_offset("bulk_load", shared, bytes, 16);
    shared_offset("bulk_load", barrier, 8, 8);
    Fiber& fiber = self();
    require_mbarrier("bulk_load", fiber.cta, barrier);
    char* to = static_cast<char*>(shared);
    check_unused("bulk_load", *fiber.cta, to, bytes, true);
    std::memset(to, kPoison, bytes);
    issue({Piece::load, fiber.cta, to, static_cast<char*>(const_cast<void*>(global)), bytes, barrier, &fiber, {}});
    perhaps_pause(16);
}

void bulk_store(void* global, const void* shared, uint32_t bytes) {
    need_clusters("bulk_store");
    check_global("bulk_store", global, bytes);
    shared_offset("bulk_store", shared, bytes, 16);
    Fiber& fiber = self();
    char* from = static_cast<char*>(const_cast<void*>(shared));
    check_unused("bulk_store", *fiber.cta, from, bytes, false);
    fiber.unwaited = true;
    fiber.cta->readings.push_back({&fiber, from, bytes});
    fiber.unread += issue({Piece::read, fiber.cta, from, static_cast<char*>(global), bytes, nullptr, &fiber, {}});
    perhaps_pause(16);
}

void bulk_wait_read() {
    need_clusters("bulk_wait_read");
    Fiber& fiber = self();
    if (fiber.unread > 0) machine.block(Wait::stores);
    fiber.unwaited = false;
    std::vector<Reading>& readings = fiber.cta->readings;
    const auto waited = [&](const Reading& reading) { return reading.issuer == &fiber; };
    readings.erase(std::remove_if(readings.begin(), readings.end(), waited), readings.end());
    perhaps_pause(16);
}

void store_async(void* to, uint64_t* barrier, uint32_t rank, const Words& x) {
    need_clusters("store_async");
    const int64_t offset = shared_offset("store_async", to, sizeof x, 16);
    const int64_t barrier_offset = shared_offset("store_async", barrier, 8, 8);
    Fiber& fiber = self();
    if (rank >= static_cast<uint32_t>(machine.cluster))
        fail("store_async: the cluster has no CTA " + std::to_string(rank));
    Cta& peer = machine.ctas[rank];
    if (&peer != fiber.cta && !fiber.met_cluster)
        fail("store_async: CTA " + std::to_string(rank) + " may not have started: no cluster_sync before");
    if (peer.live == 0) fail("store_async: CTA " + std::to_string(rank) + " has ended");
    auto* const there = reinterpret_cast<uint64_t*>(peer.shared + barrier_offset);
    require_mbarrier("store_async", &peer, there);
    check_unused("store_async", peer, peer.shared + offset, sizeof x, true);
    std::memset(peer.shared + offset, kPoison, sizeof x);
    Piece piece{Piece::words, &peer, peer.shared + offset, nullptr, sizeof x, there, &fiber, {}};
    piece.data.resize(sizeof x);
    std::memcpy(piece.data.data(), &x, sizeof x);
    issue(std::move(piece));
    perhaps_pause(16);
}

}  // namespace kldiv::gpu
