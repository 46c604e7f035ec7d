"""Elementary functions for the kernels, the twin of `csrc/fast_math.h`: no libdevice, so every device has them.

Coefficients and errors are those of the C++ header unless stated. Sums that a fused multiply-add should take are
written as one: the kernels are compiled without contraction, so that every kernel gives a row the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

# log2(e) in float32, and what is missing from it.
LOG2E = tl.constexpr(1.44269504)
LOG2E_LOW = tl.constexpr(1.92596299e-8)
LN2 = tl.constexpr(0.6931471805599453)
# As a power: Triton 3.6 makes a float64 of a constant below it, which the nine digits 1.17549435e-38 are.
SMALLEST_NORMAL = tl.constexpr(2.0**-126)
# The instruction lg2.approx takes the place of a logarithm of twenty instructions; set when kernels are bound.
NVIDIA = tl.constexpr(False)


@triton.jit
def exp(x):
    """e^x with x log2(e) in two parts, so that the error does not grow with |x|."""
    # Beyond the range of floats the two parts would be inf - inf. NaN stays.
    bounded = tl.where(x > 200.0, 200.0, tl.where(x < -200.0, -200.0, x))
    whole = bounded * LOG2E
    rest = tl.fma(bounded, LOG2E, -whole) + bounded * LOG2E_LOW
    return tl.exp2(whole) * tl.fma(rest, LN2, 1.0)


@triton.jit
def expm1(x):
    """e^x − 1, accurate for small x; the polynomial's error is 6.3e-9 x² on [−0.4, 0.4]."""
    y = tl.fma(x, 1.986327967504e-4, 1.394845495634e-3)
    y = tl.fma(y, x, 8.333381947832e-3)
    y = tl.fma(y, x, 4.166630983643e-2)
    y = tl.fma(y, x, 1.666666634923e-1)
    y = tl.fma(y, x, 5.000000031585e-1)
    return tl.where(tl.abs(x) < 0.4, tl.fma(y * x, x, x), exp(x) - 1.0)


@triton.jit
def expm1_minus(x):
    """e^x − 1 − x, accurate for small x: Taylor, error 4e-9 x² on [−1/2, 1/2]."""
    y = tl.fma(x, 2.48015873e-5, 1.98412698e-4)
    y = tl.fma(y, x, 1.38888889e-3)
    y = tl.fma(y, x, 8.33333333e-3)
    y = tl.fma(y, x, 4.16666667e-2)
    y = tl.fma(y, x, 1.66666667e-1)
    y = tl.fma(y, x, 0.5)
    return tl.where(tl.abs(x) < 0.5, y * x * x, expm1(x) - x)


@triton.jit
def log(x):
    """The natural logarithm; on NVIDIA to 2^-22 absolute near 1 and relative elsewhere, for x ≥ the smallest normal."""
    if NVIDIA:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)
        return y * LN2
    else:
        return tl.log(x)


@triton.jit
def log1p(x):
    """log(1 + x), accurate for small x; the polynomial's error is 1.6e-7 x² on [−1/3, 1/3]."""
    y = tl.fma(x, 1.40957017953e-1, -1.50495129243e-1)
    y = tl.fma(y, x, 1.39882716018e-1)
    y = tl.fma(y, x, -1.64815656551e-1)
    y = tl.fma(y, x, 2.00109856439e-1)
    y = tl.fma(y, x, -2.50042062599e-1)
    y = tl.fma(y, x, 3.33332205275e-1)
    y = tl.fma(y, x, -4.99999851958e-1)
    far = log(tl.where(x < SMALLEST_NORMAL - 1.0, SMALLEST_NORMAL, 1.0 + x))
    return tl.where(tl.abs(x) < 0.3, tl.fma(y * x, x, x), far)


@triton.jit
def kl_term(a, b, x):
    """a log(a/b) − a + b = b φ(x) ≥ 0 with x = log(a/b), φ(x) = x e^x − e^x + 1.

    φ(x)/x² by a polynomial of relative error 1.5e-7 on [−1/4, 1/4].
    """
    y = tl.fma(x, 6.938634027e-3, 3.3426233992e-2)
    y = tl.fma(y, x, 1.25000997961e-1)
    y = tl.fma(y, x, 3.33331887995e-1)
    y = tl.fma(y, x, 4.99999990581e-1)
    return tl.where(tl.abs(x) < 0.25, (b * x) * (x * y), tl.fma(a, x, b - a))
