"""The first sweep: the state of some columns of a row, a monoid without cancellation.

Notation (logits x, exponents y = (x − m) c in base 2, c = log2(e)/temperature): of the student m_s, the reference of
its exponents, and z_s = Σ 2^y; of the teacher m_t, z_t. p̃ = 2^y_t and q̃ = 2^y_s, u = (y_t − y_s) ln 2 = log(p̃/q̃).

    entropy      a = −Σ q̃ y_s
    forward KL   g = Σ p̃ u − p̃ + q̃ ≥ 0, term by term
    reverse KL   the same with the roles exchanged
    Hellinger    g = ½ Σ (√p̃ − √q̃)²

In a lane m is the largest x so far; when columns are merged it becomes their log-sum-exp, so that z is near 1 and g
near the divergence itself: terms of a lane are never much larger than what it contributes. All of them move exactly to
other references (`move`), which is what merging is:

    with a = 2^((m_s − m_s') c_s), b = 2^((m_t − m_t') c_t), x = log(a/b):
    z_s' = a z_s, z_t' = b z_t, a_s' = a (a_s + z_s (m_s' − m_s) c_s)
    KL:         g' = b (g + z_s (e^x − 1 − x) + (z_s − z_t) x) = b (g − z_t x) + (a − b) z_s
    Hellinger:  g' = √(ab) g + ½ (√b − √a) (√b z_t − √a z_s)

The columns that are no label of the row have m_r and z_r of their own: a difference of sums over all columns would
cancel. Where nothing else wants the sums over all, m_s and z_s are those of these columns instead, and the labels are
added in the end (labels.py): one exponential a column.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kldiv_kernels.backends.triton.formulas.math import LN2, expm1_minus, kl_term

# What the first sweep takes: bits of its constexpr FIRST.
TEACHER = tl.constexpr(1)
ENTROPY = tl.constexpr(2)
REFERENCE_ENTROPY = tl.constexpr(4)
FORWARD_KL = tl.constexpr(8)
REVERSE_KL = tl.constexpr(16)
HELLINGER = tl.constexpr(32)
# The largest logit of the teacher where the student has no mass, and the other way round: whether q (p) is 0 somewhere
# where the other is not, which makes some divergences infinite.
Q_IS_ZERO = tl.constexpr(64)
P_IS_ZERO = tl.constexpr(128)
ARGMAX = tl.constexpr(256)
# The columns that are no label; with BOTH beside all columns, else instead of them.
TAIL = tl.constexpr(512)
BOTH = tl.constexpr(1024)
# The student's softmax at temperature 1 as well (untempered.py).
UNTEMPERED = tl.constexpr(2048)

# Numbers in a state: m, z, a and blocked logit of the student, of the teacher; three g; the largest logit and where;
# m and z of the tail.
STATE_SIZE = tl.constexpr(15)
# Below every logit, and finite in units of c at any temperature above 1e-7.
NOTHING = tl.constexpr(-2e30)
_NO_COLUMN = tl.constexpr(2147483647)


@triton.jit
def empty(R: tl.constexpr):
    """The state of no columns, R times."""
    low = tl.full([R], NOTHING, tl.float32)
    zero = tl.zeros([R], tl.float32)
    column = tl.full([R], _NO_COLUMN, tl.int32)
    return low, zero, zero, low, low, zero, zero, low, zero, zero, zero, low, column, low, zero


@triton.jit
def _move_kl(g, z_first, z_second, a, b, x):
    """`first` is the row in whose units g is, with factor b; x = log(a/b)."""
    near = b * (g + tl.fma(z_second, expm1_minus(x), (z_second - z_first) * x))
    far = tl.fma(a - b, z_second, b * (g - z_first * x))
    return tl.where(tl.abs(x) < 1.0, near, far)


@triton.jit
def move(state, to_s, to_t, to_r, cs, ct, FIRST: tl.constexpr):
    """The state in exponents relative to other references."""
    ms, zs, es, bs, mt, zt, et, bt, forward, reverse, hellinger, best, column, mr, zr = state
    ds, dt = (ms - to_s) * cs, (mt - to_t) * ct
    a = tl.exp2(ds)
    if FIRST & TEACHER:
        b = tl.exp2(dt)
        if FIRST & FORWARD_KL:
            forward = _move_kl(forward, zt, zs, a, b, (ds - dt) * LN2)
        if FIRST & REVERSE_KL:
            reverse = _move_kl(reverse, zs, zt, b, a, (dt - ds) * LN2)
        if FIRST & HELLINGER:
            ra, rb = tl.exp2(0.5 * ds), tl.exp2(0.5 * dt)
            hellinger = ra * rb * hellinger + 0.5 * (rb - ra) * (rb * zt - ra * zs)
        if FIRST & REFERENCE_ENTROPY:
            et = b * (et - zt * dt)
        zt = b * zt
    if FIRST & ENTROPY:
        es = a * (es - zs * ds)
    if FIRST & BOTH:
        zr = tl.exp2((mr - to_r) * cs) * zr
    return to_s, a * zs, es, bs, to_t, zt, et, bt, forward, reverse, hellinger, best, column, to_r, zr


@triton.jit
def _largest(m, blocks):
    """The largest logit of lanes, m included."""
    top = tl.max(blocks[0], axis=1)
    for i in tl.static_range(1, len(blocks)):
        top = tl.maximum(top, tl.max(blocks[i], axis=1))
    return tl.maximum(m, top)


@triton.jit
def add_blocks(state, s_blocks, t_blocks, r_blocks, s_side, t_side, columns, FIRST: tl.constexpr):
    """The state [R] and some blocks of columns [R, C] of both rows, moved once for all of them.

    `r_blocks` are those of the student without the labels.
    """
    to_t, to_r = state[4], state[13]
    if FIRST & TEACHER:
        to_t = _largest(state[4], t_blocks)
    if FIRST & BOTH:
        to_r = _largest(state[13], r_blocks)
    state = move(state, _largest(state[0], s_blocks), to_t, to_r, s_side[1], t_side[1], FIRST)
    for i in tl.static_range(len(s_blocks)):
        state = _add_block(state, s_blocks[i], t_blocks[i], r_blocks[i], s_side, t_side, columns[i], FIRST)
    return state


@triton.jit
def _add_block(state, s, t, r, s_side, t_side, columns, FIRST: tl.constexpr):
    ms, zs, es, bs, mt, zt, et, bt, forward, reverse, hellinger, best, column, mr, zr = state
    ys = (s - ms[:, None]) * s_side[1]
    if FIRST & HELLINGER:
        root_q = tl.exp2(0.5 * ys)
        q = root_q * root_q
    else:
        q = tl.exp2(ys)
    zs += tl.sum(q, axis=1)
    if FIRST & ENTROPY:
        es -= tl.sum(q * ys, axis=1)
    if FIRST & TEACHER:
        yt = (t - mt[:, None]) * t_side[1]
        if FIRST & HELLINGER:
            root_p = tl.exp2(0.5 * yt)
            p = root_p * root_p
            difference = root_p - root_q
            hellinger += 0.5 * tl.sum(difference * difference, axis=1)
        else:
            p = tl.exp2(yt)
        zt += tl.sum(p, axis=1)
        u = (yt - ys) * LN2
        if FIRST & FORWARD_KL:
            forward += tl.sum(kl_term(p, q, u), axis=1)
        if FIRST & REVERSE_KL:
            reverse += tl.sum(kl_term(q, p, -u), axis=1)
        if FIRST & REFERENCE_ENTROPY:
            et -= tl.sum(p * yt, axis=1)
        if FIRST & P_IS_ZERO:
            bs = tl.maximum(bs, tl.max(tl.where(t <= t_side[2], s, NOTHING), axis=1))
        if FIRST & Q_IS_ZERO:
            bt = tl.maximum(bt, tl.max(tl.where(s <= s_side[2], t, NOTHING), axis=1))
    if FIRST & ARGMAX:
        largest = tl.max(s, axis=1)
        where = tl.min(tl.where(s == largest[:, None], columns, _NO_COLUMN), axis=1)
        column = tl.where(largest > best, where, column)
        best = tl.maximum(best, largest)
    if FIRST & BOTH:
        zr += tl.sum(tl.exp2((r - mr[:, None]) * s_side[1]), axis=1)
    return ms, zs, es, bs, mt, zt, et, bt, forward, reverse, hellinger, best, column, mr, zr


@triton.jit
def merged_reference(m, z, c):
    """The log-sum-exp of lanes [R], and their maximum where that has none."""
    top = tl.max(m, axis=0)
    total = tl.sum(z * tl.exp2((m - top) * c), axis=0)
    return tl.where(
        total > 0.0, top + tl.log2(tl.where(total > 0.0, total, 1.0)) / c, tl.where(total == 0.0, top, total)
    )


@triton.jit
def merged_sum(m, z, c):
    """(m, z) of lanes [R], merged into one (scalars)."""
    to = merged_reference(m, z, c)
    return to, tl.sum(z * tl.exp2((m - to) * c), axis=0)


@triton.jit
def merge(states, cs, ct, FIRST: tl.constexpr):
    """The states [R] of R sets of columns, merged into one (scalars)."""
    to_s = merged_reference(states[0], states[1], cs)
    to_t = states[4]
    if FIRST & TEACHER:
        to_t = merged_reference(states[4], states[5], ct)
    to_r = states[13]
    if FIRST & BOTH:
        to_r = merged_reference(states[13], states[14], cs)
    moved = move(states, to_s, to_t, to_r, cs, ct, FIRST)
    ms, zs, es, bs, mt, zt, et, bt, forward, reverse, hellinger, best, column, mr, zr = moved
    zero = 0.0 * to_s
    zs = tl.sum(zs, axis=0)
    es = tl.sum(es, axis=0) if FIRST & ENTROPY else zero
    if FIRST & TEACHER:
        zt = tl.sum(zt, axis=0)
    else:
        mt, zt = zero, zero
    et = tl.sum(et, axis=0) if FIRST & REFERENCE_ENTROPY else zero
    bs = tl.max(bs, axis=0) if FIRST & P_IS_ZERO else zero
    bt = tl.max(bt, axis=0) if FIRST & Q_IS_ZERO else zero
    forward = tl.sum(forward, axis=0) if FIRST & FORWARD_KL else zero
    reverse = tl.sum(reverse, axis=0) if FIRST & REVERSE_KL else zero
    hellinger = tl.sum(hellinger, axis=0) if FIRST & HELLINGER else zero
    if FIRST & ARGMAX:
        largest = tl.max(best, axis=0)
        column = tl.min(tl.where(best == largest, column, _NO_COLUMN), axis=0)
        best = largest
    else:
        best, column = zero, zero.to(tl.int32)
    if FIRST & BOTH:
        zr = tl.sum(zr, axis=0)
    else:
        mr, zr = zero, zero
    return ms, zs, es, bs, mt, zt, et, bt, forward, reverse, hellinger, best, column, mr, zr


@triton.jit
def put(slices, at, lanes, one):
    """Lane `at` of what slices left [R] replaced by what one left (scalars)."""
    here = lanes == at
    out = ()
    for i in tl.static_range(len(slices)):
        out = out + (tl.where(here, one[i], slices[i]),)
    return out


@triton.jit
def load_parts(pointer, index, parts, row, step, nothing, BEGIN: tl.constexpr, WIDTH: tl.constexpr):
    """What a row's slices, or the shards of it, left at `pointer`, in lanes; `nothing` in those behind them.

    Each has `WIDTH` numbers there, which are read from `BEGIN` on. From row to row there are `row` such parts, and from
    part to part of a row `step`.
    """
    lanes = tl.arange(0, nothing[0].shape[0])
    out = ()
    for i in tl.static_range(len(nothing)):
        at = pointer + (index * row + lanes * step) * WIDTH + (BEGIN + i)
        value = tl.load(at, mask=lanes < parts, other=0.0).to(nothing[i].dtype)
        out = out + (tl.where(lanes < parts, value, nothing[i]),)
    return out
