"""The labels of a row: as marks that a sweep over its columns leaves out, and many at a time as columns by themselves.

The marks are bits, in the order in which a program meets the columns. Lane l of a slice takes the columns c of block b
that stand at (b R + l) C + c in it, and its bit b C + c says that this one is a label: words [slices, words, R], of
which a lane reads its own before its loop, so that nothing but the logits is loaded within. A 16th of bf16 logits.

With L the distinct labels of a row, r the softmax over the other columns and q_L = Σ_L q, of tail_logprob

    value = log Σ_{j∉L} q_j,    ∂/∂s_j = q_L r_j (j ∉ L),  −q_j (j ∈ L),

where neither side of a difference is larger than it: q_L is summed over the labels themselves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kldiv_kernels.backends.triton.device.rows import no_mass, softmaxes
from kldiv_kernels.backends.triton.device.state import BOTH, NOTHING, merged_sum
from kldiv_kernels.backends.triton.formulas.math import LN2

# How many a program takes at a time.
LABELS = tl.constexpr(128)


@triton.jit
def mark_of(label, SLICE: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """The word of a label's bit among those of its row, and the word with that bit alone."""
    WORDS: tl.constexpr = (SLICE // R + 31) // 32
    at = label % SLICE
    number = at // (R * C) * C + at % C
    word = (label // SLICE * WORDS + number // 32) * R + at // C % R
    return word, tl.full(label.shape, 1, tl.int32) << (number % 32)


@triton.jit
def load_marks(marks, SLICE: tl.constexpr, R: tl.constexpr):
    """The words [R] of a slice that start at `marks`."""
    words = ()
    for i in tl.static_range((SLICE // R + 31) // 32):
        word = tl.load(marks + i * R + tl.arange(0, R), eviction_policy="evict_first")
        words = words + (word.to(tl.uint32, bitcast=True),)
    return words


@triton.jit
def unmarked(x, words, first: tl.constexpr, instead, C: tl.constexpr):
    """x [R, C] with `instead` at the labels; `first` is the number of the first bit."""
    bits = words[0][:, None] >> (first + tl.arange(0, C))[None, :].to(tl.uint32)
    return tl.where((bits & 1) != 0, instead, x)


@triton.jit
def advanced(words, BITS: tl.constexpr):
    """The words without their lowest bits."""
    out = ()
    for i in tl.static_range(len(words)):
        word = words[i] >> BITS
        if i + 1 < len(words):
            word = word | (words[i + 1] << (32 - BITS))
        out = out + (word,)
    return out


@triton.jit
def label_weight(coefficients, labels, n, label_count, MANY: tl.constexpr):
    """(sum of the labels' coefficients, how many are not 0)"""
    if MANY:
        total, count = 0.0, 0
        for first in range(0, label_count, LABELS):
            numbers = first + tl.arange(0, LABELS)
            there = numbers < label_count
            # Those that other processes have take their shares here, too.
            there = there & (tl.load(labels + numbers, mask=there, other=-1) != -1)
            x = tl.load(coefficients + numbers * n, mask=there, other=0.0)
            total += tl.sum(x, axis=0)
            count += tl.sum((x != 0.0).to(tl.int32), axis=0)
    else:
        total = tl.where(tl.load(labels) == -1, 0.0, tl.load(coefficients))
        count = (total != 0.0).to(tl.int32)
    return total, count


@triton.jit
def occurs_before(numbers, label, labels, end):
    """Whether a label stands in the row with a smaller number; `end` is above them all."""
    again = numbers < 0
    for j in range(end):
        again = again | ((label == tl.load(labels + j).to(tl.int32)) & (j < numbers))
    return again


@triton.jit
def summed_coefficients(numbers, label, labels, coefficients, n, label_count, duplicates):
    """For each label the coefficients of all labels that are the same column."""
    if duplicates:
        total = tl.zeros(label.shape, tl.float32)
        for j in range(label_count):
            same = label == tl.load(labels + j).to(tl.int32)
            total += tl.where(same, tl.load(coefficients + j * n), 0.0)
    else:
        total = tl.load(coefficients + numbers * n, mask=numbers < label_count, other=0.0)
    return total


@triton.jit
def sum_of_labels(s_side, labels, label_count, exclude, vocab, duplicates):
    """(m, z) of the columns that are labels, each of them once."""
    pointer, c, floor = s_side
    m = tl.full([LABELS], NOTHING, tl.float32)
    z = tl.zeros([LABELS], tl.float32)
    for first in range(0, label_count, LABELS):
        numbers = first + tl.arange(0, LABELS)
        label = tl.load(labels + numbers, mask=numbers < label_count, other=-1).to(tl.int32)
        there = (label >= 0) & (label < vocab) & (label != exclude)
        if duplicates:
            end = tl.minimum(first + LABELS, label_count)
            there = there & (occurs_before(numbers, label, labels, end) == 0)
        x = tl.load(pointer + label, mask=there, other=float("-inf")).to(tl.float32)
        x = tl.where(there, tl.maximum(x, floor, propagate_nan=tl.PropagateNan.ALL), NOTHING)
        to = tl.maximum(m, x)
        z = z * tl.exp2((m - to) * c) + tl.where(there, tl.exp2((x - to) * c), 0.0)
        m = to
    return merged_sum(m, z, c)


@triton.jit
def no_labels(R: tl.constexpr):
    """What a shard says of its labels, of none of them, R times: (m, z), and how many occur twice."""
    zero = tl.zeros([R], tl.float32)
    return tl.full([R], NOTHING, tl.float32), zero, zero


@triton.jit
def take_tail(state, s_side, of_labels, FIRST: tl.constexpr):
    """(state with the sums of all columns, (m_r, z_r, q_L)), with m and z of the labels.

    z_r is infinite where the tail has no mass: then every r is 0; and NaN where the row has no softmax.
    """
    c = s_side[1]
    ms, zs, es, bs, mt, zt, et, bt, forward, reverse, hellinger, best, column, mr, zr = state
    ml, zl = of_labels
    if (FIRST & BOTH) == 0:
        mr, zr = ms, zs
        ms = tl.maximum(mr, ml)
        zs = zr * tl.exp2((mr - ms) * c) + zl * tl.exp2((ml - ms) * c)
    nothing = no_mass(s_side, mr, zr)
    bad = no_mass(s_side, ms, zs)
    share = zl * tl.exp2((ml - ms) * c) / zs
    mr = tl.where(nothing, 0.0, mr)
    zr = tl.where(bad, float("nan"), tl.where(nothing, float("inf"), zr))
    whole = ms, zs, es, bs, mt, zt, et, bt, forward, reverse, hellinger, best, column, mr, zr
    return whole, (mr, zr, share)


@triton.jit
def tail_value(s_side, m_and_z, tail):
    """log Σ q over the tail."""
    ms, zs, mt, zt = m_and_z
    mr, zr, _ = tail
    value = tl.fma((mr - ms) * s_side[1], LN2, tl.log(zr) - tl.log(zs))
    return tl.where(zr == float("inf"), float("-inf"), value)


@triton.jit
def tail_gradient(c_tail, share_q, row, m_and_z, tail, s_side, t_side, FIRST: tl.constexpr):
    """What the columns that are no label take: (row, share_q, (μ_r, 1/z_r, weight of r)).

    Where r stands in for q, which is q_tail r there, nothing of a small tail underflows.
    """
    ms, zs, mt, zt = m_and_z
    mr, zr, of_labels, _ = tail
    alone = softmaxes(mr, zr, mt, zt, s_side[1], t_side[1], False)
    weight = c_tail * of_labels
    if FIRST & BOTH:
        return row, share_q, (alone[0], alone[1], weight)
    else:
        of_tail = tl.where(zr == float("inf"), 0.0, zr * tl.exp2((mr - ms) * s_side[1]) / zs)
        return alone, weight + share_q * of_tail, (0.0, 0.0, 0.0)
