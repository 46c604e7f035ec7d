// What the machine promises, each promise by a small kernel: machine_test FIRST_SEED SEEDS. A kernel with a part left
// out must be seen, by its values or by an error, in so many of the seeds.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>

#include "test_kernels.h"

namespace kldiv::gpu {
namespace {

int first_seed = 0, seeds = 4, failures = 0;

struct Set {
    Set(const char* name, const char* value) : name(name) { setenv(name, value, 1); }
    ~Set() { unsetenv(name); }
    const char* name;
};

// `body` says whether its values were right; an error must contain `error`, which "" forbids.
void check(const char* name, const std::function<bool()>& body, const std::string& error = "") {
    for (int seed = first_seed; seed < first_seed + seeds; ++seed) {
        const Set set("KLDIV_HOST_SEED", std::to_string(seed).c_str());
        std::string seen;
        bool right = false;
        try {
            right = body();
        } catch (const std::runtime_error& thrown) {
            seen = thrown.what();
        }
        if (error.empty() ? right && seen.empty() : seen.find(error) != std::string::npos) continue;
        ++failures;
        std::printf("%s, seed %d: %s, %s\n", name, seed, right ? "right values" : "wrong values",
                    seen.empty() ? "no error" : seen.c_str());
    }
}

void check_seen(const char* name, const std::function<bool()>& body, double share) {
    int seen = 0;
    for (int seed = first_seed; seed < first_seed + seeds; ++seed) {
        const Set set("KLDIV_HOST_SEED", std::to_string(seed).c_str());
        try {
            seen += !body();
        } catch (const std::runtime_error&) {
            ++seen;
        }
    }
    std::printf("%-40s seen with %d of %d seeds\n", name, seen, seeds);
    if (seen < share * seeds) ++failures, std::printf("%s: too few\n", name);
}

// --- one call each ---------------------------------------------------------------------------------------------------
struct Call {
    void (*body)(float* memory);
    float* memory;
};
KLDIV_KERNEL(64, 1) one_call(Call a) { a.body(a.memory); }

bool call(void (*body)(float*), const LaunchShape& shape = {1, 64, 1, 1024}) {
    alignas(16) float memory[64] = {};
    start(one_call, shape, Call{body, memory});
    return memory[0] == 0;
}

uint64_t* barrier_at(int offset) { return reinterpret_cast<uint64_t*>(shared_memory() + offset); }

void send_to_peer(float*) {
    if (thread_index() == 0) mbarrier_init(barrier_at(0), 1);
    fence_mbarrier_init();
    cluster_sync();
    if (cluster_rank() == 1 || thread_index() >= 32) return;
    for (int i = 0; i < 4; ++i) warp_sync();
    store_async(shared_memory() + 512 + 16 * thread_index(), barrier_at(0), 1, {});
}

void calls() {
    check("bytes may arrive before they are expected, and the parity before has completed", [] {
        return call([](float* memory) {
            if (thread_index() == 0) mbarrier_init(barrier_at(0), 1);
            block_sync(0, 64);
            mbarrier_wait(barrier_at(0), 1);
            block_sync(0, 64);
            if (thread_index() == 0) bulk_load(shared_memory() + 64, memory, 128, barrier_at(0));
            for (int i = 0; i < 50; ++i) warp_sync();
            if (thread_index() == 32) mbarrier_arrive_expect(barrier_at(0), 128);
            mbarrier_wait(barrier_at(0), 0);
            if (reinterpret_cast<float*>(shared_memory())[16 + thread_index() % 32] != 0) memory[0] = 1;
        });
    });
    const auto fails = [](const char* error, void (*body)(float*), LaunchShape shape = {1, 64, 1, 1024}) {
        check(error, [&] { return call(body, shape); }, error);
    };
    fails("deadlock", [](float*) { thread_index() < 32 ? block_sync(1, 64) : block_sync(2, 64); });
    fails("31 of 32 lanes", [](float*) { thread_index() == 5 ? void() : warp_sync(); });
    fails("different calls", [](float*) { (void)shuffle_xor(1, thread_index() == 3 ? 1 : 2); });
    fails("is waited for with",
          [](float*) { thread_index() < 64 ? block_sync(1, thread_index() < 32 ? 96 : 128) : void(); }, {1, 128, 1, 0});
    fails("a part of a warp", [](float*) { thread_index() % 2 ? block_sync(1, 32) : void(); });
    fails("no number of whole warps", [](float*) { block_sync(1, 40); });
    fails("more than the 1 arrivals", [](float*) {
        if (thread_index() != 0) return;
        mbarrier_init(barrier_at(0), 1);
        mbarrier_arrive_expect(barrier_at(0), 16);
        mbarrier_arrive(barrier_at(0));
    });
    fails("no initialised mbarrier", [](float*) { mbarrier_arrive(barrier_at(8)); });
    fails("twice", [](float*) { mbarrier_init(barrier_at(8), 2); });
    fails("modulo 16", [](float* memory) { bulk_store(memory + 1, shared_memory(), 16); });
    fails("24 bytes of global memory", [](float* memory) { bulk_store(memory, shared_memory(), 24); });
    fails("the block has 1024", [](float* memory) { bulk_store(memory, shared_memory() + 1008, 32); });
    fails("multiple of 16", [](float* memory) { (void)load_words(memory + 2); });
    fails("without bulk_wait_read", [](float* memory) { bulk_store(memory, shared_memory(), 16); });
    fails("yet to arrive in shared memory", [](float* memory) {
        if (thread_index() != 0) return;
        mbarrier_init(barrier_at(0), 1);
        for (int i = 0; i < 200; ++i) bulk_load(shared_memory() + 512, memory, 256, barrier_at(0));
    });
    const Set steps("KLDIV_HOST_STEPS", "2000");
    fails("no end after", [](float* memory) {
        const Words zero{};
        while (load_words(memory).w[0] == 0) store_words(memory, zero);
    });
    fails("a cluster of 17 CTAs", [](float*) {}, {17, 64, 17, 0});
    {
        const Set largest("KLDIV_HOST_LARGEST_CLUSTER", "8");
        fails("a cluster of 16 CTAs", [](float*) {}, {16, 64, 16, 0});
    }
    fails("232449 bytes of shared memory", [](float*) {}, {1, 64, 1, 232449});
    fails("3 blocks in clusters of 2", [](float*) {}, {3, 64, 2, 0});
    fails("1056 threads", [](float*) {}, {1, 1056, 1, 0});
#ifndef __SANITIZE_ADDRESS__
    fails("behind its shared memory", [](float*) { shared_memory()[1024] = 0; });
#endif
    {
        const Set device("KLDIV_HOST_DEVICE", "sm_80");
        fails("sm_90 and later", [](float*) { (void)cluster_rank(); });
        fails("a cluster of 2 CTAs on sm_80", [](float*) {}, {2, 64, 2, 0});
        check("no clusters on sm_80", [] { return active_clusters<Sums>(warp_sums, {2, 64, 2, 0}) == 0; });
    }
    check(
        "shared memory that was not asked for",
        [] {
            launch<Exchange>(cluster_sums, {1, 32, 1, 200000}, nullptr, {}, [] { return "a test"; });
            return true;
        },
        "active_clusters has not asked");
}

// --- arithmetic ------------------------------------------------------------------------------------------------------
bool arithmetic() {
    const float infinity = std::numeric_limits<float>::infinity();
    for (uint32_t bits = 0; bits < 65536; ++bits) {
        float low, high;
        unpack_f16x2(bits | 0x3c000000u, &low, &high);
        if (high != 1) return false;
        const bool nan = (bits & 0x7fff) > 0x7c00;
        if (std::isnan(low) != nan || (!nan && pack_f16x2(low, 65520) != (bits | 0x7c000000u))) return false;
        const float wide = bits_float(bits << 16);
        if (!std::isnan(wide) && pack_bf16x2(2, wide) != (bits << 16 | 0x4000)) return false;
    }
    const float tie = 1 + 0x1p-11f, above = 1 + 0x1p-11f + 0x1p-20f, odd_tie = 1 + 3 * 0x1p-11f;
    const float tiny_tie = 0x1p-25f, nan = std::nanf("");
    return pack_f16x2(tie, above) == 0x3c013c00 && pack_f16x2(odd_tie, tiny_tie) == 0x00003c02 &&
           pack_bf16x2(1 + 0x1p-8f, 1 + 3 * 0x1p-8f) == 0x3f823f80 && pack_bf16x2(nan, -infinity) == 0xff807fff &&
           max_bf16x2(0x3f80ff81, 0xbf800000) == 0x3f807fff && min_bf16x2(0x3f80ff81, 0xbf800001) == 0xbf800001 &&
           max_f16x2(0x80000000, 0x00008000) == 0 && min_f16x2(0x80007e00, 0x00007e01) == 0x80007fff &&
           max_f16x2(0x7c01fc00, 0xfc003c00) == 0x7fff3c00 && exp2_approx(-126.5f) == 0 &&
           exp2_approx(-infinity) == 0 && exp2_approx(infinity) == infinity && exp2_approx(1e-40f) == 1 &&
           exp2_approx(0) == 1 && std::isnan(exp2_approx(nan)) && log2_approx(1e-40f) == -infinity &&
           log2_approx(infinity) == infinity && log2_approx(1) == 0 && std::isnan(log2_approx(-1));
}

// Off by 2^-22 at most, and nearly as much somewhere; the result is rounded besides.
bool approximations() {
    double power = 0, logarithm = 0;
    for (int i = -10000; i < 10000; ++i) {
        const double x = static_cast<float>(i) * 0.0123f, exact = std::exp2(x);
        power = std::max(power, std::fabs(exp2_approx(static_cast<float>(x)) / exact - 1));
        const float of = static_cast<float>(exact);
        const double log2 = std::log2(static_cast<double>(of)), error = std::fabs(log2_approx(of) - log2);
        logarithm = std::max(logarithm, of > 0.5f && of < 2 ? error : error / std::fabs(log2));
    }
    const auto right = [](double error) { return error > 0x1p-23 && error < 0x1p-22 + 0x1p-24; };
    return right(power) && right(logarithm);
}

}  // namespace
}  // namespace kldiv::gpu

