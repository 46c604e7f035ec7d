// What the launchers ask of the CUDA runtime. Errors are thrown with what was being launched.
//
// tests/cuda_host/runtime.h stands in for it under KLDIV_CUDA_HOST.
#pragma once

#include <cstdint>
#include <string>

namespace kldiv::gpu {

struct LaunchShape {
    int64_t blocks = 1;
    int threads = 1;
    int cluster = 0;  // blocks of a cluster; 0: a kernel without clusters
    int64_t shared_bytes = 0;
};

// Of the current device; asked once a device.
struct DeviceInfo {
    int capability;  // 90 for 9.0
    int processors;
    int64_t shared_bytes;  // the most that a block may have
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
        if (shape.cluster > 0) {
            cluster.id = cudaLaunchAttributeClusterDimension;
            cluster.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
            cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
            config.attrs = &cluster;
            config.numAttrs = 1;
        }
    }
    Configured(const Configured&) = delete;
};

// While it lives this thread may ask what a stream's capture would not allow: the first use of a kernel loads its code.
class OutOfCapture {
  public:
    OutOfCapture() { exchange(); }
    // The modes are exchanged back.
    ~OutOfCapture() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
    OutOfCapture(const OutOfCapture&) = delete;

  private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
    void exchange() { check(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode"); }
};

// What the runtime says of a kernel, whose code is then loaded; asked once a device and kernel.
inline const cudaFuncAttributes& attributes_of(const void* function) {
    static std::mutex lock;
    static std::map<std::pair<int, const void*>, cudaFuncAttributes> known;
    const auto key = std::make_pair(current_device(), function);
    const std::lock_guard<std::mutex> guard(lock);
    const auto found = known.find(key);
    if (found != known.end()) return found->second;
    const OutOfCapture out_of_capture;
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, function), "cudaFuncGetAttributes");
    return known.emplace(key, attributes).first->second;
}

// Allows the shape, once a device, kernel and shape, and returns how many clusters of it the device holds at a time: 0
// where it refuses it. Nothing of this happens again at the next launch, so that launches can be captured.
template <class Arguments>
int active_clusters(Kernel<Arguments> kernel, const LaunchShape& shape) {
    static std::mutex lock;
    static std::map<std::pair<int, std::pair<const void*, std::pair<int, int64_t>>>, int> known;
    static std::map<std::pair<int, const void*>, int64_t> allowed;
    const void* function = reinterpret_cast<const void*>(kernel);
    const auto key =
        std::make_pair(current_device(), std::make_pair(function, std::make_pair(shape.cluster, shape.shared_bytes)));
    const std::lock_guard<std::mutex> guard(lock);
    const auto found = known.find(key);
    if (found != known.end()) return found->second;
    const OutOfCapture out_of_capture;
    // The attribute holds for all shapes of a kernel: it must not shrink again.
    int64_t& before = allowed[{key.first, function}];
    const int64_t most = std::max(before, shape.shared_bytes);
    int clusters = 0;
    cudaError_t error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most));
    if (error == cudaSuccess) before = most;
    if (error == cudaSuccess && shape.cluster > 8)
        error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error == cudaSuccess) {
        LaunchShape one = shape;
        one.blocks = shape.cluster;
        Configured<Arguments> configured(one, nullptr);
        error = cudaOccupancyMaxActiveClusters(&clusters, function, &configured.config);
    }
    const bool refused = error == cudaErrorInvalidValue || error == cudaErrorInvalidClusterSize ||
                         error == cudaErrorInvalidConfiguration || error == cudaErrorLaunchOutOfResources;
    if (refused) {
        (void)cudaGetLastError();
        clusters = 0;
    } else {
        check(error, "clusters of " + std::to_string(shape.cluster) + " blocks");
    }
    known.emplace(key, clusters);
    return clusters;
}

// `what` says what is launched; it is called where that fails.
template <class Arguments, class What>
void launch(Kernel<Arguments> kernel, const LaunchShape& shape, void* stream, const Arguments& arguments, What what) {
    (void)attributes_of(reinterpret_cast<const void*>(kernel));
    Configured<Arguments> configured(shape, stream);
    const cudaError_t error = cudaLaunchKernelEx(&configured.config, kernel, arguments);
    if (error != cudaSuccess) check(error, what());
}

// The architecture that the code of a kernel which this device runs was compiled for: less than the device's where it
// comes from older PTX.
template <class Arguments>
int compiled_for(Kernel<Arguments> kernel) {
    return attributes_of(reinterpret_cast<const void*>(kernel)).ptxVersion;
}

// Why this build's CUDA runtime cannot work with the driver that is here, "" where it can.
inline std::string driver_refusal() {
    int version = 0;
    if (cudaDriverGetVersion(&version) != cudaSuccess || version == 0) return "no CUDA driver is installed";
    if (version / 1000 >= CUDART_VERSION / 1000) return "";
    return "the driver is for CUDA " + std::to_string(version / 1000) + " and this build for CUDA " +
           std::to_string(CUDART_VERSION / 1000) + ": update the driver, or build with an older toolkit";
}

}  // namespace kldiv::gpu
#endif
