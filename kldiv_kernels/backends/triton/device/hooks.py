"""What a set of statistics gives the kernels: functions, written out by `hook_text.py` for each set that is asked for.

The kernels call these names; `bind.py` puts functions of the same names and signatures in their place. Those below are
of the empty set.

`sums` are a tuple of the terms' sums, [R] within a sweep and scalars in the end; `finished` is a tuple of what a row's
finished statistics consist of: value, Σ grad_logq, Σ grad_logp and constants, one after another.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def zero_sums(R: tl.constexpr):
    """The sums of no column."""
    return ()


@triton.jit
def add_terms(sums, p, q, lp, lq, u, alpha, beta):
    """sums + the terms of a block [R, C], summed over C."""
    return sums


@triton.jit
def merge_sums(sums):
    """The sums [R] of slices, merged into scalars."""
    return sums


@triton.jit
def finish(first, sums, q_is_zero, p_is_zero, bad_s, bad_t, alpha, beta):
    """All statistics of a row; `first` are the values that came out of the first sweep (state.py)."""
    return ()


@triton.jit
def write_values(
    finished, out, n, lse, max_logprob, argmax, tail_logprob, s_side, ms, log_zs, untempered, t_side, mt, log_zt,
    exclude, vocab, labels, label_count, picked, SHARED: tl.constexpr,
):  # fmt: skip
    """A row's column of the table of values [value_rows, n]. SHARED: see `rows.log_softmax_at`."""
    pass


@triton.jit
def logprob_at(label_count):
    """The first row of logprob in the table of values."""
    return 0


@triton.jit
def reference_logprob_at(label_count):
    return 0


@triton.jit
def untempered_logprob_at(label_count):
    return 0


@triton.jit
def load_finished(state, n):
    """`finished` from the saved state; the values, which no gradient needs, are 0."""
    return ()


@triton.jit
def save_finished(finished, state, n):
    pass


@triton.jit
def weights(finished, coefficients, labels, n, label_count, MANY: tl.constexpr):
    """(share of q, of p, of q at temperature 1, whether any coefficient is not 0, the coefficients c, that of
    tail_logprob).

    The gradient is Σ c g + share · softmax, and those of labels and of the tail. MANY: more than one label a row.
    """
    return 0.0, 0.0, 0.0, False, (), 0.0


@triton.jit
def gradient_logq(c, finished, p, q, lp, lq, u, alpha, beta):
    return 0.0 * q


@triton.jit
def gradient_logp(c, finished, p, q, lp, lq, u, alpha, beta):
    return 0.0 * p
