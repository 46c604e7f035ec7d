"""Where a row is, and how its columns are read."""

from __future__ import annotations

import triton
import triton.language as tl

from kldiv_kernels.backends.triton.formulas.math import LN2, LOG2E

# A logit at or below this counts as -inf; finite, so that differences stay finite.
NO_MASS = tl.constexpr(-1e30)


@triton.jit
def offset(index, inner, outer_stride, inner_stride):
    """Elements before row `index` of a tensor with leading dimensions [*, inner]; 64 bits from the first product."""
    return (index // inner) * outer_stride + (index % inner) * inner_stride


@triton.jit
def side(base_ptr, index, inner, outer_stride, inner_stride, temperature, ALIGNED: tl.constexpr):
    """(pointer to the row, c = log2(e)/temperature, floor): exponents are (x − m) c, and x ≤ floor has no mass."""
    pointer = base_ptr + offset(index, inner, outer_stride, inner_stride)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    # x c at the floor stays in the range of floats at low temperatures.
    return pointer, LOG2E / temperature, NO_MASS * tl.minimum(temperature, 1.0)


@triton.jit
def parameters(index, n, token_ptr, temperature, reference_temperature, alpha, beta, PER_TOKEN: tl.constexpr):
    """The four parameters of a row, from [4, n] where they are given per token."""
    if PER_TOKEN:
        temperature = tl.load(token_ptr + index)
        reference_temperature = tl.load(token_ptr + n + index)
        alpha = tl.load(token_ptr + 2 * n + index)
        beta = tl.load(token_ptr + 3 * n + index)
    return temperature, reference_temperature, alpha, beta


@triton.jit
def block_columns(start, R: tl.constexpr, C: tl.constexpr):
    """[R, C] column numbers: a thread takes C neighbours, 16 bytes, and sums over them without other threads."""
    return start + tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]


@triton.jit
def block_limit(columns, C: tl.constexpr, EVEN: tl.constexpr):
    """`columns`, and where it is a multiple of C, in a form that shows it: then masked loads are whole vectors."""
    if EVEN:
        return columns // C * C
    else:
        return columns


@triton.jit
def read(one_side, columns, limit, exclude, MASKED: tl.constexpr, EXCLUDE: tl.constexpr, POLICY: tl.constexpr):
    """Logits of a block as float32, with the floor where a column has no mass or is past the limit. NaN stays NaN."""
    pointer, c, floor = one_side
    if MASKED:
        x = tl.load(pointer + columns, mask=columns < limit, other=float("-inf"), eviction_policy=POLICY)
    else:
        x = tl.load(pointer + columns, eviction_policy=POLICY)
    x = x.to(tl.float32)
    x = tl.maximum(x, floor, propagate_nan=tl.PropagateNan.ALL)
    if EXCLUDE:
        x = tl.where(columns == exclude, floor, x)
    return x


@triton.jit
def softmax_of(m, z, c):
    """(μ, r, 1/z', log z'): with y = x c − μ, softmax(x) = 2^y / z' and log softmax(x) = y ln 2 − log z'.

    μ is m c, rounded, and r what that leaves out: so y is one fused multiply-add, rounded once.
    """
    reference = m * c
    rest = tl.fma(m, c, -reference)
    return reference, rest, tl.exp2(-rest) / z, tl.fma(rest, LN2, tl.log(z))


@triton.jit
def softmaxes(ms, zs, mt, zt, cs, ct, TWO: tl.constexpr):
    """What `normalised` takes of a finished row: (μ, 1/z', log z') of both softmaxes."""
    reference_s, rest_s, over_zs, log_zs = softmax_of(ms, zs, cs)
    if TWO:
        reference_t, rest_t, over_zt, log_zt = softmax_of(mt, zt, ct)
        return reference_s, over_zs, log_zs, reference_t, over_zt, log_zt
    else:
        return reference_s, over_zs, log_zs, 0.0, 0.0, 0.0


@triton.jit
def normalised(s, t, s_side, t_side, row, TEACHER: tl.constexpr):
    """(p, q, log p, log q, log p − log q) of a block; `row` is from `softmaxes`.

    An exponent is rounded once: log p and log q are right to their own last place however large the logits are.
    """
    reference_s, over_zs, log_zs, reference_t, over_zt, log_zt = row
    ys = tl.fma(s, s_side[1], -reference_s)
    q = tl.exp2(ys) * over_zs
    lq = tl.fma(ys, LN2, -log_zs)
    if TEACHER:
        yt = tl.fma(t, t_side[1], -reference_t)
        p = tl.exp2(yt) * over_zt
        lp = tl.fma(yt, LN2, -log_zt)
        u = lp - lq
    else:
        p, lp, u = q, lq, 0.0 * q
    return p, q, lp, lq, u


@triton.jit
def with_share(g, share, softmax):
    """g + share · softmax. A column without mass takes no share of an infinite sum, which outweighs all own terms."""
    taken = tl.where(softmax == 0.0, 0.0, share * softmax)
    return tl.where(tl.abs(share) == float("inf"), taken, g + taken)


@triton.jit
def log_softmax_at(one_side, m, log_z, label, picked, exclude, vocab, SHARED: tl.constexpr):
    """log softmax at some columns; 0 for label −1, −inf where a column has no mass, NaN beyond the vocabulary.

    SHARED: some of them are elsewhere, and the logits of all are at `picked`, −inf where a column is excluded.
    """
    pointer, c, floor = one_side
    nothing = tl.where(log_z != log_z, float("nan"), float("-inf"))
    if SHARED:
        x = tl.load(picked, mask=label != -1, other=0.0)
        value = tl.where(x <= floor, nothing, tl.fma((x - m) * c, LN2, -log_z))
        return tl.where(label == -1, 0.0, value)
    else:
        x = tl.load(pointer + tl.where((label < 0) | (label >= vocab), 0, label)).to(tl.float32)
        value = tl.fma((x - m) * c, LN2, -log_z)
        value = tl.where((x <= floor) | (label == exclude), nothing, value)
        return tl.where(label < 0, 0.0, tl.where(label >= vocab, float("nan"), value))


@triton.jit
def no_mass(one_side, m, z):
    """Whether a row is −inf everywhere, or holds NaN or +inf: it has no softmax."""
    return (z != z) | (m <= 0.5 * one_side[2])
