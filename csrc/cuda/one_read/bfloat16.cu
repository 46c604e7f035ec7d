#include "kernels.h"

kldiv::gpu::OneReadKernel kldiv::gpu::one_read_bfloat16(int code) { return one_read_kernel<kBfloat16>(code); }
