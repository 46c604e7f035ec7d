#include "kernels.h"

kldiv::gpu::OneReadKernel kldiv::gpu::one_read_float16(int code) { return one_read_kernel<kFloat16>(code); }
