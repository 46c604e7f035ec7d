"""What a program does with a slice of a row: the first sweep, the sums of normalised terms, the gradient.

Whole blocks of R·C columns are read without a mask; the last block of a row with one. A slice starts at a multiple of
the block. Bytes: each sweep reads its columns of both rows once; the gradient also writes them once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kldiv_kernels.backends.triton.device.hooks import (
    add_terms,
    gradient_logp,
    gradient_logq,
    logprob_at,
    merge_sums,
    reference_logprob_at,
    untempered_logprob_at,
    weights,
    zero_sums,
)
from kldiv_kernels.backends.triton.device.labels import advanced, load_marks, tail_gradient, unmarked
from kldiv_kernels.backends.triton.device.rows import (
    block_columns,
    block_limit,
    normalised,
    read,
    softmaxes,
    with_share,
)
from kldiv_kernels.backends.triton.device.state import BOTH, TAIL, TEACHER, UNTEMPERED, add_blocks, empty, merge
from kldiv_kernels.backends.triton.device.untempered import (
    add_untempered,
    empty_untempered,
    merge_untempered,
    untempered_weight,
    with_untempered,
)

# Blocks under way at a time in a loop, through shared memory: registers do not hold enough of them to hide the latency.
STAGES = tl.constexpr(3)


@triton.jit
def _add_state(
    state, untempered, words, start, end, s_side, t_side, exclude, FIRST: tl.constexpr, EXCLUDE: tl.constexpr,
    MASKED: tl.constexpr, BLOCKS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    columns, s, t, r = (), (), (), ()
    for i in tl.static_range(BLOCKS):
        at = block_columns(start + i * (R * C), R, C)
        columns = columns + (at,)
        x = read(s_side, at, end, exclude, MASKED, EXCLUDE, "evict_last")
        tail = x
        if FIRST & TAIL:
            tail = unmarked(x, words, i * C, s_side[2], C)
        r = r + (tail,)
        if FIRST & BOTH:
            s = s + (x,)
        else:
            s = s + (tail,)
        if FIRST & TEACHER:
            t = t + (read(t_side, at, end, exclude, MASKED, EXCLUDE, "evict_last"),)
        else:
            t = t + (s[i],)
    state = add_blocks(state, s, t, r, s_side, t_side, columns, FIRST)
    return state, add_untempered(untempered, state[0], s, FIRST)


@triton.jit
def slice_state(
    begin, end, s_side, t_side, exclude, marks, FIRST: tl.constexpr,
    EXCLUDE: tl.constexpr, EVEN: tl.constexpr, SLICE: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The state of columns [begin, end), and what untempered.py has of them.

    Two blocks at a time: moving a lane's state costs as much as its 8 columns.
    """
    state, untempered = empty(R), empty_untempered(R, FIRST)
    words = ()
    if FIRST & TAIL:
        words = load_marks(marks, SLICE, R)
    end = block_limit(end, C, EVEN)
    whole = begin + (end - begin) // (2 * R * C) * (2 * R * C)
    for start in tl.range(begin, whole, 2 * R * C, num_stages=STAGES):
        state, untempered = _add_state(
            state, untempered, words, start, end, s_side, t_side, exclude, FIRST, EXCLUDE, False, 2, R, C
        )
        words = advanced(words, 2 * C)
    for start in range(whole, end, R * C):
        state, untempered = _add_state(
            state, untempered, words, start, end, s_side, t_side, exclude, FIRST, EXCLUDE, True, 1, R, C
        )
        words = advanced(words, C)
    return merge(state, s_side[1], t_side[1], FIRST), merge_untempered(untempered, FIRST)


