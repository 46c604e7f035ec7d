"""The losses as modules: options at construction, where they are checked, and what belongs to a batch at call time."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Module

from kldiv_kernels import inputs, registry
from kldiv_kernels.backends import names as backend_names
from kldiv_kernels.choices import DivergenceKind
from kldiv_kernels.inputs import Parameter
from kldiv_kernels.linear import (
    AnyHead,
    linear_divergence_loss,
    linear_policy_loss,
    linear_topk_divergence_loss,
)
from kldiv_kernels.losses import divergence_loss, reduction_checked
from kldiv_kernels.policy import OPTION_NAMES, policy_loss, resolve
from kldiv_kernels.policy import PolicyLoss as PolicyLossResult
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

_REFERENCE = ("reference_hidden", "reference_head", "reference_logits")
_PER_CALL = ("weight", "labels", "mask", "normalizer", "exclude", "tail_logprob", *_REFERENCE, "reference_projection")
_POLICY_PER_CALL = (
    "old_logprobs", "reference_logprobs", *_REFERENCE, "sampling_logprobs", "anchor_logprobs", "token_weights", "mask",
    "normalizer",
)  # fmt: skip
F = TypeVar("F", bound=Callable[..., Any])


def __dir__() -> list[str]:
    return __all__


def _keywords(function: Callable[..., Any], without: Iterable[str]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters
    return {n: p for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY and n not in without}


def _explicit(
    of: Callable[..., Any], *, without: Iterable[str] = (), only: Iterable[str] | None = None
) -> Callable[[F], F]:
    """For help() and editors at run time: `**options` of a method is written out as the keywords of a function."""

    def of_method(method: F) -> F:
        own = inspect.signature(method)
        kept = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        names = {p.name for p in kept}
        more = [p for n, p in _keywords(of, without).items() if n not in names and (only is None or n in only)]
        method.__signature__ = own.replace(parameters=[*kept, *more])  # type: ignore[attr-defined]
        return method

    return of_method


def _known(where: str, options: Mapping[str, Any], function: Callable[..., Any], per_call: tuple[str, ...]) -> None:
    allowed = _keywords(function, per_call)
    batch = [name for name in options if name in per_call]
    if batch:
        raise TypeError(f"{where}: {', '.join(batch)} belongs to a batch; give it to forward()")
    for name in options:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(
                f"{where}: {name} is no option of {function.__name__}{hint} (options: {', '.join(allowed)})"
            )


def _checked_values(where: str, statistic: Any, options: Mapping[str, Any]) -> None:
    """What the loss would say of these at its first call. A parameter per token has the shape of a batch: then."""
    alpha, beta = inputs.of_a_kind(where, statistic, options.get("alpha"), options.get("beta"))
    reduction_checked(where, options.get("reduction", "mean"))
    given: dict[str, Any] = {"alpha": alpha, "beta": beta}
    given |= {name: options[name] for name in ("temperature", "reference_temperature") if name in options}
    ordinary: dict[str, Any] = {"temperature": 1.0, "reference_temperature": None, "alpha": 0.5, "beta": 0.5}
    numbers = {**ordinary, **{name: value for name, value in given.items() if not isinstance(value, Tensor)}}
    row = torch.zeros(1, 2)
    inputs.prepare(
        where, row, row, None, stats=(statistic,), mask=None, ignore_index=-100, vocab_size=None, exclude=None,
        **numbers,
    )  # fmt: skip
    vocab_size, backend = options.get("vocab_size"), options.get("backend", "auto")
    if vocab_size is not None and (not isinstance(vocab_size, int) or vocab_size < 1):
        raise ValueError(f"{where}: vocab_size is {vocab_size!r}; expected None or 1 and more")
    if backend not in ("auto", *backend_names()):
        raise ValueError(f"{where}: backend is {backend!r}; expected auto or one of {', '.join(backend_names())}")


def _written(options: Mapping[str, Any]) -> list[str]:
    return [f"{name}={value!r}" for name, value in options.items()]


class _LossOfAKind(Module):
    """A kind and options; what belongs to a batch is given to `forward`."""

    _function: Callable[..., Tensor]

    def __init__(self, kind: str, options: Mapping[str, Any]) -> None:
        super().__init__()
        where = type(self).__name__
        statistic = registry.get(kind, f"{where}: kind", registry.divergence_names())
        _known(where, options, type(self)._function, _PER_CALL)
        _checked_values(where, statistic, options)
        self.kind = kind
        self.options = dict(options)

    def extra_repr(self) -> str:
        return ", ".join([repr(self.kind), *_written(self.options)])


class DivergenceLoss(_LossOfAKind):
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

    @_explicit(divergence_loss, without=_PER_CALL)
    def __init__(self, kind: DivergenceKind | str = "forward_kl", **options: Unpack[FixedOptionsOfAKind]) -> None:
        super().__init__(kind, options)

    @_explicit(divergence_loss, only=_PER_CALL)
    def forward(self, logits: Tensor, reference_logits: Tensor, **batch: Unpack[BatchOptions]) -> Tensor:
        return divergence_loss(logits, reference_logits, self.kind, **self.options, **batch)


class KLDivLoss(DivergenceLoss):
    """KL(teacher || student), or KL(student || teacher) with `reverse=True`; see `DivergenceLoss`.

    >>> import torch, kldiv_kernels as kk
    >>> kk.nn.KLDivLoss(reverse=True)(torch.zeros(1, 4), torch.zeros(1, 4)).item()
    0.0
    """

    @_explicit(divergence_loss, without=(*_PER_CALL, "alpha", "beta"))
    def __init__(self, *, reverse: bool = False, **options: Unpack[FixedOptions]) -> None:
        super().__init__("reverse_kl" if reverse else "forward_kl", **options)


class JSDivLoss(DivergenceLoss):
    """Generalised Jensen–Shannon divergence β·KL(p||m) + (1−β)·KL(q||m), m = βp + (1−β)q; see `DivergenceLoss`.

    >>> import torch, kldiv_kernels as kk
    >>> kk.nn.JSDivLoss(beta=0.5)(torch.zeros(1, 4), torch.zeros(1, 4)).item()
    0.0
    """

    @_explicit(divergence_loss, without=(*_PER_CALL, "alpha"))
    def __init__(self, beta: Parameter = 0.5, **options: Unpack[FixedOptions]) -> None:
        super().__init__("js", beta=beta, **options)


class HellingerLoss(DivergenceLoss):
    """Squared Hellinger distance 1 − Σ√(pq); see `DivergenceLoss`.

    >>> import torch, kldiv_kernels as kk
    >>> kk.nn.HellingerLoss()(torch.zeros(1, 4), torch.zeros(1, 4)).item()
    0.0
    """

    @_explicit(divergence_loss, without=(*_PER_CALL, "alpha", "beta"))
    def __init__(self, **options: Unpack[FixedOptions]) -> None:
        super().__init__("hellinger", **options)


class TopKDivergenceLoss(_LossOfAKind):
    """`topk_divergence_loss` with its options fixed, and checked at construction.

    Args: `kind` and the keyword arguments of `topk_divergence_loss`. weight, labels, mask, normalizer and tail_logprob
    belong to a batch and are given to `forward`.

    >>> import torch, kldiv_kernels as kk
    >>> criterion = kk.nn.TopKDivergenceLoss("js", tail="renormalize")
    >>> criterion(torch.zeros(1, 4), torch.tensor([[0, 1]]), torch.tensor([[0.25, 0.25]]).log()).item() < 1e-6
    True
    """

    _function = staticmethod(topk_divergence_loss)

    @_explicit(topk_divergence_loss, without=_PER_CALL)
    def __init__(self, kind: DivergenceKind | str = "forward_kl", **options: Unpack[FixedTopKOptions]) -> None:
        super().__init__(kind, options)
        tail_checked(type(self).__name__, kind, options.get("tail", "bucket"))

    @_explicit(topk_divergence_loss, only=_PER_CALL)
    def forward(
        self, logits: Tensor, topk_ids: Tensor, topk_logprobs: Tensor, **batch: Unpack[TopKBatchOptions]
    ) -> Tensor:
        return topk_divergence_loss(logits, topk_ids, topk_logprobs, self.kind, **self.options, **batch)


class LinearDivergenceLoss(_LossOfAKind):
    """`linear_divergence_loss` with its options fixed, and checked at construction.

    Args: `kind` and the keyword arguments of `linear_divergence_loss`. Hidden states, heads, reference_logits, weight,
    labels, mask, normalizer and exclude belong to a batch and are given to `forward`.

    >>> import torch, kldiv_kernels as kk
    >>> criterion = kk.nn.LinearDivergenceLoss("js", beta=0.9)
    >>> criterion(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, 5), torch.zeros(4, 5)).item()
    0.0
    """

    _function = staticmethod(linear_divergence_loss)

    @_explicit(linear_divergence_loss, without=_PER_CALL)
    def __init__(self, kind: DivergenceKind | str = "forward_kl", **options: Unpack[FixedLinearOptions]) -> None:
        super().__init__(kind, options)

    @_explicit(linear_divergence_loss, only=_PER_CALL)
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


class LinearTopKDivergenceLoss(_LossOfAKind):
    """`linear_topk_divergence_loss` with its options fixed, and checked at construction.

    Args: as for `TopKDivergenceLoss`, with rows_per_chunk and logits_dtype; `forward` gets hidden states and the head.

    >>> import torch, kldiv_kernels as kk
    >>> criterion = kk.nn.LinearTopKDivergenceLoss(tail="renormalize")
    >>> ids, logprobs = torch.tensor([[0, 1]]), torch.tensor([[0.25, 0.25]]).log()
    >>> criterion(torch.zeros(1, 3), torch.zeros(4, 3), ids, logprobs).item() < 1e-6
    True
    """

    _function = staticmethod(linear_topk_divergence_loss)

    @_explicit(linear_topk_divergence_loss, without=_PER_CALL)
    def __init__(self, kind: DivergenceKind | str = "forward_kl", **options: Unpack[FixedLinearTopKOptions]) -> None:
        super().__init__(kind, options)
        tail_checked(type(self).__name__, kind, options.get("tail", "bucket"))

    @_explicit(linear_topk_divergence_loss, only=_PER_CALL)
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


class _PolicyLossOfOptions(Module):
    """Options; what belongs to a batch is given to `forward`."""

    _function: Callable[..., PolicyLossResult]

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        where = type(self).__name__
        _known(where, options, type(self)._function, _POLICY_PER_CALL)
        resolve(where, options.get("preset"), {name: options.get(name) for name in OPTION_NAMES})
        shared = ("temperature", "vocab_size", "backend")
        _checked_values(
            where, registry.STATISTICS["forward_kl"], {n: x for n, x in options.items() if n in shared}
        )  # fmt: skip
        self.options = dict(options)

    def extra_repr(self) -> str:
        return ", ".join(_written(self.options))


class PolicyLoss(_PolicyLossOfOptions):
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

    @_explicit(policy_loss, without=_POLICY_PER_CALL)
    def __init__(self, **options: Unpack[FixedPolicyOptions]) -> None:
        super().__init__(options)

    @_explicit(policy_loss, only=_POLICY_PER_CALL)
    def forward(
        self, logits: Tensor, token_ids: Tensor, advantages: Tensor, **batch: Unpack[PolicyBatchOptions]
    ) -> PolicyLossResult:
        options: dict[str, Any] = {**self.options, **batch}
        return policy_loss(logits, token_ids, advantages, **options)


class LinearPolicyLoss(_PolicyLossOfOptions):
    """`linear_policy_loss` with its options fixed; they are checked at construction.

    Args: as for `PolicyLoss`, with rows_per_chunk and logits_dtype; `forward` gets hidden states and the head.

    >>> import torch, kldiv_kernels as kk
    >>> criterion = kk.nn.LinearPolicyLoss(loss_type="dapo")
    >>> criterion(torch.zeros(1, 2, 3), torch.zeros(4, 3), torch.tensor([[1, 2]]), torch.tensor([1.0])).loss.item()
    -1.0
    """

    _function = staticmethod(linear_policy_loss)

    @_explicit(linear_policy_loss, without=_POLICY_PER_CALL)
    def __init__(self, **options: Unpack[FixedLinearPolicyOptions]) -> None:
        super().__init__(options)

    @_explicit(linear_policy_loss, only=_POLICY_PER_CALL)
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
