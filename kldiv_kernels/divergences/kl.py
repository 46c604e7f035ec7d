"""The entropies and the KL divergences."""

from __future__ import annotations

import torch
from torch import Tensor

from kldiv_kernels.divergences.elements import Elements, difference
from kldiv_kernels.divergences.statistic import Statistic, swap, swapped, two_sided, zero


# --- entropy: -sum q log q
def entropy_value(e: Elements) -> Tensor:
    return -e.q_times(e.logq)


def entropy_grad_logq(e: Elements) -> Tensor:
    return -e.q_times(e.logq) - e.q


ENTROPY = Statistic(
    "entropy",
    "H(q) = −Σ q log q",
    student=True,
    reference=False,
    value=entropy_value,
    grad_logq=entropy_grad_logq,
    grad_logp=zero,
)
REFERENCE_ENTROPY = Statistic(
    "reference_entropy",
    "H(p) = −Σ p log p",
    student=False,
    reference=True,
    value=swap(entropy_value),
    grad_logq=zero,
    grad_logp=swap(entropy_grad_logq),
)


# --- cross-entropy: -sum p log q
def cross_entropy_value(e: Elements) -> Tensor:
    return -e.p_times(e.logq)


def cross_entropy_grad_logq(e: Elements) -> Tensor:
    """−p with q added, whose sum is 0 then: equal rows have a gradient of exactly 0."""
    return -difference(e)


CROSS_ENTROPY = two_sided(
    "cross_entropy", "−Σ p log q", cross_entropy_value, cross_entropy_grad_logq, cross_entropy_value
)


# --- forward KL: q (e^u u - e^u + 1); the reverse one has the roles exchanged
def kl_value(e: Elements) -> Tensor:
    near = e.q * (e.u * e.u.exp() - torch.expm1(e.u))
    return torch.where(e.u.abs() < 1, near, e.p_times(e.u) - e.p + e.q)


def kl_grad_logq(e: Elements) -> Tensor:
    return -difference(e)


def kl_grad_logp(e: Elements) -> Tensor:
    return e.p_times(e.u)


FORWARD_KL = two_sided("forward_kl", "KL(p||q) = Σ p (log p − log q)", kl_value, kl_grad_logq, kl_grad_logp)
REVERSE_KL = swapped("reverse_kl", "KL(q||p) = Σ q (log q − log p)", FORWARD_KL)


# --- Jeffreys: (p - q) u
def jeffreys_value(e: Elements) -> Tensor:
    near = e.q * torch.expm1(e.u) * e.u
    return torch.where(e.u.abs() < 1, near, e.p_times(e.u) - e.q_times(e.u))


def jeffreys_grad_logq(e: Elements) -> Tensor:
    return -difference(e) - e.q_times(e.u)


JEFFREYS = two_sided("jeffreys", "KL(p||q) + KL(q||p)", jeffreys_value, jeffreys_grad_logq, swap(jeffreys_grad_logq))

KL_DIVERGENCES = (ENTROPY, REFERENCE_ENTROPY, CROSS_ENTROPY, FORWARD_KL, REVERSE_KL, JEFFREYS)
