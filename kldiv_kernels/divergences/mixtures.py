"""KL divergences to a mixture of the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from kldiv_kernels.divergences.elements import LOG_ZERO, Elements, difference
from kldiv_kernels.divergences.kl import kl_grad_logp, kl_grad_logq, kl_value
from kldiv_kernels.divergences.statistic import UNIT, swapped, two_sided


# --- generalised Jensen-Shannon: m = beta p + (1 - beta) q, TRL's convention
# Both weights are passed: 1 - (1 - w) has lost the digits of a small w.
def _log_mixture(e: Elements, weight_of_p: Tensor, weight_of_q: Tensor) -> Tensor:
    return torch.logaddexp(e.logp + weight_of_p.log(), e.logq + weight_of_q.log())


def _js_near(e: Elements, weight_of_p: Tensor, weight_of_q: Tensor) -> Tensor:
    b, m = weight_of_p, weight_of_p * e.p + weight_of_q * e.q
    # log(q/m) = -log1p(beta expm1(u)) keeps the small differences that log q - log m would round away.
    return b * e.q * e.u.exp() * e.u - m * torch.log1p(b * torch.expm1(e.u))


def js_value(e: Elements) -> Tensor:
    b, log_m = e.beta, _log_mixture(e, e.beta, 1 - e.beta)
    # From both rows' side: at beta = 1/2 exchanging the rows leaves every bit.
    near = 0.5 * (_js_near(e, b, 1 - b) + _js_near(e.swapped(), 1 - b, b))
    far = b * e.p_times(e.logp - log_m) + (1 - b) * e.q_times(e.logq - log_m)
    inside = torch.where(e.u.abs() < 1, near, far)
    return torch.where(b <= 0, kl_value(e), torch.where(b >= 1, kl_value(e.swapped()), inside))


def _log_q_over_mixture(e: Elements, weight_of_p: Tensor, weight_of_q: Tensor) -> Tensor:
    near = -torch.log1p(weight_of_p * torch.expm1(e.u))
    return torch.where(e.u.abs() < 1, near, e.logq - _log_mixture(e, weight_of_p, weight_of_q))


def js_grad_logq(e: Elements) -> Tensor:
    inside = (1 - e.beta) * e.q_times(_log_q_over_mixture(e, e.beta, 1 - e.beta))
    ends = torch.where(e.beta <= 0, kl_grad_logq(e), kl_grad_logp(e.swapped()))
    return torch.where((e.beta > 0) & (e.beta < 1), inside, ends)


def js_grad_logp(e: Elements) -> Tensor:
    inside = e.beta * e.p_times(_log_q_over_mixture(e.swapped(), 1 - e.beta, e.beta))
    ends = torch.where(e.beta <= 0, kl_grad_logp(e), kl_grad_logq(e.swapped()))
    return torch.where((e.beta > 0) & (e.beta < 1), inside, ends)


JS = two_sided(
    "js",
    "β·KL(p||m) + (1−β)·KL(q||m), m = βp + (1−β)q; β=0: KL(p||q), β=1: KL(q||p)",
    js_value,
    js_grad_logq,
    js_grad_logp,
    beta=UNIT,
)


# --- skew KL: KL(p || m), m = alpha p + (1 - alpha) q
def skew_value(e: Elements) -> Tensor:
    a, m = e.alpha, e.alpha * e.p + (1 - e.alpha) * e.q
    w = -torch.log1p((1 - a) * torch.expm1(-e.u))  # log(p/m)
    near = m * (w * w.exp() - torch.expm1(w))
    far = e.p_times(e.logp - _log_mixture(e, a, 1 - a)) - e.p + m
    return torch.where(e.u.abs() < 1, near, far)


def _share_of_mixture(e: Elements) -> Tensor:
    """(1 - alpha) q / m, which no underflow of q and m can spoil; 0 for a column without mass."""
    odds = (1 - e.alpha).log() - e.alpha.log()
    share = torch.sigmoid(torch.where(odds.isinf(), odds, odds - e.u))
    return torch.where((e.logp <= LOG_ZERO) & (e.logq <= LOG_ZERO), torch.zeros_like(share), share)


def skew_grad_logq(e: Elements) -> Tensor:
    return -(1 - e.alpha) * _share_of_mixture(e) * difference(e)


def skew_grad_logp(e: Elements) -> Tensor:
    log_p_over_m = _log_q_over_mixture(e.swapped(), 1 - e.alpha, e.alpha)
    return e.p_times(log_p_over_m) - (1 - e.alpha) * (1 - _share_of_mixture(e)) * difference(e)


SKEW_KL = two_sided("skew_kl", "KL(p || αp + (1−α)q)", skew_value, skew_grad_logq, skew_grad_logp, alpha=UNIT)
SKEW_REVERSE_KL = swapped("skew_reverse_kl", "KL(q || (1−α)p + αq)", SKEW_KL)

MIXTURE_DIVERGENCES = (JS, SKEW_KL, SKEW_REVERSE_KL)