@triton.jit
def _add_sums(
    sums, start, end, s_side, t_side, state, exclude, alpha, beta,
    TWO: tl.constexpr, EXCLUDE: tl.constexpr, MASKED: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    columns = block_columns(start, R, C)
    s = read(s_side, columns, end, exclude, MASKED, EXCLUDE, "evict_last")
    t = s
    if TWO:
        t = read(t_side, columns, end, exclude, MASKED, EXCLUDE, "evict_last")
    p, q, lp, lq, u = normalised(s, t, s_side, t_side, state, TWO)
    return add_terms(sums, p, q, lp, lq, u, alpha, beta)


@triton.jit
def slice_sums(
    begin, end, s_side, t_side, state, exclude, alpha, beta,
    TWO: tl.constexpr, EXCLUDE: tl.constexpr, EVEN: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The sums of the statistics' terms over columns [begin, end). Backwards: the last columns read are in cache."""
    sums = zero_sums(R)
    end = block_limit(end, C, EVEN)
    blocks = (end - begin) // (R * C)
    whole = begin + blocks * (R * C)
    if whole < end:
        sums = _add_sums(sums, whole, end, s_side, t_side, state, exclude, alpha, beta, TWO, EXCLUDE, True, R, C)
    for i in tl.range(blocks, num_stages=STAGES):
        start = whole - (i + 1) * (R * C)
        sums = _add_sums(sums, start, end, s_side, t_side, state, exclude, alpha, beta, TWO, EXCLUDE, False, R, C)
    return merge_sums(sums)


@triton.jit
def _write(
    to, g, scale, columns, end, label, exclude,
    LABEL: tl.constexpr, EXCLUDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    if LABEL:
        g += tl.where(columns == label[0], label[1], 0.0)
    g *= scale
    if EXCLUDE:
        g = tl.where(columns == exclude, 0.0, g)
    g = g.to(to.dtype.element_ty)
    if MASKED:
        tl.store(to + columns, g, mask=columns < end, cache_modifier=".cs")
    else:
        tl.store(to + columns, g, cache_modifier=".cs")


@triton.jit
def _block_gradient(
    start, end, s_side, t_side, row, exclude, alpha, beta, scale_s, scale_t, c, finished, share_q, share_p, tail,
    untempered, ds, dt, label_s, label_t,
    FIRST: tl.constexpr, STUDENT: tl.constexpr, REFERENCE: tl.constexpr, LABEL_S: tl.constexpr, LABEL_T: tl.constexpr,
    EXCLUDE: tl.constexpr, MASKED: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    columns = block_columns(start, R, C)
    s = read(s_side, columns, end, exclude, MASKED, EXCLUDE, "evict_first")
    t = s
    if FIRST & TEACHER:
        t = read(t_side, columns, end, exclude, MASKED, EXCLUDE, "evict_first")
    p, q, lp, lq, u = normalised(s, t, s_side, t_side, row, (FIRST & TEACHER) != 0)
    if STUDENT:
        g = gradient_logq(c, finished, p, q, lp, lq, u, alpha, beta)
        if FIRST & BOTH:
            g += (tail[2] * tail[1]) * tl.exp2(tl.fma(s, s_side[1], -tail[0]))
        g = with_untempered(with_share(g, share_q, q), s, untempered, FIRST)
        _write(ds, g, scale_s, columns, end, label_s, exclude, LABEL_S, EXCLUDE, MASKED)
    if REFERENCE:
        g = gradient_logp(c, finished, p, q, lp, lq, u, alpha, beta)
        g = with_share(g, share_p, p)
        _write(dt, g, scale_t, columns, end, label_t, exclude, LABEL_T, EXCLUDE, MASKED)


@triton.jit
def _slice_gradient(
    begin, end, s_side, t_side, row, exclude, alpha, beta, scale_s, scale_t, c, finished, share_q, share_p, tail,
    untempered, ds, dt, labels, coefficients_s, coefficients_t, coefficients_untempered,
    FIRST: tl.constexpr, STUDENT: tl.constexpr, REFERENCE: tl.constexpr, LABEL_S: tl.constexpr, LABEL_T: tl.constexpr,
    LABEL_UNTEMPERED: tl.constexpr, EXCLUDE: tl.constexpr, EVEN: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Gradients of columns [begin, end). Backwards: the last columns read are in cache.

    With LABEL_S, LABEL_T, LABEL_UNTEMPERED the row's only label is one of them; else label_kernels.py writes those of
    labels anew.
    """
    OF_LABEL_S: tl.constexpr = LABEL_S or LABEL_UNTEMPERED
    end = block_limit(end, C, EVEN)
    blocks = (end - begin) // (R * C)
    whole = begin + blocks * (R * C)
    # (label, coefficient), read before the loop: a load inside keeps the compiler from pipelining it.
    label_s, label_t = (-1, 0.0), (-1, 0.0)
    if LABEL_S:
        label_s = (tl.load(labels).to(tl.int32), tl.load(coefficients_s))
    if LABEL_UNTEMPERED:
        label_s = (tl.load(labels).to(tl.int32), label_s[1] + tl.load(coefficients_untempered) / scale_s)
    if LABEL_T:
        label_t = (tl.load(labels).to(tl.int32), tl.load(coefficients_t))
    if whole < end:
        _block_gradient(
            whole, end, s_side, t_side, row, exclude, alpha, beta, scale_s, scale_t, c, finished, share_q, share_p,
            tail, untempered, ds, dt, label_s, label_t, FIRST, STUDENT, REFERENCE, OF_LABEL_S, LABEL_T, EXCLUDE,
            True, R, C,
        )  # fmt: skip
    for i in tl.range(blocks, num_stages=STAGES):
        start = whole - (i + 1) * (R * C)
        _block_gradient(
            start, end, s_side, t_side, row, exclude, alpha, beta, scale_s, scale_t, c, finished, share_q, share_p,
            tail, untempered, ds, dt, label_s, label_t, FIRST, STUDENT, REFERENCE, OF_LABEL_S, LABEL_T, EXCLUDE,
            False, R, C,
        )  # fmt: skip


@triton.jit
def write_zeros(to, begin, end, R: tl.constexpr, C: tl.constexpr):
    """The gradient of columns [begin, end) that take no part."""
    for start in range(begin, end, R * C):
        columns = block_columns(start, R, C)
        zero = tl.zeros([R, C], to.dtype.element_ty)
        tl.store(to + columns, zero, mask=columns < end, cache_modifier=".cs")


@triton.jit
def write_gradient(
    last, keep, begin, end, vocab, s_side, t_side, m_and_z, tail, untempered, exclude, alpha, beta, scale_s, scale_t,
    finished, ds_ptr, dt_ptr, s_width, t_width, coefficients_ptr, labels_ptr, index, n, label_count,
    FIRST: tl.constexpr, STUDENT: tl.constexpr, REFERENCE: tl.constexpr, LABEL_S: tl.constexpr, LABEL_T: tl.constexpr,
    MANY: tl.constexpr, EXCLUDE: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Columns [begin, end) of a row's gradients, and the padding behind `vocab` where the slice is the last."""
    ds, dt = ds_ptr + index * s_width, dt_ptr + index * t_width
    if ALIGNED:
        ds, dt = tl.multiple_of(ds, 16), tl.multiple_of(dt, 16)
    share_q, share_p, share_untempered, any_coefficient, c, c_tail = weights(
        finished, coefficients_ptr + index, labels_ptr + index * label_count, n, label_count, MANY
    )
    ms, zs, mt, zt = m_and_z
    row = softmaxes(ms, zs, mt, zt, s_side[1], t_side[1], (FIRST & TEACHER) != 0)
    of_tail = (0.0, 0.0, 0.0)
    if FIRST & TAIL:
        row, share_q, of_tail = tail_gradient(c_tail, share_q, row, m_and_z, tail, s_side, t_side, FIRST)
    # Whether the label is one of the columns, as LABEL_S and LABEL_T say of the others.
    LABEL_UNTEMPERED: tl.constexpr = (FIRST & UNTEMPERED) != 0 and (FIRST & TAIL) == 0 and not MANY
    # A row that takes no part is not read.
    if keep & any_coefficient:
        _slice_gradient(
            begin, end, s_side, t_side, row, exclude, alpha, beta, scale_s, scale_t, c, finished, share_q, share_p,
            of_tail, untempered_weight(share_untempered, untempered, scale_s, FIRST),
            ds, dt, labels_ptr + index * label_count,
            coefficients_ptr + logprob_at(label_count) * n + index,
            coefficients_ptr + reference_logprob_at(label_count) * n + index,
            coefficients_ptr + untempered_logprob_at(label_count) * n + index,
            FIRST, STUDENT, REFERENCE, LABEL_S, LABEL_T, LABEL_UNTEMPERED, EXCLUDE, EVEN, R, C,
        )  # fmt: skip
    else:
        if STUDENT:
            write_zeros(ds, begin, end, R, C)
        if REFERENCE:
            write_zeros(dt, begin, end, R, C)
    if last:
        if STUDENT:
            write_zeros(ds, vocab, tl.cast(s_width, tl.int32), R, C)
        if REFERENCE:
            write_zeros(dt, vocab, tl.cast(t_width, tl.int32), R, C)
