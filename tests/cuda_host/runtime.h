// csrc/cuda/machine/runtime.cuh for the host: devices that the environment names, and launches that have ended when
// they return.
//
// KLDIV_HOST_DEVICE           sm_80, sm_86, sm_89, sm_90 (default), sm_100 or sm_120
// KLDIV_HOST_LARGEST_CLUSTER  refuses larger clusters than this
// KLDIV_HOST_CLUSTERS         what active_clusters says of a shape that is not refused
// KLDIV_HOST_SEED             the order of threads and copies
// KLDIV_HOST_STEPS            changes of thread after which a launch is taken for endless
#pragma once

#include <cstdlib>
#include <string>
#include <type_traits>

#include "machine.h"

namespace kldiv::gpu {

namespace host {
// To the model a block without a cluster is a cluster of one.
inline LaunchShape in_clusters(LaunchShape shape) {
    shape.cluster = shape.cluster == 0 ? 1 : shape.cluster;
    return shape;
}
}  // namespace host

inline int current_device() { return 0; }
const DeviceInfo& device_info();

template <class Arguments>
using Kernel = void (*)(Arguments);

template <class Arguments>
int active_clusters(Kernel<Arguments> kernel, const LaunchShape& shape) {
    return host::active_clusters(reinterpret_cast<const void*>(kernel), host::in_clusters(shape));
}

template <class Arguments, class What>
void launch(Kernel<Arguments> kernel, const LaunchShape& shape, void*, const Arguments& arguments, What what) {
    static_assert(std::is_trivially_copyable_v<Arguments> && sizeof(Arguments) <= 32764);
    struct Call {
        Kernel<Arguments> kernel;
        const Arguments& arguments;
    } const call{kernel, arguments};
    const auto entry = [](const void* context) {
        const Call& call = *static_cast<const Call*>(context);
        call.kernel(call.arguments);
    };
    host::run(reinterpret_cast<const void*>(kernel), host::in_clusters(shape), entry, &call, what());
}

// KLDIV_HOST_COMPILED         the architecture of the code that the device runs; default: its own
template <class Arguments>
int compiled_for(Kernel<Arguments>) {
    const char* asked = std::getenv("KLDIV_HOST_COMPILED");
    return asked ? std::atoi(asked) : device_info().capability;
}

inline std::string driver_refusal() { return ""; }

}  // namespace kldiv::gpu
