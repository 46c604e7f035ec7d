"""Divergences through powers of p and q. Formulas: Cichocki and Amari (2010)."""

from __future__ import annotations

import torch
from torch import Tensor

from kldiv_kernels.divergences.elements import LOG_ZERO, Elements, expm1_over
from kldiv_kernels.divergences.statistic import FINITE, NOT_ONE, NOT_ZERO, two_sided


# --- alpha: (p^a q^(1-a) - a p - (1-a) q) / (a (a-1))
def _alpha_half(e: Elements, a: Tensor) -> Tensor:
    """The divergence for a >= 1/2, where nothing cancels as a goes to 1."""
    near = e.q * (e.u.exp() * expm1_over(a - 1, e.u) - torch.expm1(e.u)) / a
    far = (_p_expm1_over(e, a - 1) - e.p + e.q) / a
    return torch.where(e.u.abs() < 1, near, far)


def _p_expm1_over(e: Elements, c: Tensor) -> Tensor:
    """p expm1(c u) / c without overflow where p is small, and without 0 * inf."""
    x = c * e.u
    small = e.p_times(expm1_over(c, e.u))
    # p e^(c u) where p or q is 0; a power of 0 is 1 when its exponent is 0.
    power = (_scaled_log(1 + c, e.logp) - _scaled_log(c, e.logq)).exp()
    zero = ((e.logp <= LOG_ZERO) & (c > -1)) | ((e.logq <= LOG_ZERO) & (c < 0))
    power = torch.where(zero, torch.zeros_like(power), power)
    large = (torch.where(e.u.isinf(), power, (e.logp + x).exp()) - e.p) / c
    return torch.where((c == 0) | (x < 1), small, large)


def _scaled_log(c: Tensor, log_weight: Tensor) -> Tensor:
    return torch.where(c == 0, torch.zeros_like(log_weight), c * log_weight)


def alpha_value(e: Elements) -> Tensor:
    return torch.where(e.alpha >= 0.5, _alpha_half(e, e.alpha), _alpha_half(e.swapped(), 1 - e.alpha))


def alpha_grad_logp(e: Elements) -> Tensor:
    return _p_expm1_over(e, e.alpha - 1)


def alpha_grad_logq(e: Elements) -> Tensor:
    return _p_expm1_over(e.swapped(), -e.alpha)


ALPHA = two_sided(
    "alpha",
    "(Σ p^α q^(1−α) − 1) / (α(α−1)); α→1: KL(p||q), α→0: KL(q||p)",
    alpha_value,
    alpha_grad_logq,
    alpha_grad_logp,
    alpha=FINITE,
)


# --- Renyi: log(sum p^a q^(1-a)) / (a-1)
# Its gradient is a softmax r of a log p + (1-a) log q; q and p are taken off it, so that equal rows have a gradient of
# exactly 0: r - q = q (e^(a u - L) - 1), L the logarithm. No column has a share of an infinite L: r counts as 0.
def renyi_log_sum(e: Elements) -> Tensor:
    return torch.where(e.logp <= LOG_ZERO, torch.full_like(e.logp, -torch.inf), e.logp + (e.alpha - 1) * e.u)


def _renyi_log(total: Tensor, log_sum: Tensor, alpha: Tensor) -> Tensor:
    """The logarithm, through log1p of the alpha divergence where the sum is near 1."""
    near = torch.log1p((alpha * (alpha - 1) * total).clamp_min(-0.5))
    return torch.where((log_sum.abs() < 0.5) & total.isfinite(), near, log_sum)


