"""Divergences through powers of p and q; see `statistic.py`. Formulas: Cichocki and Amari (2010)."""

from __future__ import annotations

import triton
import triton.language as tl

from kldiv_kernels.backends.triton.formulas.math import exp, expm1, kl_term, log1p
from kldiv_kernels.backends.triton.formulas.statistic import INFINITY, P_ZERO, Q_ZERO, rows

# Below it even a float64 probability is 0, and so are its powers, whatever the other row has there.
LEAST_LOG = tl.constexpr(-745.0)
# As a power: see SMALLEST_NORMAL.
LARGEST = tl.constexpr(2.0**127 * (2 - 2.0**-23))


# --- alpha: (p^a q^(1-a) - a p - (1-a) q) / (a (a-1)); the KL divergences at a = 1 and 0
# Best for a >= 1/2; p and q change places for the others. For small u a term is
# q u² (1/2 + (1+a) u/6 + (1+a+a²) u²/24 + ...).
@triton.jit
def _power_minus_p(p, lp, u, c):
    """p^a q^(1−a) − p = p expm1((a−1) u), c = a − 1, through one exponential where that would overflow."""
    x = c * u
    power = tl.where(x < 60.0, p * expm1(tl.where(x < 60.0, x, 60.0)), exp(lp + x) - p)
    return tl.where(lp < LEAST_LOG, 0.0, power)


@triton.jit
def _alpha_term(p, q, lp, u, a):
    """a not 0 or 1"""
    c = a - 1.0
    far = tl.fma(_power_minus_p(p, lp, u, c), 1.0 / c, q - p) / a
    c3 = 1.0 + a
    c4 = 1.0 + a * c3
    c5 = 1.0 + a * c4
    c6 = 1.0 + a * c5
    y = tl.fma(u, c6 / 720.0, c5 / 120.0)
    y = tl.fma(y, u, c4 / 24.0)
    y = tl.fma(y, u, c3 / 6.0)
    y = tl.fma(y, u, 0.5)
    near = tl.abs(u) * tl.maximum(1.0, tl.abs(a)) < 0.25
    return tl.where(near, (q * u) * (u * y), far)


@triton.jit
def alpha_terms(p, q, lp, lq, u, alpha, beta):
    if alpha == 1.0:
        value = kl_term(p, q, u)
    elif alpha == 0.0:
        value = kl_term(q, p, -u)
    elif alpha >= 0.5:
        value = _alpha_term(p, q, lp, u, alpha)
    else:
        value = _alpha_term(q, p, lq, -u, 1.0 - alpha)
    return (value,)


@triton.jit
def alpha_finish(total, q_is_zero, p_is_zero, alpha, beta):
    value = tl.where((q_is_zero & (alpha >= 1.0)) | (p_is_zero & (alpha <= 0.0)), INFINITY, total)
    return value, tl.where(alpha == 1.0, 0.0, (1.0 - alpha) * value), tl.where(alpha == 0.0, 0.0, alpha * value)


@triton.jit
def _grad_of_second(p, q, lp, u, a):
    """∂/∂log q of the divergence, a ≥ 1/2"""
    return ((q - p) - _power_minus_p(p, lp, u, a - 1.0)) / a


@triton.jit
def _grad_of_first(p, q, lp, u, a):
    """∂/∂log p of the divergence, a ≥ 1/2"""
    if a == 1.0:
        g = p * u
    else:
        g = _power_minus_p(p, lp, u, a - 1.0) / (a - 1.0)
    return g


@triton.jit
def alpha_grad_logq(p, q, lp, lq, u, alpha, beta):
    if alpha >= 0.5:
        g = _grad_of_second(p, q, lp, u, alpha)
    else:
        g = _grad_of_first(q, p, lq, -u, 1.0 - alpha)
    return g


@triton.jit
def alpha_grad_logp(p, q, lp, lq, u, alpha, beta):
    if alpha >= 0.5:
        g = _grad_of_first(p, q, lp, u, alpha)
    else:
        g = _grad_of_second(q, p, lq, -u, 1.0 - alpha)
    return g


