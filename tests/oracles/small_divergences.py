"""Pairs of rows that nearly agree, as trained students and teachers do."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import torch
from checks import DIVERGENCES
from torch import Tensor


def log_sums(backend: str) -> int:
    """log p − log q of a column carries the roundings of both rows' log-sum-exp, and its gradient inherits them.

    A GPU's p and q are each off by 2^-22 of their own besides, which is as much as one more.
    """
    return 3 if backend in ("cuda", "triton") else 2


def _vanishes_for_equal_rows(name: str) -> bool:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    return abs(oracle.evaluate(name, logits, logits).value.item()) < 1e-12


VANISHING = [name for name in DIVERGENCES if _vanishes_for_equal_rows(name)]


def near(student: Tensor, size: float = 9e-4) -> tuple[Tensor, Tensor]:
    return student, student + size * torch.randn(student.shape)


def _one_ulp_of_bfloat16() -> tuple[Tensor, Tensor]:
    """Few columns differ, each by the last bit of its bfloat16."""
    student = torch.randn(3, 1031).to(torch.bfloat16)
    teacher = student.clone()
    bits = teacher.view(torch.int16)
    bits[:, ::150] += 1
    return student, teacher


def _massless_head() -> tuple[Tensor, Tensor]:
    """The first 6,000 columns carry no mass and disagree: a sweep that starts there must not believe them."""
    student, teacher = near(torch.randn(2, 9000))
    student[:, :6000], teacher[:, :6000] = -60 + student[:, :6000], -55 + 3 * teacher[:, :6000]
    return student, teacher


def _minus_infinite_head() -> tuple[Tensor, Tensor]:
    student, teacher = near(torch.randn(2, 9000))
    student[:, :6000] = teacher[:, :6000] = -torch.inf
    return student, teacher


SCENARIOS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "scale 1": lambda: near(torch.randn(4, 1031)),
    "scale 5": lambda: near(5 * torch.randn(4, 1031)),
    "offset 50": lambda: near(50 + torch.randn(4, 1031)),
    "offset -50": lambda: near(torch.randn(4, 1031) - 50),
    "bfloat16 ulps": _one_ulp_of_bfloat16,
    "massless head": _massless_head,
    "head at -inf": _minus_infinite_head,
}
