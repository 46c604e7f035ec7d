// The divergences over one float, with the elementary functions that a GPU has as instructions.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../../policy.h"
#include "ptx.cuh"

#ifdef __CUDACC__
#define KLDIV_FN __device__
#else
#define KLDIV_FN
#endif
#define KLDIV_EXP2_AND_LOG

namespace kldiv::gpu {

// What a finished row is computed in: a GPU's float64 would stand in every row's way.
using Real = float;
// Constants of a finished row that a divergence's gradients may use; the CPU's number (cpu/kernels.h).
constexpr int kRowConstants = 5;

constexpr float kLog2e = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
// Dividing by log2(e) as the float32 that it is multiplied by undoes the multiplication, rounding included.
constexpr float kExponentToLog = 0.6931471898132927f;

using Floats = float;
using Mask = bool;
// Whether work for lanes of this mask is worth a branch: a thread does it beside the other's.
KLDIV_DEVICE constexpr bool any(Mask) { return true; }

KLDIV_DEVICE float broadcast(float x) { return x; }
KLDIV_DEVICE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
KLDIV_DEVICE float select(bool m, float yes, float no) { return m ? yes : no; }
// The second operand where either is NaN, so that a NaN in the data survives max(bound, data).
KLDIV_DEVICE float max(float a, float b) { return a > b ? a : b; }
KLDIV_DEVICE float min(float a, float b) { return a < b ? a : b; }
KLDIV_DEVICE float abs(float a) { return ::fabsf(a); }
KLDIV_DEVICE float sign(float a) { return a > 0 ? 1.0f : (a < 0 ? -1.0f : 0.0f); }
KLDIV_DEVICE float exp2(float x) { return exp2_approx(x); }
KLDIV_DEVICE float log(float x) { return log2_approx(x) * kLn2; }
KLDIV_DEVICE bool is_nan(float x) { return x != x; }

#include "../../fast_math.h"
#include "../../divergences.h"

// e^x - 1 - x, accurate for small x: Taylor, error 4e-9 x^2 on [-1/2, 1/2].
KLDIV_DEVICE float expm1_minus(float x) {
    float y = fma(x, 2.48015873e-5f, 1.98412698e-4f);
    y = fma(y, x, 1.38888889e-3f);
    y = fma(y, x, 8.33333333e-3f);
    y = fma(y, x, 4.16666667e-2f);
    y = fma(y, x, 1.66666667e-1f);
    y = fma(y, x, 0.5f);
    return select(abs(x) < 0.5f, y * x * x, expm1(x) - x);
}

}  // namespace kldiv::gpu
