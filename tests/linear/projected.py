"""Hidden states and heads as models have them, and what their losses are in float64, through logits all at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import oracle
import torch
from checks import STATISTICS
from torch import Tensor

import kldiv_kernels as kk


@dataclass
class Model:
    """Hidden states [*, H] and a head; leaves that require grad unless frozen."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def head(self) -> kk.Head:
        return kk.Head(self.weight, self.bias, self.scale, self.softcap)

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def double(self) -> Model:
        """The same numbers in float64, as leaves of their own."""
        own = [
            None if x is None else x.detach().double().requires_grad_() for x in (self.hidden, self.weight, self.bias)
        ]
        return Model(own[0], own[1], own[2], self.scale, self.softcap)  # type: ignore[arg-type]

    def logits(self) -> Tensor:
        z = self.hidden @ self.weight.t()
        z = self.scale * (z if self.bias is None else z + self.bias)
        return z if self.softcap is None else self.softcap * (z / self.softcap).tanh()


def model(
    shape: tuple[int, ...], width: int, columns: int, dtype: torch.dtype = torch.float32, *, bias: bool = True,
    size: float = 2.0, **how: Any,
) -> Model:  # fmt: skip
    """Logits of about `size`."""
    hidden = torch.randn(*shape, width).to(dtype).requires_grad_()
    weight = (size / width**0.5 * torch.randn(columns, width)).to(dtype).requires_grad_()
    return Model(hidden, weight, torch.randn(columns).to(dtype).requires_grad_() if bias else None, **how)


@dataclass
class Wanted:
    """A scalar and its gradients in float64."""

    value: Tensor
    gradients: list[Tensor]
    statistics: Tensor = field(default_factory=lambda: torch.empty(0))


def by_oracle(
    name: str, student: Model, teacher: Model | None, cotangent: Tensor, columns: int, labels: Tensor | None = None,
    **options: Any,
) -> Wanted:  # fmt: skip
    """Σ cotangent · statistic of the first columns; gradients of the student's leaves, then of the teacher's."""
    ours, theirs = student.double(), None if teacher is None else teacher.double()
    z, t = ours.logits()[..., :columns], None if theirs is None else theirs.logits()[..., :columns]
    found = oracle.evaluate(
        name, z.detach(), None if t is None else t.detach(), labels, cotangent=cotangent.double(), **options
    )  # fmt: skip
    gradients = list(torch.autograd.grad(z, ours.leaves, found.student))
    if theirs is not None and t is not None:
        gradients += torch.autograd.grad(t, theirs.leaves, found.teacher)
    return Wanted((cotangent * found.value).sum(), gradients, found.value)


def check_gradients(got: list[Tensor], wanted: list[Tensor], allowed: float | None = None) -> None:
    """Relative to each tensor's largest: rounding of the logits' gradient (bfloat16) and of the result."""
    for mine, exact in zip(got, wanted, strict=True):
        assert mine.shape == exact.shape
        bound = allowed if allowed is not None else 1e-5 if mine.dtype != torch.bfloat16 else 8e-3
        error = (mine.double() - exact).abs().max().item()
        assert error <= bound * max(exact.abs().max().item(), 1e-6), (error, exact.abs().max().item())


def differentiable(name: str) -> bool:
    return STATISTICS[name].differentiable