int main(int count, char** words) {
    using namespace kldiv::gpu;
    if (count > 1) first_seed = std::atoi(words[1]);
    if (count > 2) seeds = std::atoi(words[2]);
    const Set steps("KLDIV_HOST_STEPS", "200000");
    check("arithmetic", arithmetic);
    check("approximations", approximations);
    check("warps", warps);
    check("named barriers", [] { return halves(true); });
    check_seen("named barriers left out", [] { return halves(false); }, 0.9);
    check("ring of stages", [] { return ring(nothing); });
    check("no arrival", [] { return ring(arrival); }, "deadlock");
    check("no load", [] { return ring(load); }, "256 bytes to come");
    check("no wait after the last store", [] { return ring(last_read_wait); }, "without bulk_wait_read");
    check_seen("no wait for a full stage", [] { return ring(full_wait); }, 0.8);
    check_seen("no wait for an empty stage", [] { return ring(empty_wait); }, 0.6);
    check("no wait for a store's reads", [] { return ring(read_wait); }, "no bulk_wait_read since");
    for (const int cluster : {1, 2, 3, 8, 16}) check("cluster", [=] { return exchange(cluster); });
    check("no cluster_sync before", [] { return exchange(4, first_sync); }, "no cluster_sync before");
    check("nothing expected", [] { return exchange(4, expectation); }, "deadlock");
    check_seen("no wait for the exchange", [] { return exchange(4, wait); }, 0.9);
    check_seen("a peer that ends before it is sent to", [] { return call(send_to_peer, {2, 64, 2, 1024}); }, 0.8);
    calls();
    std::printf(failures == 0 ? "every promise kept\n" : "%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
