#include "kernels.h"
#include "topk_kernel.cuh"

kldiv::gpu::TopKKernel kldiv::gpu::one_read_topk_kernel(int element) {
    return element == kFloat32 ? one_read_topk<kFloat32> : one_read_topk<kBfloat16>;
}