# --- Renyi: log(sum p^a q^(1-a)) / (a-1), a above 0 and not 1
# With L the logarithm and r = exp(a lp + (1-a) lq - L), which sums to 1, grad_logq = -r and grad_logp = a/(a-1) r.
# q and a/(a-1) p are taken off, so that both sum to 0 and are 0 where the rows are equal: r - q = q (e^(a u - L) - 1).
# No column has a share of an infinite L: r counts as 0 in all of them.
@triton.jit
def or_without_shares(log_sum):
    """What a column's logarithm is taken less for its share of a sum: of a sum of 0, too, all shares are 0."""
    return tl.where(log_sum == -INFINITY, INFINITY, log_sum)


@triton.jit
def renyi_terms(p, q, lp, lq, u, alpha, beta):
    return (_alpha_term(p, q, lp, u, alpha),)


@triton.jit
def renyi_log_weight(p, q, lp, lq, u, alpha, beta):
    return tl.where(lp < LEAST_LOG, lp, tl.fma(alpha - 1.0, u, lp))


@triton.jit
def renyi_finish(total, log_sum, q_is_zero, p_is_zero, alpha, beta):
    log_sum = tl.where(q_is_zero & (alpha >= 1.0), INFINITY, tl.where(log_sum < -1e20, -INFINITY, log_sum))
    excess = alpha * (alpha - 1.0) * total
    near = (tl.abs(log_sum) < 0.5) & (tl.abs(excess) < 0.5)
    log_sum = tl.where(near, log1p(excess), log_sum)
    return log_sum / (alpha - 1.0), 0.0, 0.0, or_without_shares(log_sum)


@triton.jit
def _excess(probability, x, log_r):
    """r less the probability of one row; x is log r less its logarithm."""
    near = tl.abs(x) < 1.0
    return tl.where(near, probability * expm1(tl.where(near, x, 0.0)), exp(log_r) - probability)


@triton.jit
def renyi_grad_logq(p, q, lp, lq, u, alpha, beta, log_sum):
    log_r = renyi_log_weight(p, q, lp, lq, u, alpha, beta) - log_sum
    return -_excess(q, tl.fma(alpha, u, -log_sum), log_r)


@triton.jit
def renyi_grad_logp(p, q, lp, lq, u, alpha, beta, log_sum):
    log_r = renyi_log_weight(p, q, lp, lq, u, alpha, beta) - log_sum
    return alpha / (alpha - 1.0) * _excess(p, tl.fma(alpha - 1.0, u, -log_sum), log_r)


# --- alpha-beta: -1/(ab) sum (p^a q^b - a/l p^l - b/l q^l), l = a+b; a, b, l not 0
# A term is q^l f[0, a, l], the second divided difference of f(c) = e^(c u), which has no pole; it is taken from the
# neighbours among 0, a, l in their order (see the C++ twin). For small u it is
# q^l u² (1/2 + (a+l) u/6 + (a²+al+l²) u²/24 + ...), the quotients (l^n − a^n) / b by recurrence.
# grad_logq = (q^l − p^a q^b) / a and grad_logp = (p^l − p^a q^b) / b, whose sums add up to l D.
@triton.jit
def _power(x, lp, lq):
    """e^x, and 0 in a column without mass in either row, where a negative exponent would give infinity.

    A finite mask leaves no mass either: even a float64 probability is 0 below e^−745.
    """
    return tl.where((lp < LEAST_LOG) & (lq < LEAST_LOG), 0.0, exp(x))


@triton.jit
def _bounded(x):
    """So that times 0 it is 0."""
    return tl.where(x == INFINITY, LARGEST, x)


@triton.jit
def _slope(start, end, width, u):
    """q^l f over an interval, from q^l e^(c u) at its ends."""
    x = width * u
    near = tl.abs(x) < 1.0
    return tl.where(near, _bounded(start) * expm1(tl.where(near, x, 0.0)), end - start) / width


