"""A function of TRL, patched and as it is, on the same rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kldiv_kernels.adapters.trl import patched_trl

BATCH, TOKENS, VOCAB = 2, 7, 37
# For values of a few nats and gradients relative to the largest: what each dtype's arithmetic leaves.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def rows(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Student and teacher as GKD passes them: a view without the last position."""
    student, teacher = 2 * torch.randn(2, BATCH, TOKENS + 1, VOCAB, dtype=torch.float64).to(dtype)
    return student[:, :-1].detach(), teacher[:, :-1].detach()


def ragged_labels() -> Tensor:
    labels = torch.randint(VOCAB, (BATCH, TOKENS))
    labels[0, :3], labels[1, 5:] = -100, -100
    return labels


def value_and_gradient(
    loss: Callable[..., Any], student: Tensor, *others: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    # Not a clone, which would be contiguous.
    student = student.detach().requires_grad_()
    value = loss(student, *others, **options)
    # Not all the same weight, so that a gradient of another token's loss is seen.
    (value.double() * torch.linspace(1, 2, value.numel()).reshape(value.shape)).sum().backward()
    return value.detach(), student.grad


def compare(
    name: str, owner: Any, student: Tensor, *others: Any, backend: str = "auto", slack: float = 1, **options: Any
) -> None:
    """Patched against TRL's own; `name` is what `owner` calls it."""
    expected, gradient = value_and_gradient(getattr(owner, name), student, *others, **options)
    original = getattr(owner, name)
    with patched_trl(backend):
        assert getattr(owner, name) is not original
        value, ours = value_and_gradient(getattr(owner, name), student, *others, **options)
    tolerance = slack * TOLERANCE[student.dtype]
    assert value.shape == expected.shape
    assert value.dtype == expected.dtype
    assert gradient.abs().max() > 1e-4
    assert torch.allclose(value, expected, rtol=tolerance, atol=tolerance)
    assert torch.allclose(ours, gradient, rtol=0, atol=tolerance * gradient.abs().max())


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p‖q) of probabilities, with 0·log 0 = 0."""
    return torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum(-1)
