"""Sums of squares and products of p and q."""

from __future__ import annotations

import torch
from torch import Tensor

from kldiv_kernels.divergences.elements import Elements, difference
from kldiv_kernels.divergences.powers import share_of_log_sum
from kldiv_kernels.divergences.statistic import Statistic, two_sided, zero


# --- collision: log sum q^2
def collision_value(e: Elements) -> Tensor:
    return e.q * e.q


def collision_combine(total: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return total.log()


def collision_grad_logq(e: Elements) -> Tensor:
    return 2 * e.q * e.q / e.sums[0]


COLLISION = Statistic(
    "collision",
    "log Σ q²",
    student=True,
    reference=False,
    value=collision_value,
    grad_logq=collision_grad_logq,
    grad_logp=zero,
    combine=collision_combine,
)


# --- Cauchy-Schwarz: -log((sum pq)^2 / (sum p^2 sum q^2))
def cauchy_schwarz_sums(e: Elements) -> tuple[Tensor, ...]:
    d = difference(e)
    return e.q * e.q, e.p * e.p, e.q * d, d * d


def cauchy_schwarz_combine(
    qq: Tensor, pp: Tensor, qd: Tensor, dd: Tensor, log_pq: Tensor, alpha: Tensor, beta: Tensor
) -> Tensor:
    """With d = p - q: 1 - (sum pq)^2 / (sum p^2 sum q^2) = (sum q^2 sum d^2 - (sum qd)^2) / (sum p^2 sum q^2)."""
    missing = ((qq * dd - qd * qd) / (qq * pp)).clamp_min(0)
    far = qq.log() + pp.log() - 2 * log_pq
    return torch.where(missing < 0.5, -torch.log1p(-missing.clamp_max(0.5)), far)


def cauchy_schwarz_grad_logq(e: Elements) -> Tensor:
    """2 q (q / sum q^2 - p / sum pq); near: through d = p - q, where the two fractions agree."""
    qq, _, qd, _ = e.sums
    near = -2 * e.q * (difference(e) - e.q * (qd / qq)) / (qq + qd)
    far = 2 * e.q * e.q / qq - 2 * share_of_log_sum(e, e.logp + e.logq)
    return torch.where(qd.abs() < 0.5 * qq, near, far)


def cauchy_schwarz_grad_logp(e: Elements) -> Tensor:
    _, pp, qd, dd = e.sums
    pd = qd + dd
    near = 2 * e.p * (difference(e) - e.p * (pd / pp)) / (pp - pd)
    far = 2 * e.p * e.p / pp - 2 * share_of_log_sum(e, e.logp + e.logq)
    return torch.where(pd.abs() < 0.5 * pp, near, far)


CAUCHY_SCHWARZ = two_sided(
    "cauchy_schwarz",
    "−log((Σ pq)² / (Σ p² Σ q²))",
    cauchy_schwarz_sums,
    cauchy_schwarz_grad_logq,
    cauchy_schwarz_grad_logp,
    combine=cauchy_schwarz_combine,
    log_sum=lambda e: e.logp + e.logq,
)

QUADRATIC_DIVERGENCES = (COLLISION, CAUCHY_SCHWARZ)
