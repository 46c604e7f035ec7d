#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "kernels.h"
#include "tables.h"
#ifdef __aarch64__
#include <arm_neon.h>
#endif

#define KLDIV_ISA baseline
#define KLDIV_LANES 4
namespace kldiv::baseline {
#include "simd_generic.h"
#include "../fast_math.h"
#include "../divergences.h"
#include "convert.h"
#include "tiles.h"
}  // namespace kldiv::baseline

const kldiv::Kernels& kldiv::baseline_kernels() {
    static const Kernels kernels = baseline::make_kernels("baseline");
    return kernels;
}
