// Elementary functions over the lanes of one instruction set. Included inside namespace KLDIV_ISA, after the type
// Floats and its operations; in CUDA kernels Floats is float, and exp2 and log are instructions.
//
// Coefficients are near-minimax fits (iteratively reweighted least squares in float64) on the stated interval;
// the errors beside them are those of the polynomial, before rounding to float32. The logarithm's is
// summed in pairs (Estrin): the loops wait on chains of dependent operations more than on their number.

#ifndef KLDIV_EXP2_AND_LOG
// 2^r for |r| up to 1/2, relative error 9.2e-8, 2^0 exactly 1.
KLDIV_FN inline Floats exp2_near(Floats r) {
    Floats y = fma(broadcast(1.326472889e-3f), r, broadcast(9.671513637e-3f));
    y = fma(y, r, broadcast(5.5507337483e-2f));
    y = fma(y, r, broadcast(2.40222420702e-1f));
    y = fma(y, r, broadcast(6.93146977591e-1f));
    return fma(y, r, broadcast(1.0f));
}

// 2^x for x up to 128; 0 below the normal range, NaN for NaN.
KLDIV_FN inline Floats exp2(Floats x) {
    const Floats y = least_power(x), n = rounded(y);
    return times_power_of_two(exp2_near(y - integer(n)), n);
}

// e^x with log2(e) in two parts, so that the error does not grow with |x|.
KLDIV_FN inline Floats exp(Floats x) {
    // Beyond the range of floats the two parts would be inf - inf.
    const Floats bounded = min(broadcast(88.9f), max(broadcast(-200.0f), x));
    const Floats n = rounded(least_power(bounded * broadcast(1.44269504f)));
    const Floats r = fma(bounded, broadcast(1.44269504f), -integer(n));
    return times_power_of_two(exp2_near(fma(bounded, broadcast(1.92596299e-8f), r)), n);
}
#else
// e^x with x log2(e) in two parts, so that the error does not grow with |x|.
KLDIV_FN inline Floats exp(Floats x) {
    // Beyond the range of floats the two parts would be inf - inf.
    const Floats bounded = min(broadcast(200.0f), max(broadcast(-200.0f), x));
    const Floats whole = bounded * broadcast(1.44269504f);
    const Floats rest = fma(bounded, broadcast(1.44269504f), -whole) + bounded * broadcast(1.92596299e-8f);
    return exp2(whole) * fma(rest, broadcast(0.693147181f), broadcast(1.0f));
}
#endif

// log(1 + f) for f in [-1/3, 1/3]: f - f^2/2 + ..., the polynomial's error is 1.6e-7 f^2.
KLDIV_FN inline Floats log1p_near(Floats f) {
    const Floats square = f * f, fourth = square * square;
    const Floats c0 = fma(broadcast(3.33332205275e-1f), f, broadcast(-4.99999851958e-1f));
    const Floats c2 = fma(broadcast(2.00109856439e-1f), f, broadcast(-2.50042062599e-1f));
    const Floats c4 = fma(broadcast(1.39882716018e-1f), f, broadcast(-1.64815656551e-1f));
    const Floats c6 = fma(broadcast(1.40957017953e-1f), f, broadcast(-1.50495129243e-1f));
    const Floats y = fma(fma(c6, square, c4), fourth, fma(c2, square, c0));
    return fma(y, square, f);
}

#ifndef KLDIV_EXP2_AND_LOG
KLDIV_FN inline Floats log(Floats x) {
    Floats exponent;
    const Floats mantissa = split(x, &exponent);
    return fma(exponent, broadcast(0.693147181f), log1p_near(mantissa - broadcast(1.0f)));
}
#endif

// e^x - 1, accurate for small x; the polynomial's error is 6.3e-9 x^2 on [-0.4, 0.4].
KLDIV_FN inline Floats expm1(Floats x) {
    Floats y = fma(broadcast(1.986327967504e-4f), x, broadcast(1.394845495634e-3f));
    y = fma(y, x, broadcast(8.333381947832e-3f));
    y = fma(y, x, broadcast(4.166630983643e-2f));
    y = fma(y, x, broadcast(1.666666634923e-1f));
    y = fma(y, x, broadcast(5.000000031585e-1f));
    const Floats near = fma(y * x, x, x);
    return select(abs(x) < broadcast(0.4f), near, exp(x) - broadcast(1.0f));
}
