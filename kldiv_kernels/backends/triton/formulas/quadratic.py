"""Sums of squares and products of p and q; see `statistic.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from kldiv_kernels.backends.triton.formulas.math import exp, expm1, log1p
from kldiv_kernels.backends.triton.formulas.powers import or_without_shares
from kldiv_kernels.backends.triton.formulas.statistic import INFINITY, TWO, rows


# --- collision: log sum q²
@triton.jit
def collision_terms(p, q, lp, lq, u, alpha, beta):
    return (q * q,)


@triton.jit
def collision_finish(total, q_is_zero, p_is_zero, alpha, beta):
    return tl.log(total), 2.0, 0.0, 2.0 / total


@triton.jit
def collision_grad_logq(p, q, lp, lq, u, alpha, beta, scale):
    return scale * q * q


# --- Cauchy-Schwarz: -log((sum pq)² / (sum p² sum q²))
# With d = p - q, A = sum q², P = sum p², X = sum pq, B = sum q d, C = sum d²: the quotient is
# 1 - (A C - B²) / (A P), and
#   grad_logq = 2 q (q / A - p / X) = (2 q / A) (p B / X - d),
#   grad_logp = 2 p (p / P - q / X) = (2 p / P) (d - q (B + C) / X).
# These are exact where p and q are close; where they are far, X may underflow and its logarithm is used.
@triton.jit
def _difference(p, q, u):
    return tl.where(tl.abs(u) < 0.25, q * expm1(tl.where(tl.abs(u) < 0.25, u, 0.0)), p - q)


@triton.jit
def cauchy_schwarz_terms(p, q, lp, lq, u, alpha, beta):
    d = _difference(p, q, u)
    return q * q, p * p, q * d, d * d


@triton.jit
def cauchy_schwarz_log_weight(p, q, lp, lq, u, alpha, beta):
    return lp + lq


@triton.jit
def cauchy_schwarz_finish(qq, pp, qd, dd, log_sum, q_is_zero, p_is_zero, alpha, beta):
    log_pq = tl.where(log_sum < -1e20, -INFINITY, log_sum)
    pq = exp(log_pq)
    # In quotients: the products themselves may leave the range of floats.
    missing = (dd / pp) - (qd / qq) * (qd / pp)
    missing = tl.where(missing < 0.0, 0.0, missing)
    far = tl.log(qq) + tl.log(pp) - 2.0 * log_pq
    value = tl.where(missing < 0.5, -log1p(-tl.where(missing < 0.5, missing, 0.5)), far)
    return value, 0.0, 0.0, or_without_shares(log_pq), 2.0 / qq, 2.0 / pp, qd / pq, (qd + dd) / pq


@triton.jit
def _close(excess_q, excess_p):
    return (tl.abs(excess_q) < 0.5) & (tl.abs(excess_p) < 0.5)


@triton.jit
def cauchy_schwarz_grad_logq(p, q, lp, lq, u, alpha, beta, log_pq, scale_q, scale_p, excess_q, excess_p):
    if _close(excess_q, excess_p):
        g = (scale_q * q) * tl.fma(p, excess_q, -_difference(p, q, u))
    else:
        g = scale_q * q * q - 2.0 * exp(lp + lq - log_pq)
    return g


@triton.jit
def cauchy_schwarz_grad_logp(p, q, lp, lq, u, alpha, beta, log_pq, scale_q, scale_p, excess_q, excess_p):
    if _close(excess_q, excess_p):
        g = (scale_p * p) * (_difference(p, q, u) - q * excess_p)
    else:
        g = scale_p * p * p - 2.0 * exp(lp + lq - log_pq)
    return g


QUADRATIC_DIVERGENCES = rows(globals(), collision=0, cauchy_schwarz=TWO)
