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
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#define KLDIV_ISA avx512
#define KLDIV_AVX512
namespace kldiv::avx512 {
#include "simd_avx512.h"
#include "../fast_math.h"
#include "../divergences.h"
#include "convert.h"
#include "tiles.h"
}  // namespace kldiv::avx512

const kldiv::Kernels& kldiv::avx512_kernels() {
    static const Kernels kernels = avx512::make_kernels("avx512");
    return kernels;
}
#endif
