"""The kernels for labels: before the sweep their marks, after the gradient their columns.

    mark_kernel             O(labels): a bit for each column that is a label
    label_gradient_kernel   O(labels): the gradients of these columns, which gradient_kernel left as of no label

The columns of a row are gathered, so that the loops over all columns are as fast with a thousand labels as with none.
Labels are loaded where they are used as places: of what a function returns, torch.compile takes every argument for
written to.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kldiv_kernels.backends.triton.device.hooks import (
    gradient_logp,
    gradient_logq,
    logprob_at,
    reference_logprob_at,
    untempered_logprob_at,
    weights,
)
from kldiv_kernels.backends.triton.device.labels import LABELS, mark_of, summed_coefficients
from kldiv_kernels.backends.triton.device.row import load_row, open_row
from kldiv_kernels.backends.triton.device.rows import normalised, softmaxes, with_share
from kldiv_kernels.backends.triton.device.state import TAIL, TEACHER, UNTEMPERED
from kldiv_kernels.backends.triton.device.untempered import untempered_weight, with_untempered


@triton.jit
def mark_kernel(
    marks_ptr, duplicates_ptr, labels_ptr, mask_ptr, vocab: tl.int32, slices: tl.int32, label_count: tl.int32,
    MASK: tl.constexpr, SLICE: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """marks_ptr [n, slices, words, R], 0 before: see labels.py. duplicates_ptr [n]: whether a label occurs twice."""
    index = tl.program_id(0).to(tl.int64)
    duplicates = 0
    keep = True
    if MASK:
        keep = tl.load(mask_ptr + index) != 0
    if keep:
        labels = labels_ptr + index * label_count
        marks = marks_ptr + index * slices * ((SLICE // R + 31) // 32 * R)
        for first in range(0, label_count, LABELS):
            numbers = first + tl.arange(0, LABELS)
            label = tl.load(labels + numbers, mask=numbers < label_count, other=-1).to(tl.int32)
            there = (label >= 0) & (label < vocab)
            word, bit = mark_of(tl.where(there, label, 0), SLICE, R, C)
            # Whichever of two equal labels comes second finds the bit: that there are two does not depend on it.
            before = tl.atomic_or(marks + word, bit, mask=there, sem="relaxed")
            again = there & ((before & bit) != 0)
            duplicates += tl.sum(again.to(tl.int32), axis=0)
    tl.store(duplicates_ptr + index, duplicates)


@triton.jit
def label_gradient_kernel(
    ds_ptr, dt_ptr, state_ptr, coefficients_ptr, s_ptr, t_ptr, labels_ptr, mask_ptr, exclude_ptr, token_ptr,
    s_inner: tl.int64, s_outer: tl.int64, s_stride: tl.int64, t_inner: tl.int64, t_outer: tl.int64, t_stride: tl.int64,
    s_width: tl.int64, t_width: tl.int64, n: tl.int64, vocab: tl.int32, label_count: tl.int32,
    temperature: tl.float32, reference_temperature: tl.float32, alpha: tl.float32, beta: tl.float32,
    FIRST: tl.constexpr, MASK: tl.constexpr, EXCLUDE: tl.constexpr, PER_TOKEN: tl.constexpr, ALIGNED: tl.constexpr,
    LABEL_S: tl.constexpr, LABEL_T: tl.constexpr, OF_S: tl.constexpr, OF_T: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """ds_ptr (with OF_S) and dt_ptr (with OF_T): the gradients at the labels. With LABEL_S, LABEL_T their
    log-probabilities are among the statistics."""
    index = tl.program_id(0).to(tl.int64)
    if MASK:
        if tl.load(mask_ptr + index) == 0:
            return
    TWO: tl.constexpr = (FIRST & TEACHER) != 0
    s_side, t_side, exclude, scale_s, scale_t, alpha, beta = open_row(
        index, s_ptr, s_inner, s_outer, s_stride, t_ptr, t_inner, t_outer, t_stride, exclude_ptr, token_ptr, n,
        temperature, reference_temperature, alpha, beta, TWO, EXCLUDE, PER_TOKEN, ALIGNED,
    )  # fmt: skip
    m_and_z, tail, untempered, finished = load_row(state_ptr + index, n, FIRST)
    ms, zs, mt, zt = m_and_z
    row = softmaxes(ms, zs, mt, zt, s_side[1], t_side[1], TWO)
    labels = labels_ptr + index * label_count
    share_q, share_p, share_untempered, any_coefficient, c, c_tail = weights(
        finished, coefficients_ptr + index, labels, n, label_count, MANY
    )
    weight = untempered_weight(share_untempered, untempered, scale_s, FIRST)
    duplicates = MANY
    if FIRST & TAIL:
        # A tail without mass has no gradient.
        share_q -= tl.where(tail[1] == float("inf"), 0.0, c_tail)
        duplicates = tail[3] != 0.0
    if any_coefficient:
        for first in range(0, label_count, LABELS):
            numbers = first + tl.arange(0, LABELS)
            label = tl.load(labels + numbers, mask=numbers < label_count, other=-1).to(tl.int32)
            there = (label >= 0) & (label < vocab) & (label != exclude)
            s = _gathered(s_side, label, there)
            t = s
            if TWO:
                t = _gathered(t_side, label, there)
            p, q, lp, lq, u = normalised(s, t, s_side, t_side, row, TWO)
            if OF_S:
                g = gradient_logq(c, finished, p, q, lp, lq, u, alpha, beta)
                g = with_untempered(with_share(g, share_q, q), s, weight, FIRST)
                if LABEL_S:
                    at = coefficients_ptr + logprob_at(label_count) * n + index
                    g += summed_coefficients(numbers, label, labels, at, n, label_count, duplicates)
                if FIRST & UNTEMPERED:
                    at = coefficients_ptr + untempered_logprob_at(label_count) * n + index
                    g += summed_coefficients(numbers, label, labels, at, n, label_count, duplicates) / scale_s
                _write_labels(ds_ptr + index * s_width, g, scale_s, label, there)
            if OF_T:
                g = gradient_logp(c, finished, p, q, lp, lq, u, alpha, beta)
                g = with_share(g, share_p, p)
                if LABEL_T:
                    at = coefficients_ptr + reference_logprob_at(label_count) * n + index
                    g += summed_coefficients(numbers, label, labels, at, n, label_count, duplicates)
                _write_labels(dt_ptr + index * t_width, g, scale_t, label, there)


@triton.jit
def _gathered(one_side, label, there):
    """The logits of some columns, as `rows.read` has them."""
    pointer, c, floor = one_side
    x = tl.load(pointer + label, mask=there, other=float("-inf")).to(tl.float32)
    return tl.maximum(x, floor, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _write_labels(to, g, scale, label, there):
    # Equal labels write the same number.
    tl.store(to + label, (g * scale).to(to.dtype.element_ty), mask=there)
