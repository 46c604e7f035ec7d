// What the launchers ask of the CUDA runtime. Errors are thrown with what was being launched.
//
// tests/cuda_host/runtime.h stands in for it under KLDIV_CUDA_HOST.
#pragma once

#include <cstdint>
#include <string>

namespace kldiv::gpu {

struct LaunchShape {
    int64_t blocks = 1;
    int threads = 1, cluster = 1;
    int64_t shared_bytes = 0;
};

// Of the current device; asked once a device.
struct DeviceInfo {
    int capability;  // 90 for 9.0
    int processors;
    int64_t shared_bytes;  // the most that a block may have
    std::string name;
};

}  // namespace kldiv::gpu

#ifdef KLDIV_CUDA_HOST
#include "runtime.h"
#else

#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

namespace kldiv::gpu {

inline void check(cudaError_t error, const std::string& what) {
    if (error == cudaSuccess) return;
    (void)cudaGetLastError();
    throw std::runtime_error("kldiv_kernels: " + what + ": " + cudaGetErrorString(error));
}

inline int current_device() {
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    return device;
}

inline const DeviceInfo& device_info() {
    static std::mutex lock;
    static std::map<int, DeviceInfo> known;
    const int device = current_device();
    const std::lock_guard<std::mutex> guard(lock);
    const auto found = known.find(device);
    if (found != known.end()) return found->second;
    const auto attribute = [&](cudaDeviceAttr which) {
        int value = 0;
        check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
        return value;
    };
    DeviceInfo info;
    info.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
    info.processors = attribute(cudaDevAttrMultiProcessorCount);
    info.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    info.name = "sm_" + std::to_string(info.capability);
    return known.emplace(device, info).first->second;
}

template <class Arguments>
using Kernel = void (*)(Arguments);

template <class Arguments>
struct Configured {
    cudaLaunchConfig_t config{};
    cudaLaunchAttribute cluster{};

    Configured(const LaunchShape& shape, void* stream) {
        config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
        config.blockDim = dim3(static_cast<unsigned>(shape.threads));
        config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
        config.stream = static_cast<cudaStream_t>(stream);
        if (shape.cluster > 1) {
            cluster.id = cudaLaunchAttributeClusterDimension;
            cluster.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
            cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
            config.attrs = &cluster;
            config.numAttrs = 1;
        }
    }
    Configured(const Configured&) = delete;
};

// Allows the shape, once a device, kernel and shape, and returns how many clusters of it the device holds at a time: 0
// where it refuses it. Nothing of this happens again at the next launch, so that launches can be captured.
template <class Arguments>
int active_clusters(Kernel<Arguments> kernel, const LaunchShape& shape) {
    static std::mutex lock;
    static std::map<std::pair<int, std::pair<const void*, std::pair<int, int64_t>>>, int> known;
    const void* function = reinterpret_cast<const void*>(kernel);
    const auto key =
        std::make_pair(current_device(), std::make_pair(function, std::make_pair(shape.cluster, shape.shared_bytes)));
    const std::lock_guard<std::mutex> guard(lock);
    const auto found = known.find(key);
    if (found != known.end()) return found->second;
    // The attribute holds for all shapes of a kernel: it must not shrink again.
    static std::map<std::pair<int, const void*>, int64_t> allowed;
    int64_t& most = allowed[{key.first, function}];
    most = std::max(most, shape.shared_bytes);
    int clusters = 0;
    cudaError_t error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most));
    if (error == cudaSuccess && shape.cluster > 8)
        error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error == cudaSuccess) {
        LaunchShape one = shape;
        one.blocks = shape.cluster;
        Configured<Arguments> configured(one, nullptr);
        if (shape.cluster > 1) {
            error = cudaOccupancyMaxActiveClusters(&clusters, function, &configured.config);
        } else {
            error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&clusters, function, shape.threads,
                                                                  static_cast<size_t>(shape.shared_bytes));
            clusters *= device_info().processors;
        }
    }
    if (error != cudaSuccess) {
        (void)cudaGetLastError();
        clusters = 0;
    }
    known.emplace(key, clusters);
    return clusters;
}

template <class Arguments>
void launch(Kernel<Arguments> kernel, const LaunchShape& shape, void* stream, const Arguments& arguments,
            const std::string& what) {
    Configured<Arguments> configured(shape, stream);
    check(cudaLaunchKernelEx(&configured.config, kernel, arguments), what);
}

}  // namespace kldiv::gpu
#endif
