"""The kernels for rows whose columns are spread over processes: O(rows), between a process's slices and what it says.

merge_states_kernel   the states of its slices, merged; with TAIL also what it has to say of its labels
merge_sums_kernel     their sums, merged
"""

from __future__ import annotations

import triton
import triton.language as tl

from kldiv_kernels.backends.triton.device.hooks import merge_sums, zero_sums
from kldiv_kernels.backends.triton.device.labels import sum_of_labels
from kldiv_kernels.backends.triton.device.row import open_row
from kldiv_kernels.backends.triton.device.state import STATE_SIZE, TAIL, TEACHER, empty, load_parts, merge
from kldiv_kernels.backends.triton.device.untempered import empty_untempered, load_untempered, merge_untempered


@triton.jit
def merge_states_kernel(
    states_ptr, partial_ptr, s_ptr, t_ptr, labels_ptr, duplicates_ptr, mask_ptr, exclude_ptr, token_ptr,
    s_inner: tl.int64, s_outer: tl.int64, s_stride: tl.int64, t_inner: tl.int64, t_outer: tl.int64, t_stride: tl.int64,
    n: tl.int64, vocab: tl.int32, slices: tl.int32, label_count: tl.int32, first_column: tl.int32,
    temperature: tl.float32, reference_temperature: tl.float32, alpha: tl.float32, beta: tl.float32,
    FIRST: tl.constexpr, MASK: tl.constexpr, EXCLUDE: tl.constexpr, PER_TOKEN: tl.constexpr,
    ALIGNED: tl.constexpr, WIDTH: tl.constexpr, S_PAD: tl.constexpr,
):  # fmt: skip
    """states_ptr [n, WIDTH] from partial_ptr [n, slices, numbers]; columns are counted on from `first_column`.

    Behind the state, with UNTEMPERED: m and z at temperature 1. Behind those, with TAIL: m and z of the labels that are
    here, and how many of them occur twice.
    """
    index = tl.program_id(0).to(tl.int64)
    if MASK:
        if tl.load(mask_ptr + index) == 0:
            return
    s_side, t_side, exclude, _, _, _, _ = open_row(
        index, s_ptr, s_inner, s_outer, s_stride, t_ptr, t_inner, t_outer, t_stride, exclude_ptr, token_ptr, n,
        temperature, reference_temperature, alpha, beta, (FIRST & TEACHER) != 0, EXCLUDE, PER_TOKEN, ALIGNED,
    )  # fmt: skip
    PART: tl.constexpr = STATE_SIZE + len(empty_untempered(S_PAD, FIRST))
    found = load_parts(partial_ptr, index, slices, slices, 1, empty(S_PAD), 0, PART)
    ms, zs, es, bs, mt, zt, et, bt, forward, reverse, hellinger, best, column, mr, zr = merge(
        found, s_side[1], t_side[1], FIRST
    )
    column = column.to(tl.float32) + first_column
    said = ms, zs, es, bs, mt, zt, et, bt, forward, reverse, hellinger, best, column, mr, zr
    untempered = load_untempered(partial_ptr, index, slices, slices, 1, FIRST, PART, S_PAD)
    said = said + merge_untempered(untempered, FIRST)
    if FIRST & TAIL:
        duplicates = tl.load(duplicates_ptr + index)
        labels = labels_ptr + index * label_count
        said = said + sum_of_labels(s_side, labels, label_count, exclude, vocab, duplicates != 0)
        said = said + (duplicates.to(tl.float32),)
    for i in tl.static_range(len(said)):
        tl.store(states_ptr + index * WIDTH + i, said[i])


@triton.jit
def merge_sums_kernel(
    merged_ptr, sums_ptr, mask_ptr, slices: tl.int32, MASK: tl.constexpr, S_PAD: tl.constexpr
):  # fmt: skip
    """merged_ptr [n, sums] from sums_ptr [n, slices, sums]."""
    index = tl.program_id(0).to(tl.int64)
    if MASK:
        if tl.load(mask_ptr + index) == 0:
            return
    nothing = zero_sums(S_PAD)
    merged = merge_sums(load_parts(sums_ptr, index, slices, slices, 1, nothing, 0, len(nothing)))
    for i in tl.static_range(len(merged)):
        tl.store(merged_ptr + index * len(merged) + i, merged[i])
