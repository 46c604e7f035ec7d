#include "device.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>

#include "cluster.h"

namespace kldiv::gpu {
namespace host {
namespace {

struct Device {
    const char* name;
    DeviceInfo info;
    int largest_cluster;
    int64_t shared_of_processor;
    int threads_of_processor;
};

// Few processors, so that small tests have more rows than a grid has clusters. Sizes: CUDA C++ Programming Guide,
// table "Technical specifications per compute capability".
constexpr int kProcessors = 4;
const Device kDevices[] = {
    {"sm_80", {80, kProcessors, 166912}, 1, 164 << 10, 2048},
    {"sm_86", {86, kProcessors, 101376}, 1, 100 << 10, 1536},
    {"sm_89", {89, kProcessors, 101376}, 1, 100 << 10, 1536},
    {"sm_90", {90, kProcessors, 232448}, 16, 228 << 10, 2048},
    {"sm_100", {100, kProcessors, 232448}, 16, 228 << 10, 2048},
    {"sm_120", {120, kProcessors, 101376}, 8, 100 << 10, 1536},
};
constexpr int64_t kSharedOfSystem = 1024;  // that a block takes beside its own
constexpr int kMostBlocksOfProcessor = 16;
constexpr int64_t kSharedUnasked = 48 << 10;  // without cudaFuncSetAttribute
constexpr int kClusterUnasked = 8;

const char* environment(const char* name, const char* otherwise) {
    const char* text = std::getenv(name);
    return text == nullptr || *text == 0 ? otherwise : text;
}

const Device& device() {
    const std::string name = environment("KLDIV_HOST_DEVICE", "sm_90");
    for (const Device& device : kDevices)
        if (name == device.name) return device;
    throw std::runtime_error("KLDIV_HOST_DEVICE: the model has no device \"" + name + "\"");
}

std::string why_refused(const LaunchShape& shape) {
    const Device& on = device();
    const int largest = std::min(on.largest_cluster, std::atoi(environment("KLDIV_HOST_LARGEST_CLUSTER", "16")));
    const std::string where = std::string(" on ") + on.name;
    if (shape.threads < 1 || shape.threads > 1024 || shape.threads % kWarp)
        return "a block of " + std::to_string(shape.threads) + " threads";
    if (shape.cluster < 1 || (shape.cluster > 1 && shape.cluster > largest))
        return "a cluster of " + std::to_string(shape.cluster) + " CTAs" + where;
    if (shape.shared_bytes < 0 || shape.shared_bytes > on.info.shared_bytes)
        return std::to_string(shape.shared_bytes) + " bytes of shared memory" + where;
    return "";
}

// The largest that active_clusters was asked about for a kernel: only then may a launch have as much.
struct Allowed {
    int64_t shared_bytes = kSharedUnasked;
    int cluster = kClusterUnasked;
};
std::mutex lock;
std::map<const void*, Allowed> allowed;

}  // namespace

std::string why_not_launched(const void* kernel, const LaunchShape& shape) {
    const std::string refusal = why_refused(shape);
    if (!refusal.empty()) return refusal;
    if (shape.blocks < 1 || shape.blocks > 2147483647 || shape.blocks % shape.cluster)
        return "a grid of " + std::to_string(shape.blocks) + " blocks in clusters of " + std::to_string(shape.cluster);
    const std::lock_guard<std::mutex> guard(lock);
    const Allowed& most = allowed[kernel];
    if (shape.shared_bytes > most.shared_bytes || shape.cluster > most.cluster)
        return std::to_string(shape.shared_bytes) + " bytes of shared memory in clusters of " +
               std::to_string(shape.cluster) + ", for which active_clusters has not asked";
    return "";
}

int active_clusters(const void* kernel, const LaunchShape& shape) {
    if (!why_refused(shape).empty()) return 0;
    {
        const std::lock_guard<std::mutex> guard(lock);
        Allowed& most = allowed[kernel];
        most.shared_bytes = std::max(most.shared_bytes, shape.shared_bytes);
        most.cluster = std::max(most.cluster, shape.cluster);
    }
    const int asked = std::atoi(environment("KLDIV_HOST_CLUSTERS", "0"));
    if (asked > 0) return asked;
    const Device& on = device();
    const int64_t blocks = std::min({static_cast<int64_t>(kMostBlocksOfProcessor),
                                     on.shared_of_processor / (shape.shared_bytes + kSharedOfSystem),
                                     static_cast<int64_t>(on.threads_of_processor / shape.threads)});
    return static_cast<int>(std::max<int64_t>(1, kProcessors * blocks / shape.cluster));
}

void need_clusters(const char* what) {
    if (machine.capability < 90) fail(std::string(what) + ": sm_90 and later only");
}

int64_t shared_offset(const char* what, const void* pointer, int64_t bytes, int64_t alignment) {
    const int64_t offset = static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer)) -
                           static_cast<int64_t>(reinterpret_cast<uintptr_t>(current->shared));
    if (offset < 0 || bytes > machine.shared_bytes || offset > machine.shared_bytes - bytes || offset % alignment)
        fail(std::string(what) + ": " + std::to_string(bytes) + " bytes at shared memory + " + std::to_string(offset) +
             "; the block has " + std::to_string(machine.shared_bytes) + ", and they must start at a multiple of " +
             std::to_string(alignment));
    return offset;
}

}  // namespace host

const DeviceInfo& device_info() { return host::device().info; }

}  // namespace kldiv::gpu
