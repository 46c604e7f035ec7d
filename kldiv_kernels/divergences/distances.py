"""Distances of p and q, column by column."""

from __future__ import annotations

import torch
from torch import Tensor

from kldiv_kernels.divergences.elements import LOG_ZERO, Elements
from kldiv_kernels.divergences.statistic import swap, swapped, two_sided


# --- squared Hellinger: (sqrt p - sqrt q)^2 / 2
def hellinger_value(e: Elements) -> Tensor:
    near = 0.5 * e.q * torch.expm1(0.5 * e.u) ** 2
    return torch.where(e.u.abs() < 1, near, 0.5 * ((0.5 * e.logp).exp() - (0.5 * e.logq).exp()) ** 2)


def hellinger_grad_logq(e: Elements) -> Tensor:
    near = -0.5 * e.q * torch.expm1(0.5 * e.u)
    return torch.where(e.u.abs() < 1, near, 0.5 * (e.q - (0.5 * (e.logp + e.logq)).exp()))


HELLINGER = two_sided(
    "hellinger",
    "1 − Σ√(pq)  (squared Hellinger distance)",
    hellinger_value,
    hellinger_grad_logq,
    swap(hellinger_grad_logq),
)


# --- total variation: |p - q| / 2, gradient 0 where p = q
def tvd_value(e: Elements) -> Tensor:
    near = 0.5 * e.q * torch.expm1(e.u).abs()
    return torch.where(e.u.abs() < 1, near, 0.5 * (e.p - e.q).abs())


def tvd_grad_logq(e: Elements) -> Tensor:
    return -0.5 * e.q * e.u.sign()


TVD = two_sided("tvd", "½ Σ|p−q|", tvd_value, tvd_grad_logq, swap(tvd_grad_logq))


# --- chi squared: (p - q)^2 / q = p^2 / q - 2 p + q
def chi2_value(e: Elements) -> Tensor:
    near = e.q * torch.expm1(e.u) ** 2
    return torch.where(e.u.abs() < 1, near, _p_squared_over_q(e) - 2 * e.p + e.q)


def _p_squared_over_q(e: Elements) -> Tensor:
    return torch.where(e.logp <= LOG_ZERO, torch.zeros_like(e.p), (e.logp + e.u).exp())


def chi2_grad_logq(e: Elements) -> Tensor:
    near = -e.q * torch.expm1(2 * e.u)
    return torch.where(e.u.abs() < 1, near, e.q - _p_squared_over_q(e))


def chi2_grad_logp(e: Elements) -> Tensor:
    near = 2 * e.p * torch.expm1(e.u)
    return torch.where(e.u.abs() < 1, near, 2 * (_p_squared_over_q(e) - e.p))


FORWARD_CHI2 = two_sided("forward_chi2", "Σ (p−q)²/q", chi2_value, chi2_grad_logq, chi2_grad_logp)
REVERSE_CHI2 = swapped("reverse_chi2", "Σ (p−q)²/p", FORWARD_CHI2)


# --- triangular discrimination: (p - q)^2 / (p + q)
def _triangular_ratio(e: Elements) -> Tensor:
    # (p - q) / (p + q)
    return torch.tanh(0.5 * e.u)


def triangular_value(e: Elements) -> Tensor:
    r = _triangular_ratio(e)
    return (e.p + e.q) * r * r


def triangular_grad_logq(e: Elements) -> Tensor:
    r = _triangular_ratio(e)
    return -e.q * r * (2 + r)


TRIANGULAR = two_sided(
    "triangular", "Σ (p−q)²/(p+q)", triangular_value, triangular_grad_logq, swap(triangular_grad_logq)
)

DISTANCES = (HELLINGER, TVD, FORWARD_CHI2, REVERSE_CHI2, TRIANGULAR)
