#include "kernels.h"

kldiv::gpu::OneReadKernel kldiv::gpu::one_read_float32(int code) { return one_read_kernel<kFloat32>(code); }
