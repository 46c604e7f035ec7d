"""KL divergences to a mixture of the rows; see `statistic.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from kldiv_kernels.backends.triton.formulas.math import SMALLEST_NORMAL, exp, expm1, kl_term, log, log1p
from kldiv_kernels.backends.triton.formulas.statistic import INFINITY, P_ZERO, Q_ZERO, rows


# --- generalised Jensen-Shannon: m = beta p + (1 - beta) q; the KL divergences at beta = 0 and 1
# With v = beta (1 - beta) and K(u) = log(m/q) = beta u + v u²/2 + v (1-2 beta) u³/6 + ..., a Bernoulli cumulant
# function, a term is m (u K' − K) = m u² v (1/2 + (1-2 beta) u/3 + (1-6v) u²/8 + ...).
@triton.jit
def _log_mixture(p, q, beta):
    """m, log m"""
    m = tl.fma(beta, p, (1.0 - beta) * q)
    return m, log(tl.maximum(m, SMALLEST_NORMAL))


@triton.jit
def _log_q_over_mixture(lq, log_m, u, beta):
    """log(q/m) = −K(u), by its series where the rows are close: the logarithms would leave only their roundings."""
    v = beta * (1.0 - beta)
    skewness = 1.0 - 2.0 * beta
    y = tl.fma(u, v * (1.0 - 30.0 * v + 120.0 * v * v) / 720.0, v * skewness * (1.0 - 12.0 * v) / 120.0)
    y = tl.fma(y, u, v * (1.0 - 6.0 * v) / 24.0)
    y = tl.fma(y, u, v * skewness / 6.0)
    y = tl.fma(y, u, 0.5 * v)
    y = tl.fma(y, u, beta)
    return tl.where(tl.abs(u) < 0.25, -(y * u), lq - log_m)


@triton.jit
def js_terms(p, q, lp, lq, u, alpha, beta):
    if beta <= 0.0:
        value = kl_term(p, q, u)
        of_q = 0.0 * u
    elif beta >= 1.0:
        value = kl_term(q, p, -u)
        of_q = value
    else:
        m, log_m = _log_mixture(p, q, beta)
        wp, wq = beta * p, (1.0 - beta) * q
        of_q = wq * _log_q_over_mixture(lq, log_m, u, beta)
        v = beta * (1.0 - beta)
        skewness = 1.0 - 2.0 * beta
        y = tl.fma(u, v * (1.0 - 30.0 * v + 120.0 * v * v) / 144.0, v * skewness * (1.0 - 12.0 * v) / 30.0)
        y = tl.fma(y, u, v * (1.0 - 6.0 * v) / 8.0)
        y = tl.fma(y, u, v * skewness / 3.0)
        y = tl.fma(y, u, 0.5 * v)
        # Products rounded by themselves: exchanging the rows at beta = 1/2 leaves every bit of a term.
        value = tl.where(tl.abs(u) < 0.25, m * ((u * u) * y), wp * (lp - log_m) + wq * (lq - log_m))
    return value, of_q


@triton.jit
def js_finish(total, of_q, q_is_zero, p_is_zero, alpha, beta):
    infinite = (q_is_zero & (beta <= 0.0)) | (p_is_zero & (beta >= 1.0))
    value = tl.where(infinite, INFINITY, total)
    of_q = tl.where(infinite & (beta >= 1.0), INFINITY, of_q)
    return value, of_q, tl.where(beta >= 1.0, 0.0, value - of_q)


@triton.jit
def js_grad_logq(p, q, lp, lq, u, alpha, beta):
    if beta <= 0.0:
        g = q - p
    elif beta >= 1.0:
        g = -(q * u)
    else:
        m, log_m = _log_mixture(p, q, beta)
        g = (1.0 - beta) * q * _log_q_over_mixture(lq, log_m, u, beta)
    return g


@triton.jit
def js_grad_logp(p, q, lp, lq, u, alpha, beta):
    if beta <= 0.0:
        g = p * u
    elif beta >= 1.0:
        g = p - q
    else:
        m, log_m = _log_mixture(p, q, beta)
        g = beta * p * _log_q_over_mixture(lp, log_m, -u, 1.0 - beta)
    return g


# --- skew KL: KL(p || m), m = alpha p + (1 - alpha) q; KL(p || q) at alpha = 0
@triton.jit
def _log_p_over_m(u, alpha):
    """−log(alpha + (1 − alpha) e^−u); beyond u = −80 the column has no mass in p.

    Near 1 the logarithm takes what is missing from 1; elsewhere that would round a small alpha away.
    """
    x = -tl.where(u < -80.0, -80.0, u)
    off = (1.0 - alpha) * expm1(x)
    mixed = tl.fma(1.0 - alpha, exp(x), alpha)
    return -tl.where(tl.abs(off) < 0.3, log1p(off), log(tl.maximum(mixed, SMALLEST_NORMAL)))


@triton.jit
def skew_kl_terms(p, q, lp, lq, u, alpha, beta):
    if alpha <= 0.0:
        value = kl_term(p, q, u)
        of_q = 0.0 * u
    else:
        b = 1.0 - alpha
        m = tl.fma(alpha, p, b * q)
        value = kl_term(p, m, _log_p_over_m(u, alpha))
        of_q = (b * b) * q * ((q - p) / tl.maximum(m, SMALLEST_NORMAL))
    return value, of_q


@triton.jit
def skew_kl_finish(total, of_q, q_is_zero, p_is_zero, alpha, beta):
    value = tl.where(q_is_zero & (alpha <= 0.0), INFINITY, total)
    return value, of_q, value - of_q


@triton.jit
def skew_kl_grad_logq(p, q, lp, lq, u, alpha, beta):
    if alpha <= 0.0:
        g = q - p
    else:
        b = 1.0 - alpha
        g = (b * b) * q * ((q - p) / tl.maximum(tl.fma(alpha, p, b * q), SMALLEST_NORMAL))
    return g


@triton.jit
def skew_kl_grad_logp(p, q, lp, lq, u, alpha, beta):
    if alpha <= 0.0:
        g = p * u
    else:
        b = 1.0 - alpha
        share = (q - p) / tl.maximum(tl.fma(alpha, p, b * q), SMALLEST_NORMAL)
        g = tl.fma(p, _log_p_over_m(u, alpha), (alpha * b) * p * share)
    return g


@triton.jit
def skew_reverse_kl_terms(p, q, lp, lq, u, alpha, beta):
    value, of_p = skew_kl_terms(q, p, lq, lp, -u, alpha, beta)
    return value, of_p


@triton.jit
def skew_reverse_kl_finish(total, of_p, q_is_zero, p_is_zero, alpha, beta):
    value, sum_p, sum_q = skew_kl_finish(total, of_p, p_is_zero, q_is_zero, alpha, beta)
    return value, sum_q, sum_p


@triton.jit
def skew_reverse_kl_grad_logq(p, q, lp, lq, u, alpha, beta):
    return skew_kl_grad_logp(q, p, lq, lp, -u, alpha, beta)


@triton.jit
def skew_reverse_kl_grad_logp(p, q, lp, lq, u, alpha, beta):
    return skew_kl_grad_logq(q, p, lq, lp, -u, alpha, beta)


MIXTURE_DIVERGENCES = rows(globals(), js=Q_ZERO | P_ZERO, skew_kl=Q_ZERO, skew_reverse_kl=P_ZERO)
