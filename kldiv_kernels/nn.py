"""The losses as modules: options at construction, tensors at call time."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import Module

from kldiv_kernels import registry
from kldiv_kernels.losses import divergence_loss

_PER_CALL = ("weight", "labels", "mask", "normalizer", "exclude")


class DivergenceLoss(Module):
    """`divergence_loss` with its options fixed.

    Args: `kind` and the keyword arguments of `divergence_loss`. weight, labels, mask, normalizer and exclude belong to
    a batch and are given to `forward`.

    >>> import torch, kldiv_kernels as kk
    >>> criterion = kk.nn.DivergenceLoss("js", beta=0.9)
    >>> criterion(torch.zeros(2, 4), torch.eye(2, 4), mask=torch.tensor([True, False])).item() > 0
    True
    """

    def __init__(self, kind: str = "forward_kl", **options: Any) -> None:
        super().__init__()
        registry.get(kind, f"{type(self).__name__}: kind", registry.divergence_names())
        per_call = [name for name in options if name in _PER_CALL]
        if per_call:
            raise TypeError(f"{type(self).__name__}: {', '.join(per_call)} belongs to a batch; give it to forward()")
        self.kind = kind
        self.options = options

    def forward(self, logits: Tensor, reference_logits: Tensor, **batch: Any) -> Tensor:
        return divergence_loss(logits, reference_logits, self.kind, **self.options, **batch)

    def extra_repr(self) -> str:
        return ", ".join([repr(self.kind), *(f"{name}={value!r}" for name, value in self.options.items())])


class KLDivLoss(DivergenceLoss):
    """KL(teacher || student), or KL(student || teacher) with `reverse=True`.

    >>> import torch, kldiv_kernels as kk
    >>> kk.nn.KLDivLoss(reverse=True)(torch.zeros(1, 4), torch.zeros(1, 4)).item()
    0.0
    """

    def __init__(self, *, reverse: bool = False, **options: Any) -> None:
        super().__init__("reverse_kl" if reverse else "forward_kl", **options)


class JSDivLoss(DivergenceLoss):
    """Generalised Jensen–Shannon divergence β·KL(p||m) + (1−β)·KL(q||m), m = βp + (1−β)q.

    >>> import torch, kldiv_kernels as kk
    >>> kk.nn.JSDivLoss(beta=0.5)(torch.zeros(1, 4), torch.zeros(1, 4)).item()
    0.0
    """

    def __init__(self, beta: float = 0.5, **options: Any) -> None:
        super().__init__("js", beta=beta, **options)


class HellingerLoss(DivergenceLoss):
    """Squared Hellinger distance 1 − Σ√(pq).

    >>> import torch, kldiv_kernels as kk
    >>> kk.nn.HellingerLoss()(torch.zeros(1, 4), torch.zeros(1, 4)).item()
    0.0
    """

    def __init__(self, **options: Any) -> None:
        super().__init__("hellinger", **options)
