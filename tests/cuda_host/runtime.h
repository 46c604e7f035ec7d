// csrc/cuda/runtime.cuh for the host: devices that the environment names, and launches that have ended when they
// return.
//
// KLDIV_HOST_DEVICE           sm_80, sm_86, sm_89, sm_90 (default), sm_100 or sm_120
// KLDIV_HOST_LARGEST_CLUSTER  refuses larger clusters than this
// KLDIV_HOST_CLUSTERS         what active_clusters says of a shape that is not refused
// KLDIV_HOST_SEED             the order of threads and copies
// KLDIV_HOST_STEPS            changes of thread after which a launch is taken for endless
#pragma once

#include <string>
#include <type_traits>

#include "machine.h"

namespace kldiv::gpu {

inline int current_device() { return 0; }
const DeviceInfo& device_info();

template <class Arguments>
using Kernel = void (*)(Arguments);

template <class Arguments>
int active_clusters(Kernel<Arguments> kernel, const LaunchShape& shape) {
    return host::active_clusters(reinterpret_cast<const void*>(kernel), shape);
}

template <class Arguments>
void launch(Kernel<Arguments> kernel, const LaunchShape& shape, void*, const Arguments& arguments,
            const std::string& what) {
    static_assert(std::is_trivially_copyable_v<Arguments> && sizeof(Arguments) <= 32764);
    struct Call {
        Kernel<Arguments> kernel;
        const Arguments& arguments;
    } const call{kernel, arguments};
    const auto entry = [](const void* context) {
        const Call& call = *static_cast<const Call*>(context);
        call.kernel(call.arguments);
    };
    host::run(reinterpret_cast<const void*>(kernel), shape, entry, &call, what);
}

}  // namespace kldiv::gpu
