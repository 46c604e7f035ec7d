"""The kernels: how rows and slices of rows are spread over programs.

Few rows: a program takes one slice of one row, and the slices' results are merged in the order of the slices.

    sweep_kernel      one read: the state of each slice
    sums_kernel       one read: the sums of the terms that need the finished softmaxes, where a statistic has any
    finish_kernel     O(rows): statistics, and what the gradient needs
    gradient_kernel   one read, one write: coefficients to gradients

Many rows: `loss_kernel` does all of that for one row in one program. It calls the same functions on the same slices in
the same order, so that a row gets the same bits either way. Traffic (u: one pass over one [N, V] tensor): a loss of two
tensors 5u, 7u with sums; of one tensor 3u; statistics alone 2u (4u) and 1u.

Rows whose columns are spread over processes take the first form: what the slices of a process left is merged by
`shard_kernels.py`, and sums_kernel and finish_kernel merge what all processes say of a row instead of its slices.

Many labels a row, and what is left without them, always take the first form, with kernels of `label_kernels.py` before
the sweep and after the gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kldiv_kernels.backends.triton.device.hooks import merge_sums, save_finished, zero_sums
from kldiv_kernels.backends.triton.device.labels import no_labels, sum_of_labels, tail_value, take_tail
from kldiv_kernels.backends.triton.device.row import finish_row, load_row, open_row, take_row, write_nothing, write_row
from kldiv_kernels.backends.triton.device.rows import softmaxes
from kldiv_kernels.backends.triton.device.slices import slice_state, slice_sums, write_gradient, write_zeros
from kldiv_kernels.backends.triton.device.state import (
    STATE_SIZE,
    TAIL,
    TEACHER,
    empty,
    load_parts,
    merge,
    merged_sum,
    put,
)
from kldiv_kernels.backends.triton.device.untempered import empty_untempered, load_untempered, take_untempered


@triton.jit
def sweep_kernel(
    partial_ptr, s_ptr, t_ptr, marks_ptr, mask_ptr, exclude_ptr, token_ptr,
    s_inner: tl.int64, s_outer: tl.int64, s_stride: tl.int64, t_inner: tl.int64, t_outer: tl.int64, t_stride: tl.int64,
    n: tl.int64, vocab: tl.int32, slices: tl.int32,
    temperature: tl.float32, reference_temperature: tl.float32, alpha: tl.float32, beta: tl.float32,
    FIRST: tl.constexpr, MASK: tl.constexpr, EXCLUDE: tl.constexpr, PER_TOKEN: tl.constexpr,
    ALIGNED: tl.constexpr, EVEN: tl.constexpr, SLICE: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """partial_ptr [n, slices, numbers]: the state of each slice, and behind it what untempered.py has. One read of the
    logits; for the tail also one of marks_ptr, see labels.py."""
    program = tl.program_id(0).to(tl.int64)
    index = program // slices
    if MASK:
        if tl.load(mask_ptr + index) == 0:
            return
    s_side, t_side, exclude, _, _, _, _ = open_row(
        index, s_ptr, s_inner, s_outer, s_stride, t_ptr, t_inner, t_outer, t_stride, exclude_ptr, token_ptr, n,
        temperature, reference_temperature, alpha, beta, (FIRST & TEACHER) != 0, EXCLUDE, PER_TOKEN, ALIGNED,
    )  # fmt: skip
    begin = (program % slices).to(tl.int32) * SLICE
    end = tl.minimum(begin + SLICE, vocab)
    marks = marks_ptr + program * ((SLICE // R + 31) // 32 * R)
    state, untempered = slice_state(begin, end, s_side, t_side, exclude, marks, FIRST, EXCLUDE, EVEN, SLICE, R, C)
    found = state + untempered
    for i in tl.static_range(len(found)):
        tl.store(partial_ptr + program * len(found) + i, found[i].to(tl.float32))


@triton.jit
def sums_kernel(
    sums_ptr, partial_ptr, s_ptr, t_ptr, mask_ptr, exclude_ptr, token_ptr,
    s_inner: tl.int64, s_outer: tl.int64, s_stride: tl.int64, t_inner: tl.int64, t_outer: tl.int64, t_stride: tl.int64,
    n: tl.int64, vocab: tl.int32, slices: tl.int32, parts: tl.int32, part_row: tl.int64, part_step: tl.int64,
    temperature: tl.float32, reference_temperature: tl.float32, alpha: tl.float32, beta: tl.float32,
    FIRST: tl.constexpr, MASK: tl.constexpr, EXCLUDE: tl.constexpr, PER_TOKEN: tl.constexpr,
    ALIGNED: tl.constexpr, EVEN: tl.constexpr, SLICE: tl.constexpr, WIDTH: tl.constexpr, S_PAD: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """sums_ptr [n, slices, sums]: the sums of each slice's terms, with the row's state merged from its `parts` at
    partial_ptr (see `load_parts`). One read of the logits."""
    program = tl.program_id(0).to(tl.int64)
    index = program // slices
    if MASK:
        if tl.load(mask_ptr + index) == 0:
            return
    TWO: tl.constexpr = (FIRST & TEACHER) != 0
    s_side, t_side, exclude, _, _, alpha, beta = open_row(
        index, s_ptr, s_inner, s_outer, s_stride, t_ptr, t_inner, t_outer, t_stride, exclude_ptr, token_ptr, n,
        temperature, reference_temperature, alpha, beta, TWO, EXCLUDE, PER_TOKEN, ALIGNED,
    )  # fmt: skip
    found = load_parts(partial_ptr, index, parts, part_row, part_step, empty(S_PAD), 0, WIDTH)
    state = merge(found, s_side[1], t_side[1], FIRST)
    m_and_z, _ = take_row(state, s_side, t_side, FIRST)
    ms, zs, mt, zt = m_and_z
    begin = (program % slices).to(tl.int32) * SLICE
    end = tl.minimum(begin + SLICE, vocab)
    row = softmaxes(ms, zs, mt, zt, s_side[1], t_side[1], TWO)
    sums = slice_sums(begin, end, s_side, t_side, row, exclude, alpha, beta, TWO, EXCLUDE, EVEN, R, C)
    for i in tl.static_range(len(sums)):
        tl.store(sums_ptr + program * len(sums) + i, sums[i])


@triton.jit
def finish_kernel(
    values_ptr, state_ptr, partial_ptr, sums_ptr, s_ptr, t_ptr, labels_ptr, duplicates_ptr, picked_ptr, mask_ptr,
    exclude_ptr, token_ptr,
    s_inner: tl.int64, s_outer: tl.int64, s_stride: tl.int64, t_inner: tl.int64, t_outer: tl.int64, t_stride: tl.int64,
    n: tl.int64, vocab: tl.int32, parts: tl.int32, part_row: tl.int64, part_step: tl.int64, label_count: tl.int32,
    value_rows: tl.int32,
    temperature: tl.float32, reference_temperature: tl.float32, alpha: tl.float32, beta: tl.float32,
    FIRST: tl.constexpr, MASK: tl.constexpr, EXCLUDE: tl.constexpr, PER_TOKEN: tl.constexpr,
    ALIGNED: tl.constexpr, SAVE: tl.constexpr, SHARED: tl.constexpr, WIDTH: tl.constexpr, S_PAD: tl.constexpr,
):  # fmt: skip
    """values_ptr [value_rows, n], and with SAVE state_ptr [state_rows, n] for the gradient. O(n) bytes.

    The row's parts at partial_ptr and sums_ptr are its slices; with SHARED its shards, what these say of their labels
    stands behind their states, and picked_ptr has the logits at all labels.
    """
    index = tl.program_id(0).to(tl.int64)
    if MASK:
        if tl.load(mask_ptr + index) == 0:
            write_nothing(values_ptr, index, n, value_rows)
            return
    TWO: tl.constexpr = (FIRST & TEACHER) != 0
    s_side, t_side, exclude, _, _, alpha, beta = open_row(
        index, s_ptr, s_inner, s_outer, s_stride, t_ptr, t_inner, t_outer, t_stride, exclude_ptr, token_ptr, n,
        temperature, reference_temperature, alpha, beta, TWO, EXCLUDE, PER_TOKEN, ALIGNED,
    )  # fmt: skip
    found = load_parts(partial_ptr, index, parts, part_row, part_step, empty(S_PAD), 0, WIDTH)
    state = merge(found, s_side[1], t_side[1], FIRST)
    untempered = load_untempered(partial_ptr, index, parts, part_row, part_step, FIRST, WIDTH, S_PAD)
    OF_LABELS: tl.constexpr = STATE_SIZE + len(untempered)
    untempered = take_untempered(untempered, s_side, FIRST)
    if FIRST & TAIL:
        if SHARED:
            ml, zl, twice = load_parts(
                partial_ptr, index, parts, part_row, part_step, no_labels(S_PAD), OF_LABELS, WIDTH
            )
            of_labels = merged_sum(ml, zl, s_side[1])
            duplicates = tl.max(twice, axis=0)
        else:
            duplicates = tl.load(duplicates_ptr + index)
            of_labels = sum_of_labels(
                s_side, labels_ptr + index * label_count, label_count, exclude, vocab, duplicates != 0
            )
        state, tail = take_tail(state, s_side, of_labels, FIRST)
    m_and_z, first = take_row(state, s_side, t_side, FIRST)
    tail_logprob = 0.0
    if FIRST & TAIL:
        tail_logprob = tail_value(s_side, m_and_z, tail)
    sums = zero_sums(S_PAD)
    if len(sums) > 0:
        sums = load_parts(sums_ptr, index, parts, part_row, part_step, sums, 0, len(sums))
    finished = finish_row(state, m_and_z, first, merge_sums(sums), s_side, t_side, alpha, beta, FIRST)
    write_row(
        finished, state, m_and_z, untempered, tail_logprob, s_side, t_side, exclude, vocab, values_ptr, index, n,
        labels_ptr, label_count, picked_ptr, TWO, SHARED,
    )  # fmt: skip
    if SAVE:
        saved = m_and_z
        if FIRST & TAIL:
            saved = saved + tail + (duplicates.to(tl.float32),)
        saved = saved + untempered
        for i in tl.static_range(len(saved)):
            tl.store(state_ptr + i * n + index, saved[i])
        save_finished(finished, state_ptr + len(saved) * n + index, n)


@triton.jit
def gradient_kernel(
    ds_ptr, dt_ptr, state_ptr, coefficients_ptr, s_ptr, t_ptr, labels_ptr, mask_ptr, exclude_ptr, token_ptr,
    s_inner: tl.int64, s_outer: tl.int64, s_stride: tl.int64, t_inner: tl.int64, t_outer: tl.int64, t_stride: tl.int64,
    s_width: tl.int64, t_width: tl.int64,
    n: tl.int64, vocab: tl.int32, slices: tl.int32, label_count: tl.int32,
    temperature: tl.float32, reference_temperature: tl.float32, alpha: tl.float32, beta: tl.float32,
    FIRST: tl.constexpr, MASK: tl.constexpr, EXCLUDE: tl.constexpr, PER_TOKEN: tl.constexpr,
    ALIGNED: tl.constexpr, EVEN: tl.constexpr, SLICE: tl.constexpr, STUDENT: tl.constexpr, REFERENCE: tl.constexpr,
    LABEL_S: tl.constexpr, LABEL_T: tl.constexpr, MANY: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """ds_ptr [n, s_width], dt_ptr [n, t_width]: a slice of the gradients of Σ coefficients · values.

    One read of the logits, one write of each gradient; the last slice also zeroes the padding columns.
    """
    program = tl.program_id(0).to(tl.int64)
    index = program // slices
    slice_index = (program % slices).to(tl.int32)
    begin = slice_index * SLICE
    end = tl.minimum(begin + SLICE, vocab)
    keep = True
    if MASK:
        keep = tl.load(mask_ptr + index) != 0
    TWO: tl.constexpr = (FIRST & TEACHER) != 0
    s_side, t_side, exclude, scale_s, scale_t, alpha, beta = open_row(
        index, s_ptr, s_inner, s_outer, s_stride, t_ptr, t_inner, t_outer, t_stride, exclude_ptr, token_ptr, n,
        temperature, reference_temperature, alpha, beta, TWO, EXCLUDE, PER_TOKEN, ALIGNED,
    )  # fmt: skip
    m_and_z, tail, untempered, finished = load_row(state_ptr + index, n, FIRST)
    write_gradient(
        slice_index == slices - 1, keep, begin, end, vocab, s_side, t_side, m_and_z, tail, untempered,
        exclude, alpha, beta, scale_s, scale_t, finished, ds_ptr, dt_ptr, s_width, t_width, coefficients_ptr,
        labels_ptr, index, n, label_count, FIRST, STUDENT, REFERENCE, LABEL_S, LABEL_T, MANY, EXCLUDE, ALIGNED,
        EVEN, R, C,
    )  # fmt: skip


@triton.jit
def loss_kernel(
    values_ptr, ds_ptr, dt_ptr, coefficients_ptr, s_ptr, t_ptr, labels_ptr, mask_ptr, exclude_ptr, token_ptr,
    s_inner: tl.int64, s_outer: tl.int64, s_stride: tl.int64, t_inner: tl.int64, t_outer: tl.int64, t_stride: tl.int64,
    s_width: tl.int64, t_width: tl.int64,
    n: tl.int64, vocab: tl.int32, slices: tl.int32, label_count: tl.int32,
    value_rows: tl.int32,
    temperature: tl.float32, reference_temperature: tl.float32, alpha: tl.float32, beta: tl.float32,
    FIRST: tl.constexpr, MASK: tl.constexpr, EXCLUDE: tl.constexpr, PER_TOKEN: tl.constexpr,
    ALIGNED: tl.constexpr, EVEN: tl.constexpr, SLICE: tl.constexpr, STUDENT: tl.constexpr, REFERENCE: tl.constexpr,
    LABEL_S: tl.constexpr, LABEL_T: tl.constexpr, MANY: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, S_PAD: tl.constexpr,
):  # fmt: skip
    """A row's statistics and gradients: sweep, sums where a statistic has any, gradient, in one program."""
    tl.static_assert((FIRST & TAIL) == 0 and not MANY)
    index = tl.program_id(0).to(tl.int64)
    if MASK:
        if tl.load(mask_ptr + index) == 0:
            write_nothing(values_ptr, index, n, value_rows)
            if STUDENT:
                write_zeros(ds_ptr + index * s_width, 0, tl.cast(s_width, tl.int32), R, C)
            if REFERENCE:
                write_zeros(dt_ptr + index * t_width, 0, tl.cast(t_width, tl.int32), R, C)
            return
    TWO: tl.constexpr = (FIRST & TEACHER) != 0
    s_side, t_side, exclude, scale_s, scale_t, alpha, beta = open_row(
        index, s_ptr, s_inner, s_outer, s_stride, t_ptr, t_inner, t_outer, t_stride, exclude_ptr, token_ptr, n,
        temperature, reference_temperature, alpha, beta, TWO, EXCLUDE, PER_TOKEN, ALIGNED,
    )  # fmt: skip
    lanes = tl.arange(0, S_PAD)
    states, untempered = empty(S_PAD), empty_untempered(S_PAD, FIRST)
    for i in range(slices):
        begin = i * SLICE
        end = tl.minimum(begin + SLICE, vocab)
        of_state, of_untempered = slice_state(
            begin, end, s_side, t_side, exclude, labels_ptr, FIRST, EXCLUDE, EVEN, SLICE, R, C
        )
        states = put(states, i, lanes, of_state)
        untempered = put(untempered, i, lanes, of_untempered)
    state = merge(states, s_side[1], t_side[1], FIRST)
    untempered = take_untempered(untempered, s_side, FIRST)
    m_and_z, first = take_row(state, s_side, t_side, FIRST)
    ms, zs, mt, zt = m_and_z
    row = softmaxes(ms, zs, mt, zt, s_side[1], t_side[1], TWO)
    sums = zero_sums(S_PAD)
    if len(sums) > 0:
        for j in range(slices):
            i = slices - 1 - j
            begin = i * SLICE
            end = tl.minimum(begin + SLICE, vocab)
            added = slice_sums(begin, end, s_side, t_side, row, exclude, alpha, beta, TWO, EXCLUDE, EVEN, R, C)
            sums = put(sums, i, lanes, added)
    finished = finish_row(state, m_and_z, first, merge_sums(sums), s_side, t_side, alpha, beta, FIRST)
    write_row(
        finished, state, m_and_z, untempered, 0.0, s_side, t_side, exclude, vocab, values_ptr, index, n, labels_ptr,
        label_count, labels_ptr, TWO, False,
    )  # fmt: skip
    # A gradient in place: every warp has read the label's logit.
    tl.debug_barrier()
    for j in range(slices):
        i = slices - 1 - j
        begin = i * SLICE
        end = tl.minimum(begin + SLICE, vocab)
        write_gradient(
            j == 0, True, begin, end, vocab, s_side, t_side, m_and_z, (0.0, 0.0, 0.0, 0.0), untempered,
            exclude, alpha, beta, scale_s, scale_t, finished, ds_ptr, dt_ptr, s_width, t_width, coefficients_ptr,
            labels_ptr, index, n, label_count, FIRST, STUDENT, REFERENCE, LABEL_S, LABEL_T, MANY, EXCLUDE, ALIGNED,
        EVEN, R, C,
        )  # fmt: skip


@triton.jit
def scale_kernel(data_ptr, factor_ptr, size: tl.int64, BLOCK: tl.constexpr):
    """data *= factor, rounded once; not touched when the factor is 1, which only the device knows.

    A few programs a processor take the blocks in turns: what they cost is what a factor of 1 costs.
    """
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, step):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(data_ptr + at, mask=at < size).to(tl.float32)
            tl.store(data_ptr + at, (x * factor).to(data_ptr.dtype.element_ty), mask=at < size)
