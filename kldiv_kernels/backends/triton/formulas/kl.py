"""The entropies and the KL divergences; see `statistic.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from kldiv_kernels.backends.triton.formulas.math import kl_term
from kldiv_kernels.backends.triton.formulas.statistic import INFINITY, P_ZERO, Q_ZERO, TWO, rows


# --- entropy: -sum q log q
@triton.jit
def entropy_finish(total, q_is_zero, p_is_zero, alpha, beta):
    return total, total - 1.0, 0.0


@triton.jit
def entropy_grad_logq(p, q, lp, lq, u, alpha, beta):
    return -tl.fma(q, lq, q)


@triton.jit
def reference_entropy_finish(total, q_is_zero, p_is_zero, alpha, beta):
    return total, 0.0, total - 1.0


@triton.jit
def reference_entropy_grad_logp(p, q, lp, lq, u, alpha, beta):
    return -tl.fma(p, lp, p)


# --- cross-entropy: -sum p log q
@triton.jit
def cross_entropy_terms(p, q, lp, lq, u, alpha, beta):
    return (-(p * lq),)


@triton.jit
def cross_entropy_finish(total, q_is_zero, p_is_zero, alpha, beta):
    value = tl.where(q_is_zero, INFINITY, total)
    return value, 0.0, value


@triton.jit
def cross_entropy_grad_logq(p, q, lp, lq, u, alpha, beta):
    """−p with q added, so that equal rows have a gradient of exactly 0."""
    return q - p


@triton.jit
def cross_entropy_grad_logp(p, q, lp, lq, u, alpha, beta):
    return -(p * lq)


# --- forward KL: sum p (log p - log q); the reverse one has the roles exchanged
@triton.jit
def forward_kl_finish(total, q_is_zero, p_is_zero, alpha, beta):
    value = tl.where(q_is_zero, INFINITY, total)
    return value, 0.0, value


@triton.jit
def forward_kl_grad_logq(p, q, lp, lq, u, alpha, beta):
    return q - p


@triton.jit
def forward_kl_grad_logp(p, q, lp, lq, u, alpha, beta):
    return p * u


@triton.jit
def reverse_kl_finish(total, q_is_zero, p_is_zero, alpha, beta):
    value = tl.where(p_is_zero, INFINITY, total)
    return value, value, 0.0


@triton.jit
def reverse_kl_grad_logq(p, q, lp, lq, u, alpha, beta):
    return -(q * u)


@triton.jit
def reverse_kl_grad_logp(p, q, lp, lq, u, alpha, beta):
    return p - q


# --- Jeffreys: KL(p || q) + KL(q || p)
@triton.jit
def jeffreys_terms(p, q, lp, lq, u, alpha, beta):
    return kl_term(p, q, u), kl_term(q, p, -u)


@triton.jit
def jeffreys_finish(forward, reverse, q_is_zero, p_is_zero, alpha, beta):
    forward = tl.where(q_is_zero, INFINITY, forward)
    reverse = tl.where(p_is_zero, INFINITY, reverse)
    return forward + reverse, reverse, forward


@triton.jit
def jeffreys_grad_logq(p, q, lp, lq, u, alpha, beta):
    return (q - p) - q * u


@triton.jit
def jeffreys_grad_logp(p, q, lp, lq, u, alpha, beta):
    return (p - q) + p * u


KL_DIVERGENCES = rows(
    globals(),
    entropy=0,
    reference_entropy=TWO,
    cross_entropy=Q_ZERO,
    forward_kl=Q_ZERO,
    reverse_kl=P_ZERO,
    jeffreys=Q_ZERO | P_ZERO,
)