@triton.jit
def alpha_beta_terms(p, q, lp, lq, u, alpha, beta):
    a = alpha
    total = a + beta
    cross = _power(tl.fma(a, lp, beta * lq), lp, lq)
    q_power = _power(total * lq, lp, lq)
    p_power = _power(total * lp, lp, lq)
    # One of the gradients: the one that can stay finite where D is not.
    of_q = alpha > 0.0
    g = _slope(tl.where(of_q, q_power, cross), tl.where(of_q, cross, p_power), tl.where(of_q, a, beta), u)
    least = tl.minimum(0.0, tl.minimum(a, total))
    largest = tl.maximum(0.0, tl.maximum(a, total))
    # What of 0, a and l is neither.
    middle = tl.maximum(tl.minimum(0.0, tl.maximum(a, total)), tl.minimum(a, total))
    at_least = tl.where(least == a, cross, tl.where(least == total, p_power, q_power))
    at_middle = tl.where(middle == a, cross, tl.where(middle == total, p_power, q_power))
    at_largest = tl.where(largest == a, cross, tl.where(largest == total, p_power, q_power))
    far = _slope(at_middle, at_largest, largest - middle, u) - _slope(at_least, at_middle, middle - least, u)
    far = far / (largest - least)
    c3 = total + a
    c4 = c3 * total + a * a
    c5 = c4 * total + a * a * a
    c6 = c5 * total + (a * a) * (a * a)
    y = tl.fma(u, c6 / 720.0, c5 / 120.0)
    y = tl.fma(y, u, c4 / 24.0)
    y = tl.fma(y, u, c3 / 6.0)
    y = tl.fma(y, u, 0.5)
    near = tl.abs(u) * tl.maximum(tl.abs(a), tl.abs(total)) < 0.25
    value = tl.where(near, (_bounded(q_power) * u) * (u * y), far)
    # A difference of two infinities, which is NaN, stands for an infinite term.
    value = tl.where(value != value, INFINITY, value)
    return value, tl.where(of_q, -g, g)


@triton.jit
def alpha_beta_finish(total, summed, q_is_zero, p_is_zero, alpha, beta):
    """A column where p is 0 has infinite p^a q^b if a < 0, and p^l if l < 0; where q is 0, p^a q^b if b < 0, and q^l
    if l < 0. If infinities of both signs meet in a sum, the lower power decides: l against a if b < 0, else a."""
    a_falls, b_falls, l_falls = alpha < 0.0, beta < 0.0, alpha + beta < 0.0
    infinite = (q_is_zero & (b_falls | l_falls)) | (p_is_zero & (a_falls | l_falls))
    # A power beyond the range of floats, of a column next to no mass.
    beyond = (total == INFINITY) & ~infinite
    q_is_zero, p_is_zero = q_is_zero | beyond, p_is_zero | beyond
    infinite = infinite | beyond
    value = tl.where(infinite, INFINITY, total)
    other = (alpha + beta) * total - summed
    of_q, of_p = tl.where(a_falls, other, summed), tl.where(a_falls, summed, other)
    of_q = tl.where(infinite & q_is_zero & l_falls, -INFINITY, of_q)
    of_q = tl.where(infinite & p_is_zero & a_falls, INFINITY, of_q)
    of_q = tl.where(infinite & q_is_zero & b_falls, -INFINITY, of_q)
    of_p = tl.where(infinite & p_is_zero & l_falls, -INFINITY, of_p)
    of_p = tl.where(infinite & q_is_zero & b_falls, INFINITY, of_p)
    of_p = tl.where(infinite & p_is_zero & a_falls, -INFINITY, of_p)
    return value, of_q, of_p


@triton.jit
def alpha_beta_grad_logq(p, q, lp, lq, u, alpha, beta):
    """(q^l − p^a q^b) / a"""
    cross = _power(tl.fma(alpha, lp, beta * lq), lp, lq)
    return -_slope(_power((alpha + beta) * lq, lp, lq), cross, alpha, u)


@triton.jit
def alpha_beta_grad_logp(p, q, lp, lq, u, alpha, beta):
    """(p^l − p^a q^b) / b"""
    cross = _power(tl.fma(alpha, lp, beta * lq), lp, lq)
    return _slope(cross, _power((alpha + beta) * lp, lp, lq), beta, u)


POWER_DIVERGENCES = rows(globals(), alpha=Q_ZERO | P_ZERO, renyi=Q_ZERO, alpha_beta=Q_ZERO | P_ZERO)
