"""Distances of p and q, column by column; see `statistic.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from kldiv_kernels.backends.triton.formulas.math import SMALLEST_NORMAL, exp, expm1
from kldiv_kernels.backends.triton.formulas.statistic import INFINITY, P_ZERO, Q_ZERO, TWO, rows


# --- squared Hellinger: (sqrt p - sqrt q)² / 2
@triton.jit
def hellinger_finish(total, q_is_zero, p_is_zero, alpha, beta):
    return total, 0.5 * total, 0.5 * total


@triton.jit
def hellinger_grad_logq(p, q, lp, lq, u, alpha, beta):
    return 0.5 * (q - tl.sqrt(p * q))


@triton.jit
def hellinger_grad_logp(p, q, lp, lq, u, alpha, beta):
    return 0.5 * (p - tl.sqrt(p * q))


# --- total variation: |p - q| / 2, gradient 0 where p = q
@triton.jit
def _sign(u):
    return tl.where(u > 0.0, 1.0, tl.where(u < 0.0, -1.0, 0.0 * u))


@triton.jit
def tvd_terms(p, q, lp, lq, u, alpha, beta):
    return 0.5 * tl.abs(p - q), -0.5 * q * _sign(u)


@triton.jit
def tvd_finish(total, of_q, q_is_zero, p_is_zero, alpha, beta):
    return total, of_q, total - of_q


@triton.jit
def tvd_grad_logq(p, q, lp, lq, u, alpha, beta):
    return -0.5 * q * _sign(u)


@triton.jit
def tvd_grad_logp(p, q, lp, lq, u, alpha, beta):
    return 0.5 * p * _sign(u)


# --- chi squared: (p - q)² / q = p²/q - 2p + q
@triton.jit
def _p_squared_over_q(p, u):
    """(p e^(u/2)) e^(u/2): no overflow before the result's own."""
    half = exp(tl.where(u > 176.0, 88.0, 0.5 * u))
    return (p * half) * half


@triton.jit
def forward_chi2_terms(p, q, lp, lq, u, alpha, beta):
    difference = p - q
    near = difference * (difference / tl.maximum(q, SMALLEST_NORMAL))
    far = (_p_squared_over_q(p, u) - p) + (q - p)
    return (tl.where(tl.abs(u) < 1.0, near, far),)


@triton.jit
def forward_chi2_finish(total, q_is_zero, p_is_zero, alpha, beta):
    value = tl.where(q_is_zero, INFINITY, total)
    return value, -value, 2.0 * value


@triton.jit
def forward_chi2_grad_logq(p, q, lp, lq, u, alpha, beta):
    return tl.where(tl.abs(u) < 1.0, -(q * expm1(u + u)), q - _p_squared_over_q(p, u))


@triton.jit
def forward_chi2_grad_logp(p, q, lp, lq, u, alpha, beta):
    return 2.0 * tl.where(tl.abs(u) < 1.0, p * expm1(u), _p_squared_over_q(p, u) - p)


@triton.jit
def reverse_chi2_terms(p, q, lp, lq, u, alpha, beta):
    return forward_chi2_terms(q, p, lq, lp, -u, alpha, beta)


@triton.jit
def reverse_chi2_finish(total, q_is_zero, p_is_zero, alpha, beta):
    value, sum_p, sum_q = forward_chi2_finish(total, p_is_zero, q_is_zero, alpha, beta)
    return value, sum_q, sum_p


@triton.jit
def reverse_chi2_grad_logq(p, q, lp, lq, u, alpha, beta):
    return forward_chi2_grad_logp(q, p, lq, lp, -u, alpha, beta)


@triton.jit
def reverse_chi2_grad_logp(p, q, lp, lq, u, alpha, beta):
    return forward_chi2_grad_logq(q, p, lq, lp, -u, alpha, beta)


# --- triangular discrimination: (p - q)² / (p + q)
@triton.jit
def _triangular_ratio(p, q):
    return (p - q) / tl.maximum(p + q, SMALLEST_NORMAL)


@triton.jit
def triangular_terms(p, q, lp, lq, u, alpha, beta):
    r = _triangular_ratio(p, q)
    return (p - q) * r, -(q * r) * (2.0 + r)


@triton.jit
def triangular_finish(total, of_q, q_is_zero, p_is_zero, alpha, beta):
    return total, of_q, total - of_q


@triton.jit
def triangular_grad_logq(p, q, lp, lq, u, alpha, beta):
    r = _triangular_ratio(p, q)
    return -(q * r) * (2.0 + r)


@triton.jit
def triangular_grad_logp(p, q, lp, lq, u, alpha, beta):
    r = _triangular_ratio(p, q)
    return (p * r) * (2.0 - r)


DISTANCES = rows(globals(), hellinger=TWO, tvd=TWO, forward_chi2=Q_ZERO, reverse_chi2=P_ZERO, triangular=TWO)
