#include "kernels.h"
#include "one_read_topk.cuh"

kldiv::gpu::TopKKernel kldiv::gpu::one_read_topk_kernel(int element) {
    return element == kFloat32 ? one_read_topk<kFloat32> : one_read_topk<kBfloat16>;
}
