#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "kernels.h"
#include "tables.h"

#ifdef KLDIV_X86
#include <immintrin.h>

// After the standard headers: their inline functions stay callable on every processor.
#pragma GCC target("avx2,fma,f16c")

#define KLDIV_ISA avx2
#define KLDIV_LANES 8
#define KLDIV_AVX2
namespace kldiv::avx2 {
#include "simd_generic.h"
#include "../fast_math.h"
#include "../divergences.h"
#include "convert.h"
#include "tiles.h"
}  // namespace kldiv::avx2

const kldiv::Kernels& kldiv::avx2_kernels() {
    static const Kernels kernels = avx2::make_kernels("avx2");
    return kernels;
}
#endif
