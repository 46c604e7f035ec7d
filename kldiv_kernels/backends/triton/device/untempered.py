"""The softmax of the student's logits as they are, beside the one at the call's temperature.

Where untempered_logprob is asked for, it has m and z = Σ 2^((x − m) log2(e)) of its own over the same columns. They are
moved and merged as those of the state (state.py), behind which they stand in memory. Else all of this is ().

The gradient, onehot(y) − softmax, is not divided by the temperature. It is multiplied by it, because all gradients are
divided in the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kldiv_kernels.backends.triton.device.rows import no_mass, softmax_of
from kldiv_kernels.backends.triton.device.state import NOTHING, STATE_SIZE, UNTEMPERED, load_parts, merged_sum
from kldiv_kernels.backends.triton.formulas.math import LOG2E


@triton.jit
def empty_untempered(R: tl.constexpr, FIRST: tl.constexpr):
    """(m, z) of no columns, R times."""
    if FIRST & UNTEMPERED:
        return tl.full([R], NOTHING, tl.float32), tl.zeros([R], tl.float32)
    else:
        return ()


@triton.jit
def add_untempered(untempered, largest, s_blocks, FIRST: tl.constexpr):
    """(m, z) of lanes [R] and some blocks of columns [R, C]; `largest` is the largest logit of both, the new m."""
    if FIRST & UNTEMPERED:
        m, z = untempered
        z *= tl.exp2((m - largest) * LOG2E)
        for i in tl.static_range(len(s_blocks)):
            z += tl.sum(tl.exp2((s_blocks[i] - largest[:, None]) * LOG2E), axis=1)
        untempered = (largest, z)
    return untempered


@triton.jit
def merge_untempered(untempered, FIRST: tl.constexpr):
    """(m, z) of lanes [R], merged into one (scalars)."""
    if FIRST & UNTEMPERED:
        untempered = merged_sum(untempered[0], untempered[1], LOG2E)
    return untempered


@triton.jit
def load_untempered(
    pointer, index, parts, row, step, FIRST: tl.constexpr, WIDTH: tl.constexpr, S_PAD: tl.constexpr
):  # fmt: skip
    """(m, z) that a row's parts left behind their states, in lanes; see `load_parts`."""
    untempered = empty_untempered(S_PAD, FIRST)
    if FIRST & UNTEMPERED:
        untempered = load_parts(pointer, index, parts, row, step, untempered, STATE_SIZE, WIDTH)
    return untempered


@triton.jit
def take_untempered(untempered, s_side, FIRST: tl.constexpr):
    """(m, z) of a row, merged from lanes, with z NaN where there is no softmax."""
    if FIRST & UNTEMPERED:
        m, z = merge_untempered(untempered, FIRST)
        untempered = (m, tl.where(no_mass(s_side, m, z), float("nan"), z))
    return untempered


@triton.jit
def untempered_side(s_side):
    """The side of a row (`rows.side`) at temperature 1."""
    pointer, c, floor = s_side
    return pointer, LOG2E, floor


@triton.jit
def untempered_weight(share, untempered, scale, FIRST: tl.constexpr):
    """(μ, w), for `with_untempered`; share: the softmax's coefficient, scale: 1/temperature."""
    if FIRST & UNTEMPERED:
        reference, _, over_z, _ = softmax_of(untempered[0], untempered[1], LOG2E)
        untempered = (reference, share / scale * over_z)
    return untempered


@triton.jit
def with_untempered(g, s, weight, FIRST: tl.constexpr):
    """g + share · temperature · softmax of the logits s."""
    if FIRST & UNTEMPERED:
        g += weight[1] * tl.exp2(tl.fma(s, LOG2E, -weight[0]))
    return g
