"""The public functions: those of logits, with hidden states and heads in the place of logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kldiv_kernels.choices import DivergenceKind
from kldiv_kernels.keywords import F, keywords, nearest, written_out
from kldiv_kernels.linear.dtensors import on_spread_heads, with_spread_rows_and_heads
from kldiv_kernels.linear.projection import TeacherProjection, projected
from kldiv_kernels.linear.source import AnyHead, hidden_states
from kldiv_kernels.losses import divergence_loss, divergence_of
from kldiv_kernels.parallel import together
from kldiv_kernels.policy import (
    OPTION_NAMES,
    Groups,
    PolicyLoss,
    Tensors,
    of_spread_rows,
    off_policy_given,
    policy_loss,
    policy_loss_of,
    resolve,
)
from kldiv_kernels.stats import TokenStats, statistics_of, token_stats
from kldiv_kernels.top_k import topk_divergence_loss, topk_divergence_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kldiv_kernels.signatures import (
        LinearLossOptions,
        LinearPolicyOptions,
        LinearStatisticsOptions,
        LinearTopKOptions,
    )


_TENSORS = [field.name for field in fields(Tensors)]


class _Shared:
    """The keyword arguments that a function shares with that of logits, of which some mean nothing here."""

    def __init__(self, function: Callable[..., Any], *without: str) -> None:
        self.name, self.parameters = function.__name__, keywords(function, without)

    def __call__(self, function: F) -> F:
        return written_out(function, self.parameters)

    def complete(self, where: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """With defaults for those that are not given; TypeError for what is none."""
        for name in given:
            if name not in self.parameters:
                hint = nearest(name, self.parameters) or f"; see {self.name}"
                raise TypeError(f"{where}: {name} is no argument of it{hint}")
        return {name: given.get(name, parameter.default) for name, parameter in self.parameters.items()}


def _spread(options: dict[str, Any], reduce_hidden_grad: bool) -> dict[str, Any]:
    """Of the complete options those that say over which group the heads are spread, taken out of them."""
    spread = {name: options.pop(name) for name in ("group", "vocab_start")}
    return {**spread, "vocab_size": options["vocab_size"], "reduce_hidden_grad": reduce_hidden_grad}


_STATISTICS = _Shared(token_stats, "stats")
_LOSS = _Shared(divergence_loss, "in_place")
_POLICY = _Shared(policy_loss, "in_place", "reference_logits")
_TOPK = _Shared(topk_divergence_loss, "in_place")


@on_spread_heads
@together
@_STATISTICS
def linear_token_stats(
    hidden: Tensor,
    head: AnyHead,
    labels: Tensor | None = None,
    *,
    reference_hidden: Tensor | None = None,
    reference_head: AnyHead | None = None,
    reference_logits: Tensor | None = None,
    stats: Sequence[str] = ("logprob", "entropy"),
    logits_dtype: torch.dtype | None = None,
    rows_per_chunk: int | None = None,
    reduce_hidden_grad: bool = True,
    **options: Unpack[LinearStatisticsOptions],
) -> TokenStats:
    r"""`token_stats` of the logits hidden @ weightᵀ, of which only a chunk of rows is in memory at a time.

    The logits are computed once for the values, and once more for the gradient: two multiplications with the student's
    weight, and one each for the gradients of hidden states and weight that somebody wants.

    Args:
        hidden: [*, H], what goes into the model's last layer.
        head: that layer: a weight [V, H], an `nn.Linear` without hooks or adapters, or `kk.Head` with a scale or a
            softcap. Its weight and bias get gradients when they require them, summed in float32.
        labels: [*] or [*, K]; see `token_stats`.
        reference_hidden, reference_head: the teacher's. Width H and dtype may differ; where the vocabularies do, give
            `vocab_size`.
        reference_logits: [*, V], a teacher's logits, in place of reference_hidden and reference_head.
        logits_dtype: float32 (default), or the dtype of the hidden states. Rounding logits to bfloat16 makes the
            gradient of a KL of 8e-4 wrong by about half of its size.
        rows_per_chunk: how many rows of logits are in memory. Default: a number that fits (`kk.plan`). Values do not
            depend on it but for rounding.
        group, vocab_start: a process group over which the heads' rows are spread (tensor parallel), as in
            `token_stats`: `head` and `reference_head` are this process's rows, hidden states are the same on all.
        reduce_hidden_grad: whether the gradient of the hidden states is summed over the group, in float32. Default
            True; False where the layer in front does that (Megatron's ColumnParallelLinear, sequence parallel).
        stats, temperature, mask and the others: see `token_stats`. Rows that the mask leaves out are not multiplied.

    Returns: TokenStats, as `token_stats` does.

    Raises: TypeError, ValueError: naming the argument, what it was and what is allowed, before anything is multiplied.
        RuntimeError from a double backward; NotImplementedError under torch.func.

    >>> import torch, kldiv_kernels as kk
    >>> hidden, head = torch.ones(2, 3, requires_grad=True), torch.nn.Linear(3, 5)
    >>> stats = kk.linear_token_stats(hidden, head, torch.tensor([1, 4]))
    >>> torch.allclose(stats.entropy, kk.entropy(head(hidden)))
    True
    """
    where = "linear_token_stats"
    complete = _STATISTICS.complete(where, options)
    source = hidden_states(
        where, hidden, head, reference_hidden, reference_head, reference_logits, logits_dtype=logits_dtype,
        rows_per_chunk=rows_per_chunk, **_spread(complete, reduce_hidden_grad),
    )  # fmt: skip
    return statistics_of(where, source, labels, stats=stats, **complete)


@on_spread_heads
@together
@_LOSS
def linear_divergence_loss(
    hidden: Tensor,
    head: AnyHead,
    reference_hidden: Tensor | None = None,
    reference_head: AnyHead | None = None,
    kind: DivergenceKind | str = "forward_kl",
    *,
    reference_logits: Tensor | None = None,
    reference_projection: TeacherProjection | None = None,
    logits_dtype: torch.dtype | None = None,
    rows_per_chunk: int | None = None,
    reduce_hidden_grad: bool = True,
    **options: Unpack[LinearLossOptions],
) -> Tensor:
    """`divergence_loss` of the logits hidden @ weightᵀ, of which only a chunk of rows is in memory at a time.

    With `reduction` "mean" or "sum" the gradients of hidden states and weights come out of the same pass: one
    multiplication for the logits of each side, one for each gradient that is wanted.

    Args:
        hidden, head, reference_hidden, reference_head, reference_logits, logits_dtype, rows_per_chunk,
            reduce_hidden_grad: see `linear_token_stats`.
        reference_projection: in place of all three, what `teacher_projection` makes of a teacher; for forward_kl and a
            frozen head. It is exact as float32 sums of logits are: a KL below 1e-5 is not told from 0.
        kind, weight, labels, reduction and the others: see `divergence_loss`.

    Returns, raises: as `divergence_loss` and `linear_token_stats`.

    >>> import torch, kldiv_kernels as kk
    >>> student, teacher = torch.nn.Linear(3, 5), torch.nn.Linear(4, 5)
    >>> hidden, theirs = torch.ones(2, 3, requires_grad=True), torch.ones(2, 4)
    >>> loss = kk.linear_divergence_loss(hidden, student, theirs, teacher, "js", beta=0.9)
    >>> torch.allclose(loss, kk.js_divergence(student(hidden), teacher(theirs), beta=0.9))
    True
    """
    where = "linear_divergence_loss"
    if reference_hidden is None and reference_logits is None and reference_projection is None:
        raise ValueError(
            f"{where}: reference_hidden is None; expected the teacher's hidden states and head, or reference_logits"
        )
    complete = _LOSS.complete(where, options)
    source = hidden_states(
        where, hidden, head, reference_hidden, reference_head, reference_logits, logits_dtype=logits_dtype,
        rows_per_chunk=rows_per_chunk, **_spread(complete, reduce_hidden_grad),
    )  # fmt: skip
    if reference_projection is not None:
        source = projected(where, source, hidden, reference_projection, kind, complete)
    return divergence_of(where, source, kind, **complete)


@with_spread_rows_and_heads(of_spread_rows)
@together
@_POLICY
def linear_policy_loss(
    hidden: Tensor,
    head: AnyHead,
    token_ids: Tensor,
    advantages: Tensor,
    *,
    reference_hidden: Tensor | None = None,
    reference_head: AnyHead | None = None,
    reference_logits: Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    rows_per_chunk: int | None = None,
    reduce_hidden_grad: bool = True,
    **options: Unpack[LinearPolicyOptions],
) -> PolicyLoss:
    """`policy_loss` of the logits hidden @ weightᵀ, of which only a chunk of rows is in memory at a time.

    Where a token's gradient depends on that token alone, the gradients come out of the pass that finds the values.
    Other losses take two: values first, then the logits once more for the gradients.

    Args:
        hidden: [B, T, H], or [N, H] for packed tokens. head, reference_hidden, reference_head, reference_logits,
            logits_dtype, rows_per_chunk, reduce_hidden_grad: see `linear_token_stats`. The reference is for the KL, and
            gets no gradient.
        token_ids, advantages, loss_type and the others: see `policy_loss`.

    Returns, raises: as `policy_loss` and `linear_token_stats`.

    >>> import torch, kldiv_kernels as kk
    >>> hidden, head = torch.ones(1, 2, 3, requires_grad=True), torch.nn.Linear(3, 5)
    >>> out = kk.linear_policy_loss(hidden, head, torch.tensor([[1, 2]]), torch.tensor([1.0]), loss_type="dapo")
    >>> out.loss.backward()
    >>> round(out.loss.item(), 4), list(hidden.grad.shape)
    (-1.0, [1, 2, 3])
    """
    where = "linear_policy_loss"
    given = _POLICY.complete(where, options)
    source = hidden_states(
        where, hidden, head, reference_hidden, reference_head, reference_logits, logits_dtype=logits_dtype,
        rows_per_chunk=rows_per_chunk, frozen_reference=True, **_spread(given, reduce_hidden_grad),
    )  # fmt: skip
    given |= {"token_ids": token_ids, "advantages": advantages, "reference_logits": source.reference}
    tensors = Tensors(**{name: given[name] for name in _TENSORS})
    chosen = resolve(where, given["preset"], {name: given[name] for name in OPTION_NAMES})
    rest = ("per_token_gradient", "temperature", "reference_temperature", "ignore_index", "vocab_size", "backend")
    groups = Groups(given["sequence_group"], given["batch_group"])
    return policy_loss_of(
        where, source, tensors, chosen, groups, corrects=off_policy_given(given), **{name: given[name] for name in rest}
    )


@on_spread_heads
@together
@_TOPK
def linear_topk_divergence_loss(
    hidden: Tensor,
    head: AnyHead,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    kind: DivergenceKind | str = "forward_kl",
    *,
    logits_dtype: torch.dtype | None = None,
    rows_per_chunk: int | None = None,
    reduce_hidden_grad: bool = True,
    **options: Unpack[LinearTopKOptions],
) -> Tensor:
    """`topk_divergence_loss` of the logits hidden @ weightᵀ, of which only a chunk of rows is in memory at a time.

    Args:
        hidden, head, logits_dtype, rows_per_chunk, reduce_hidden_grad: see `linear_token_stats`.
        topk_ids, topk_logprobs, kind, tail and the others: see `topk_divergence_loss`.

    Returns, raises: as `topk_divergence_loss` and `linear_token_stats`.

    >>> import torch, kldiv_kernels as kk
    >>> hidden, head = torch.ones(1, 3, requires_grad=True), torch.nn.Linear(3, 5)
    >>> ids, logprobs = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]]).log()
    >>> loss = kk.linear_topk_divergence_loss(hidden, head, ids, logprobs, tail="bucket")
    >>> torch.allclose(loss, kk.topk_divergence_loss(head(hidden), ids, logprobs))
    True
    """
    where = "linear_topk_divergence_loss"
    complete = _TOPK.complete(where, options)
    source = hidden_states(
        where, hidden, head, logits_dtype=logits_dtype, rows_per_chunk=rows_per_chunk,
        **_spread(complete, reduce_hidden_grad),
    )  # fmt: skip
    return topk_divergence_of(where, source, topk_ids, topk_logprobs, kind, **complete)