def renyi_combine(total: Tensor, log_sum: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return _renyi_log(total, log_sum, alpha) / (alpha - 1)


def share_of_log_sum(e: Elements, log_term: Tensor) -> Tensor:
    assert e.log_sum is not None
    return _share(log_term, e.log_sum)


def _share(log_term: Tensor, log_sum: Tensor) -> Tensor:
    return torch.where(log_sum.isinf(), torch.zeros_like(log_term), (log_term - log_sum).exp())


def _renyi_excess(e: Elements, probability: Tensor, c: Tensor) -> Tensor:
    """r less the probability, which is r e^-(c u - L)."""
    assert e.log_sum is not None
    log = _renyi_log(e.sums[0], e.log_sum, e.alpha)
    x = c * e.u - log
    far = _share(renyi_log_sum(e), log) - probability
    return torch.where(x.abs() < 1, probability * torch.expm1(x), far)


def renyi_grad_logq(e: Elements) -> Tensor:
    return -_renyi_excess(e, e.q, e.alpha)


def renyi_grad_logp(e: Elements) -> Tensor:
    return e.alpha / (e.alpha - 1) * _renyi_excess(e, e.p, e.alpha - 1)


RENYI = two_sided(
    "renyi",
    "log(Σ p^α q^(1−α)) / (α−1)",
    alpha_value,
    renyi_grad_logq,
    renyi_grad_logp,
    alpha=NOT_ONE,
    combine=renyi_combine,
    log_sum=renyi_log_sum,
)


# --- alpha-beta: -1/(ab) sum (p^a q^b - a/l p^l - b/l q^l), l = a+b
def _alpha_beta_powers(e: Elements) -> tuple[Tensor, Tensor, Tensor]:
    """p^a q^b, p^(a+b), q^(a+b); a column that is -inf in both rows contributes nothing."""
    a, b = e.alpha, e.beta
    nowhere = (e.logp <= LOG_ZERO) & (e.logq <= LOG_ZERO)
    zero = torch.zeros_like(e.logp)
    logp, logq = torch.where(nowhere, zero, e.logp), torch.where(nowhere, zero, e.logq)
    powers = ((a * logp + b * logq).exp(), ((a + b) * logp).exp(), ((a + b) * logq).exp())
    return tuple(torch.where(nowhere, zero, x) for x in powers)  # type: ignore[return-value]


def _slope(start: Tensor, end: Tensor, width: Tensor, u: Tensor) -> Tensor:
    """q^l (e^(y u) - e^(x u)) / (y - x), y = x + width, from q^l e^(x u) and q^l e^(y u)."""
    # The difference of two infinite powers has the sign of their ratio's logarithm.
    step = torch.where(start.isinf() & end.isinf(), (width * u).sign() * torch.inf, end - start)
    return torch.where((width * u).abs() < 1, _bounded(start) * torch.expm1(width * u), step) / width


def _bounded(power: Tensor) -> Tensor:
    """So that times 0 it is 0."""
    return power.clamp_max(torch.finfo(power.dtype).max)


def _one_sign(g: Tensor, positive: Tensor) -> Tensor:
    """Where infinities of both signs meet in a row, those of the lower power stay, as `positive` says."""
    up, down = g == torch.inf, g == -torch.inf
    both = up.any(dim=1, keepdim=True) & down.any(dim=1, keepdim=True)
    return torch.where(both & torch.where(positive, down, up), torch.zeros_like(g), g)


def alpha_beta_value(e: Elements) -> Tensor:
    """q^l f[0, a, l], l = a+b: the second divided difference of f(c) = e^(c u), which has no pole.

    The textbook form is a difference of numbers a thousand times larger near a = 0, b = 0 or l = 0.
    """
    cross, p_power, q_power = _alpha_beta_powers(e)
    total = e.alpha + e.beta
    nodes, order = torch.stack([torch.zeros_like(total), e.alpha, total]).sort(dim=0)
    powers = torch.stack([q_power, cross, p_power]).gather(0, order.expand(3, *e.u.shape))
    span = nodes[2] - nodes[0]
    upper = _slope(powers[1], powers[2], nodes[2] - nodes[1], e.u)
    far = (upper - _slope(powers[0], powers[1], nodes[1] - nodes[0], e.u)) / span
    # e^(c u) / 2 u² at the mean of the nodes, with the next two terms: for span u near 0.
    centre = nodes.mean(dim=0) * e.u
    spread = ((nodes - nodes.mean(dim=0)) * e.u).square().sum(dim=0)
    cubes = ((nodes - nodes.mean(dim=0)) * e.u).pow(3).sum(dim=0)
    series = 0.5 + spread / 48 + cubes / 360 + spread.square() / 2880
    near = _bounded(q_power) * centre.exp() * e.u.square() * series
    value = torch.where((span * e.u).abs() < _near_of(e.u.dtype), near, far)
    # A difference of infinities stands for an infinite term; rows that hold NaN have it in u.
    return torch.where(value.isnan() & ~e.u.isnan(), torch.full_like(value, torch.inf), value)


def _near_of(dtype: torch.dtype) -> float:
    """Where the series' error and the rounding of a difference are about the same."""
    return 0.02 if dtype == torch.float64 else 0.25


def alpha_beta_grad_logq(e: Elements) -> Tensor:
    """(q^l - p^a q^b) / a. Where p is 0, by p^a if a < 0; where q is 0, by q^l or q^b. l is below a if b < 0."""
    cross, _, q_power = _alpha_beta_powers(e)
    return _one_sign(-_slope(q_power, cross, e.alpha, e.u), e.beta > 0)


def alpha_beta_grad_logp(e: Elements) -> Tensor:
    cross, p_power, _ = _alpha_beta_powers(e)
    return _one_sign(_slope(cross, p_power, e.beta, e.u), e.alpha > 0)


ALPHA_BETA = two_sided(
    "alpha_beta",
    "−1/(αβ) Σ (p^α q^β − α/(α+β) p^(α+β) − β/(α+β) q^(α+β))",
    alpha_beta_value,
    alpha_beta_grad_logq,
    alpha_beta_grad_logp,
    alpha=NOT_ZERO,
    beta=NOT_ZERO,
)

POWER_DIVERGENCES = (ALPHA, RENYI, ALPHA_BETA)
