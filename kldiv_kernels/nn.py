"""The losses as modules: options at construction, tensors at call time."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.nn import Module

from kldiv_kernels import inputs, registry
from kldiv_kernels.losses import divergence_loss
from kldiv_kernels.policy import OPTION_NAMES, policy_loss, resolve
from kldiv_kernels.policy import PolicyLoss as PolicyLossResult
from kldiv_kernels.top_k import topk_divergence_loss

_PER_CALL = ("weight", "labels", "mask", "normalizer", "exclude", "tail_logprob")
_POLICY_PER_CALL = (
    "old_logprobs", "reference_logprobs", "reference_logits", "sampling_logprobs", "anchor_logprobs", "token_weights",
    "mask", "normalizer",
)  # fmt: skip


def _refuse_batch(where: str, options: Iterable[str], of_a_batch: tuple[str, ...]) -> None:
    given = [name for name in options if name in of_a_batch]
    if given:
        raise TypeError(f"{where}: {', '.join(given)} belongs to a batch; give it to forward()")


def _written(options: dict[str, Any]) -> list[str]:
    return [f"{name}={value!r}" for name, value in options.items()]


class _LossOfAKind(Module):
    """A kind and options; what belongs to a batch is given to `forward`."""

    def __init__(self, kind: str = "forward_kl", **options: Any) -> None:
        super().__init__()
        where = type(self).__name__
        statistic = registry.get(kind, f"{where}: kind", registry.divergence_names())
        _refuse_batch(where, options, _PER_CALL)
        inputs.of_a_kind(where, statistic, options.get("alpha"), options.get("beta"))
        self.kind = kind
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join([repr(self.kind), *_written(self.options)])


class DivergenceLoss(_LossOfAKind):
    """`divergence_loss` with its options fixed.

    Args: `kind` and the keyword arguments of `divergence_loss`. weight, labels, mask, normalizer and exclude belong to
    a batch and are given to `forward`.

    >>> import torch, kldiv_kernels as kk
    >>> criterion = kk.nn.DivergenceLoss("js", beta=0.9)
    >>> criterion(torch.zeros(2, 4), torch.eye(2, 4), mask=torch.tensor([True, False])).item() > 0
    True
    """

    def forward(self, logits: Tensor, reference_logits: Tensor, **batch: Any) -> Tensor:
        return divergence_loss(logits, reference_logits, self.kind, **self.options, **batch)


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


class TopKDivergenceLoss(_LossOfAKind):
    """`topk_divergence_loss` with its options fixed.

    Args: `kind` and the keyword arguments of `topk_divergence_loss`. weight, labels, mask, normalizer and tail_logprob
    belong to a batch and are given to `forward`.

    >>> import torch, kldiv_kernels as kk
    >>> criterion = kk.nn.TopKDivergenceLoss("js", tail="renormalize")
    >>> criterion(torch.zeros(1, 4), torch.tensor([[0, 1]]), torch.tensor([[0.25, 0.25]]).log()).item() < 1e-6
    True
    """

    def forward(self, logits: Tensor, topk_ids: Tensor, topk_logprobs: Tensor, **batch: Any) -> Tensor:
        return topk_divergence_loss(logits, topk_ids, topk_logprobs, self.kind, **self.options, **batch)


class PolicyLoss(Module):
    """`policy_loss` with its options fixed; they are checked at construction.

    Args: the keyword arguments of `policy_loss`. The tensors and the normalizer belong to a batch and are given to
    `forward`.

    >>> import torch, kldiv_kernels as kk
    >>> criterion = kk.nn.PolicyLoss(loss_type="dapo", clip_high=0.28)
    >>> out = criterion(torch.zeros(1, 2, 4), torch.tensor([[1, 2]]), torch.tensor([1.0]))
    >>> out.loss.item()
    -1.0
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        where = type(self).__name__
        _refuse_batch(where, options, _POLICY_PER_CALL)
        known = [p.name for p in inspect.signature(policy_loss).parameters.values() if p.kind is p.KEYWORD_ONLY]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise TypeError(f"{where}: {', '.join(unknown)} is no option of policy_loss; expected one of {known}")
        chosen = {name: options.get(name) for name in OPTION_NAMES}
        resolve(where, options.get("preset"), chosen)
        self.options = options

    def forward(self, logits: Tensor, token_ids: Tensor, advantages: Tensor, **batch: Any) -> PolicyLossResult:
        return policy_loss(logits, token_ids, advantages, **self.options, **batch)

    def extra_repr(self) -> str:
        return ", ".join(_written(self.options))
