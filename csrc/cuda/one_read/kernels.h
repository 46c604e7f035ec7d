// Where the launchers find the one-read kernels: a file compiles those of one element type.
#pragma once

#include "kernel.cuh"

namespace kldiv::gpu {

using OneReadKernel = void (*)(OneReadArguments);

OneReadKernel one_read_float32(int code);
OneReadKernel one_read_bfloat16(int code);
OneReadKernel one_read_float16(int code);

struct TopKArguments;
using TopKKernel = void (*)(TopKArguments);
// Of float32 and bfloat16.
TopKKernel one_read_topk_kernel(int element);

// Of a statistic's code after `resolve`; null for one without a student's gradient.
template <int element>
OneReadKernel one_read_kernel(int code) {
    switch (code) {
#define KLDIV_CASE(name, ...)                                     \
    case k_##name:                                                \
        if constexpr (std::is_same_v<__VA_ARGS__, Swap<Entropy>>) \
            return nullptr;                                       \
        else                                                      \
            return one_read<__VA_ARGS__, element>;
        KLDIV_DIVERGENCES(KLDIV_CASE)
#undef KLDIV_CASE
        default:
            return nullptr;
    }
}

}  // namespace kldiv::gpu
