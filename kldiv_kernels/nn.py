"""The losses as modules: options at construction, where they are checked, and what belongs to a batch at call time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from kldiv_kernels.choices import DivergenceKind
from kldiv_kernels.fixed_options import PER_CALL, POLICY_PER_CALL, LossOfAKind, PolicyLossOfOptions, explicit
from kldiv_kernels.inputs import Parameter
from kldiv_kernels.linear import (
    AnyHead,
    linear_divergence_loss,
    linear_policy_loss,
    linear_topk_divergence_loss,
)
from kldiv_kernels.losses import divergence_loss
from kldiv_kernels.policy import PolicyLoss as PolicyLossResult
from kldiv_kernels.policy import policy_loss
from kldiv_kernels.top_k import tail_checked, topk_divergence_loss

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kldiv_kernels.signatures import (
        BatchOptions,
        FixedLinearOptions,
        FixedLinearPolicyOptions,
        FixedLinearTopKOptions,
        FixedOptions,
        FixedOptionsOfAKind,
        FixedPolicyOptions,
        FixedTopKOptions,
        LinearBatchOptions,
        LinearPolicyBatchOptions,
        PolicyBatchOptions,
        TopKBatchOptions,
    )

__all__ = [
    "DivergenceLoss",
    "HellingerLoss",
    "JSDivLoss",
    "KLDivLoss",
    "LinearDivergenceLoss",
    "LinearPolicyLoss",
    "LinearTopKDivergenceLoss",
    "PolicyLoss",
    "TopKDivergenceLoss",
]


def __dir__() -> list[str]:
    return __all__


class DivergenceLoss(LossOfAKind):
    """`divergence_loss` with its options fixed, and checked at construction.

    Args: `kind` and the keyword arguments of `divergence_loss`. weight, labels, mask, normalizer and exclude belong to
    a batch and are given to `forward`.

    Raises: TypeError, ValueError as `divergence_loss`, and for an option that it does not have.

    >>> import torch, kldiv_kernels as kk
    >>> criterion = kk.nn.DivergenceLoss("js", beta=0.9)
    >>> criterion(torch.zeros(2, 4), torch.eye(2, 4), mask=torch.tensor([True, False])).item() > 0
    True
    """

    _function = staticmethod(divergence_loss)

    @explicit(divergence_loss, without=PER_CALL)
    def __init__(self, kind: DivergenceKind | str = "forward_kl", **options: Unpack[FixedOptionsOfAKind]) -> None:
        super().__init__(kind, options)

    @explicit(divergence_loss, only=PER_CALL)
    def forward(self, logits: Tensor, reference_logits: Tensor, **batch: Unpack[BatchOptions]) -> Tensor:
        return divergence_loss(logits, reference_logits, self.kind, **self.options, **batch)


class KLDivLoss(DivergenceLoss):
    """KL(teacher || student), or KL(student || teacher) with `reverse=True`; see `DivergenceLoss`.

    >>> import torch, kldiv_kernels as kk
    >>> kk.nn.KLDivLoss(reverse=True)(torch.zeros(1, 4), torch.zeros(1, 4)).item()
    0.0
    """

    @explicit(divergence_loss, without=(*PER_CALL, "alpha", "beta"))
    def __init__(self, *, reverse: bool = False, **options: Unpack[FixedOptions]) -> None:
        super().__init__("reverse_kl" if reverse else "forward_kl", **options)


class JSDivLoss(DivergenceLoss):
    """Generalised Jensen–Shannon divergence β·KL(p||m) + (1−β)·KL(q||m), m = βp + (1−β)q; see `DivergenceLoss`.

    >>> import torch, kldiv_kernels as kk
    >>> kk.nn.JSDivLoss(beta=0.5)(torch.zeros(1, 4), torch.zeros(1, 4)).item()
    0.0
    """

    @explicit(divergence_loss, without=(*PER_CALL, "alpha"))
    def __init__(self, beta: Parameter = 0.5, **options: Unpack[FixedOptions]) -> None:
        super().__init__("js", beta=beta, **options)


class HellingerLoss(DivergenceLoss):
    """Squared Hellinger distance 1 − Σ√(pq); see `DivergenceLoss`.

    >>> import torch, kldiv_kernels as kk
    >>> kk.nn.HellingerLoss()(torch.zeros(1, 4), torch.zeros(1, 4)).item()
    0.0
    """

    @explicit(divergence_loss, without=(*PER_CALL, "alpha", "beta"))
    def __init__(self, **options: Unpack[FixedOptions]) -> None:
        super().__init__("hellinger", **options)


class TopKDivergenceLoss(LossOfAKind):
    """`topk_divergence_loss` with its options fixed, and checked at construction.

    Args: `kind` and the keyword arguments of `topk_divergence_loss`. weight, labels, mask, normalizer and tail_logprob
    belong to a batch and are given to `forward`.

    >>> import torch, kldiv_kernels as kk
    >>> criterion = kk.nn.TopKDivergenceLoss("js", tail="renormalize")
    >>> criterion(torch.zeros(1, 4), torch.tensor([[0, 1]]), torch.tensor([[0.25, 0.25]]).log()).item() < 1e-6
    True
    """

    _function = staticmethod(topk_divergence_loss)

    @explicit(topk_divergence_loss, without=PER_CALL)
    def __init__(self, kind: DivergenceKind | str = "forward_kl", **options: Unpack[FixedTopKOptions]) -> None:
        super().__init__(kind, options)
        tail_checked(type(self).__name__, kind, options.get("tail", "bucket"))

    @explicit(topk_divergence_loss, only=PER_CALL)
    def forward(
        self, logits: Tensor, topk_ids: Tensor, topk_logprobs: Tensor, **batch: Unpack[TopKBatchOptions]
    ) -> Tensor:
        return topk_divergence_loss(logits, topk_ids, topk_logprobs, self.kind, **self.options, **batch)


class LinearDivergenceLoss(LossOfAKind):
    """`linear_divergence_loss` with its options fixed, and checked at construction.

    Args: `kind` and the keyword arguments of `linear_divergence_loss`. Hidden states, heads, reference_logits, weight,
    labels, mask, normalizer and exclude belong to a batch and are given to `forward`.

    >>> import torch, kldiv_kernels as kk
    >>> criterion = kk.nn.LinearDivergenceLoss("js", beta=0.9)
    >>> criterion(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, 5), torch.zeros(4, 5)).item()
    0.0
    """

    _function = staticmethod(linear_divergence_loss)

    @explicit(linear_divergence_loss, without=PER_CALL)
    def __init__(self, kind: DivergenceKind | str = "forward_kl", **options: Unpack[FixedLinearOptions]) -> None:
        super().__init__(kind, options)

    @explicit(linear_divergence_loss, only=PER_CALL)
    def forward(
        self,
        hidden: Tensor,
        head: AnyHead,
        reference_hidden: Tensor | None = None,
        reference_head: AnyHead | None = None,
        **batch: Unpack[LinearBatchOptions],
    ) -> Tensor:
        return linear_divergence_loss(
            hidden, head, reference_hidden, reference_head, self.kind, **self.options, **batch
        )  # fmt: skip


class LinearTopKDivergenceLoss(LossOfAKind):
    """`linear_topk_divergence_loss` with its options fixed, and checked at construction.

    Args: as for `TopKDivergenceLoss`, with rows_per_chunk and logits_dtype; `forward` gets hidden states and the head.

    >>> import torch, kldiv_kernels as kk
    >>> criterion = kk.nn.LinearTopKDivergenceLoss(tail="renormalize")
    >>> ids, logprobs = torch.tensor([[0, 1]]), torch.tensor([[0.25, 0.25]]).log()
    >>> criterion(torch.zeros(1, 3), torch.zeros(4, 3), ids, logprobs).item() < 1e-6
    True
    """

    _function = staticmethod(linear_topk_divergence_loss)

    @explicit(linear_topk_divergence_loss, without=PER_CALL)
    def __init__(self, kind: DivergenceKind | str = "forward_kl", **options: Unpack[FixedLinearTopKOptions]) -> None:
        super().__init__(kind, options)
        tail_checked(type(self).__name__, kind, options.get("tail", "bucket"))

    @explicit(linear_topk_divergence_loss, only=PER_CALL)
    def forward(
        self,
        hidden: Tensor,
        head: AnyHead,
        topk_ids: Tensor,
        topk_logprobs: Tensor,
        **batch: Unpack[TopKBatchOptions],
    ) -> Tensor:
        return linear_topk_divergence_loss(
            hidden, head, topk_ids, topk_logprobs, self.kind, **self.options, **batch
        )  # fmt: skip


class PolicyLoss(PolicyLossOfOptions):
    """`policy_loss` with its options fixed; they are checked at construction.

    Args: the keyword arguments of `policy_loss`. The tensors and the normalizer belong to a batch and are given to
    `forward`.

    >>> import torch, kldiv_kernels as kk
    >>> criterion = kk.nn.PolicyLoss(loss_type="dapo", clip_high=0.28)
    >>> out = criterion(torch.zeros(1, 2, 4), torch.tensor([[1, 2]]), torch.tensor([1.0]))
    >>> out.loss.item()
    -1.0
    """

    _function = staticmethod(policy_loss)

    @explicit(policy_loss, without=POLICY_PER_CALL)
    def __init__(self, **options: Unpack[FixedPolicyOptions]) -> None:
        super().__init__(options)

    @explicit(policy_loss, only=POLICY_PER_CALL)
    def forward(
        self, logits: Tensor, token_ids: Tensor, advantages: Tensor, **batch: Unpack[PolicyBatchOptions]
    ) -> PolicyLossResult:
        options: dict[str, Any] = {**self.options, **batch}
        return policy_loss(logits, token_ids, advantages, **options)


class LinearPolicyLoss(PolicyLossOfOptions):
    """`linear_policy_loss` with its options fixed; they are checked at construction.

    Args: as for `PolicyLoss`, with rows_per_chunk and logits_dtype; `forward` gets hidden states and the head.

    >>> import torch, kldiv_kernels as kk
    >>> criterion = kk.nn.LinearPolicyLoss(loss_type="dapo")
    >>> criterion(torch.zeros(1, 2, 3), torch.zeros(4, 3), torch.tensor([[1, 2]]), torch.tensor([1.0])).loss.item()
    -1.0
    """

    _function = staticmethod(linear_policy_loss)

    @explicit(linear_policy_loss, without=POLICY_PER_CALL)
    def __init__(self, **options: Unpack[FixedLinearPolicyOptions]) -> None:
        super().__init__(options)

    @explicit(linear_policy_loss, only=POLICY_PER_CALL)
    def forward(
        self,
        hidden: Tensor,
        head: AnyHead,
        token_ids: Tensor,
        advantages: Tensor,
        **batch: Unpack[LinearPolicyBatchOptions],
    ) -> PolicyLossResult:
        options: dict[str, Any] = {**self.options, **batch}
        return linear_policy_loss(hidden, head, token_ids, advantages, **options)
