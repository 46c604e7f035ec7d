"""One row: where it is, what its first sweep found, its statistics, what is saved of it."""

from __future__ import annotations

import triton
import triton.language as tl

from kldiv_kernels.backends.triton.device.hooks import finish, load_finished, write_values
from kldiv_kernels.backends.triton.device.rows import no_mass, parameters, side
from kldiv_kernels.backends.triton.device.state import P_IS_ZERO, Q_IS_ZERO, TAIL, TEACHER, UNTEMPERED
from kldiv_kernels.backends.triton.formulas.math import LN2, expm1_minus

# 1 / LOG2E: dividing by the float32 log2(e) undoes the multiplication, rounding included.
EXPONENT_TO_LOG = tl.constexpr(0.6931471898132927)
# Below this exponent a float64 softmax underflows: log2(e^-745).
ZERO_EXPONENT = tl.constexpr(-1074.8)


@triton.jit
def open_row(
    index, s_ptr, s_inner, s_outer, s_stride, t_ptr, t_inner, t_outer, t_stride, exclude_ptr, token_ptr, n,
    temperature, reference_temperature, alpha, beta,
    TWO: tl.constexpr, EXCLUDE: tl.constexpr, PER_TOKEN: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Both sides of a row (see `rows.side`), its excluded column, 1/temperatures, alpha and beta."""
    temperature, reference_temperature, alpha, beta = parameters(
        index, n, token_ptr, temperature, reference_temperature, alpha, beta, PER_TOKEN
    )
    s_side = side(s_ptr, index, s_inner, s_outer, s_stride, temperature, ALIGNED)
    t_side = s_side
    if TWO:
        t_side = side(t_ptr, index, t_inner, t_outer, t_stride, reference_temperature, ALIGNED)
    exclude = -1
    if EXCLUDE:
        exclude = tl.load(exclude_ptr + index).to(tl.int32)
    return s_side, t_side, exclude, 1.0 / temperature, 1.0 / reference_temperature, alpha, beta


@triton.jit
def take_row(state, s_side, t_side, FIRST: tl.constexpr):
    """From the merged state of a row: (ms, zs, mt, zt), with z NaN where there is no softmax, and the values of the
    first sweep: entropies, forward KL, reverse KL, Hellinger."""
    ms, zs, es, bs, mt, zt, et, bt, forward, reverse, hellinger, best, column, mr, zr = state
    nan = float("nan")
    zs = tl.where(no_mass(s_side, ms, zs), nan, zs)
    log_zs = tl.log(zs)
    entropy = tl.fma(es / zs, LN2, log_zs)
    reference_entropy = 0.0
    if FIRST & TEACHER:
        zt = tl.where(no_mass(t_side, mt, zt), nan, zt)
        log_zt = tl.log(zt)
        reference_entropy = tl.fma(et / zt, LN2, log_zt)
        x = log_zs - log_zt
        forward = forward / zt - expm1_minus(x)
        reverse = reverse / zs - expm1_minus(-x)
        difference = tl.sqrt(zt) - tl.sqrt(zs)
        hellinger = (hellinger - 0.5 * difference * difference) / tl.sqrt(zs * zt)
    return (ms, zs, mt, zt), (
        tl.where(entropy < 0.0, 0.0, entropy),
        tl.where(reference_entropy < 0.0, 0.0, reference_entropy),
        tl.where(forward < 0.0, 0.0, forward),
        tl.where(reverse < 0.0, 0.0, reverse),
        tl.where(hellinger < 0.0, 0.0, hellinger),
    )


@triton.jit
def finish_row(state, m_and_z, first, sums, s_side, t_side, alpha, beta, FIRST: tl.constexpr):
    """All statistics of a row."""
    ms, zs, mt, zt = m_and_z
    never = zs < 0.0
    q_is_zero = never
    p_is_zero = never
    bad_t = never
    if FIRST & TEACHER:
        bad_t = zt != zt
    if FIRST & Q_IS_ZERO:
        q_is_zero = (state[7] - mt) * t_side[1] > ZERO_EXPONENT
    if FIRST & P_IS_ZERO:
        p_is_zero = (state[3] - ms) * s_side[1] > ZERO_EXPONENT
    return finish(first, sums, q_is_zero, p_is_zero, zs != zs, bad_t, alpha, beta)


@triton.jit
def write_row(
    finished, state, m_and_z, untempered, tail_logprob, s_side, t_side, exclude, vocab, values_ptr, index, n,
    labels_ptr, label_count, picked_ptr, TWO: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """A row's column of the table of values. SHARED: the logits at its labels are at picked_ptr [2, n, labels]."""
    ms, zs, mt, zt = m_and_z
    log_zs = tl.log(zs)
    log_zt = tl.log(zt) if TWO else 0.0
    lse = tl.fma(ms * s_side[1], EXPONENT_TO_LOG, log_zs)
    max_logprob = tl.fma((state[11] - ms) * s_side[1], LN2, -log_zs)
    argmax = tl.where(zs != zs, -1.0, state[12].to(tl.float32))
    write_values(
        finished, values_ptr + index, n, lse, max_logprob, argmax, tail_logprob,
        s_side, ms, log_zs, untempered, t_side, mt, log_zt, exclude, vocab,
        labels_ptr + index * label_count, label_count, picked_ptr + index * label_count, SHARED,
    )  # fmt: skip


@triton.jit
def write_nothing(values_ptr, index, n, value_rows):
    """The statistics of a masked row: 0."""
    for i in range(value_rows):
        tl.store(values_ptr + i * n + index, 0.0)


@triton.jit
def load_row(state, n, FIRST: tl.constexpr):
    """(ms, zs, mt, zt); m and z of the tail, the labels' share of q and whether one occurs twice; m and z at
    temperature 1; `finished`."""
    m_and_z = (tl.load(state), tl.load(state + n), tl.load(state + 2 * n), tl.load(state + 3 * n))
    state += 4 * n
    tail = (0.0, 0.0, 0.0, 0.0)
    if FIRST & TAIL:
        tail = (tl.load(state), tl.load(state + n), tl.load(state + 2 * n), tl.load(state + 3 * n))
        state += 4 * n
    untempered = ()
    if FIRST & UNTEMPERED:
        untempered = (tl.load(state), tl.load(state + n))
        state += 2 * n
    return m_and_z, tail, untempered, load_finished(state, n)
