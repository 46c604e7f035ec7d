// The device that the environment names.
#pragma once

#include <string>

#include "cuda/machine/runtime.cuh"

namespace kldiv::gpu::host {

// Why the device would refuse the launch; empty: it would not.
std::string why_not_launched(const void* kernel, const LaunchShape& shape);

}  // namespace kldiv::gpu::host
