// A CUDA machine on the host: what ptx.h and runtime.h ask of it.
//
// A CUDA thread is a fiber, and one runs at a time. They change places only inside the functions below and those that
// ptx.h declares, in an order that KLDIV_HOST_SEED shuffles (0: in turn). Between two of them a thread is alone, so
// that a missing barrier shows as a wrong order of such stretches, and a missing wait as bytes that have not arrived.
// There is one order of memory: what the fences are for is not modelled.
#pragma once

#include <cstdint>
#include <string>

namespace kldiv::gpu {

struct LaunchShape;
struct DeviceInfo;

namespace host {

// What the thread that runs knows of itself.
struct Thread {
    int index = 0, block_threads = 0;
    int64_t block = 0, blocks = 0;
    char* shared = nullptr;
};
extern Thread* current;

// Calls that do not block let another thread in from time to time: each takes of this.
extern int patience;
void pause();
inline void perhaps_pause(int share) {
    if ((patience -= share) < 0) pause();
}

// Ends the launch with an error.
[[noreturn]] void fail(const std::string& message);

uint32_t shuffle_xor(uint32_t bits, int lanes);

using Entry = void (*)(const void* context);
// Runs `entry` once a thread, to the end. `kernel` tells kernels apart.
void run(const void* kernel, const LaunchShape& shape, Entry entry, const void* context, const std::string& what);
int active_clusters(const void* kernel, const LaunchShape& shape);

}  // namespace host
}  // namespace kldiv::gpu
