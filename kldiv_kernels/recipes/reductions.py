"""From tokens to sequences, groups and losses: what the recipes add up.

x is [B, T], mask [B, T] bool, groups [B]. What stands where the mask is False is not looked at, NaN or not, and gets no
gradient. An empty sum is 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kldiv_kernels import inputs
from kldiv_kernels.groups import extreme, numbered, sums
from kldiv_kernels.policy import PolicyLoss, aggregate
from kldiv_kernels.recipes.checks import of_tokens_checked


def defaults(options: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """What a method gives to `policy_loss` where its caller has said nothing else.

    >>> defaults({"clip_low": 0.1}, clip_low=0.2, clip_high=0.28)
    {'clip_low': 0.1, 'clip_high': 0.28}
    """
    return {**values, **options}


def widened(x: Tensor) -> Tensor:
    """float32 at least: bfloat16 counts to 256.

    >>> widened(torch.zeros(1, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x, and 0 where the mask is False.

    >>> masked(torch.tensor([1.0, torch.nan]), torch.tensor([True, False]))
    tensor([1., 0.])
    """
    return x if mask is None else torch.where(mask != 0, x, 0.0)


def times(weight: Tensor, value: Tensor) -> Tensor:
    """weight·value, and 0 where the weight is, also beside an infinite value, which then has no gradient either.

    >>> times(torch.tensor([0.5, 0.0]), torch.tensor([2.0, torch.inf]))
    tensor([1., 0.])
    """
    return weight * torch.where((weight == 0) & ~value.isfinite(), 0.0, value)


def tempered_softmax(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """softmax(logits/temperature) [*, V], without a kernel.

    By log_softmax first: dividing would round a number that is common to a row.

    >>> tempered_softmax(torch.tensor([1000.0, 1000.0]), 0.1)
    tensor([0.5000, 0.5000])
    """
    return (logits.log_softmax(-1) / temperature).softmax(-1)


def valid_labels(
    labels: Tensor, mask: Tensor | None = None, ignore_index: int = -100, classes: int | None = None
) -> tuple[Tensor, Tensor]:
    """(labels with −1 where there is none, bool where there is one), both like `labels`.

    What `exclude=` wants of labels: −1 excludes no column. IndexError for a label below 0, or of `classes` and above,
    where values are looked at; elsewhere a label of −1 becomes −2, which is not one of an ignored row.

    >>> valid_labels(torch.tensor([3, -100, 2]), torch.tensor([True, True, False]))
    (tensor([ 3, -1, -1]), tensor([ True, False, False]))
    """
    valid = valid_tokens(labels, mask, ignore_index)
    inputs.range_checked(
        "recipes", "labels", labels, ~valid, 0, classes, labels.shape, f"or ignore_index = {ignore_index}"
    )
    return torch.where(valid, torch.where(labels == -1, -2, labels), -1), valid


def valid_tokens(token_ids: Tensor, mask: Tensor | None, ignore_index: int = -100) -> Tensor:
    """Bool [B, T]: the tokens that count, as `policy_loss` has it."""
    inputs.integers_checked("recipes", "labels", token_ids)
    of_tokens_checked(token_ids, mask=mask)
    valid = token_ids != ignore_index
    return valid if mask is None else valid & (mask != 0)


def valid_rows(logits: Tensor, labels: Tensor | None, mask: Tensor | None, ignore_index: int = -100) -> Tensor:
    """Bool [*], of logits [*, V]: the rows that count, with labels or without.

    >>> valid_rows(torch.zeros(2, 3), torch.tensor([1, -100]), None)
    tensor([ True, False])
    """
    if labels is not None:
        return valid_tokens(labels, mask, ignore_index)
    if mask is None:
        return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    of_tokens_checked(logits[..., 0], mask=mask)
    return mask != 0


def sequence_sum(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Σ_t of each sequence: [B, T] -> [B].

    >>> sequence_sum(torch.tensor([[1.0, 2.0]]), torch.tensor([[True, False]]))
    tensor([1.])
    """
    return masked(widened(x), mask).sum(-1)


def sequence_mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean over each sequence's tokens: [B, T] -> [B]; 0 for a sequence without tokens.

    >>> sequence_mean(torch.tensor([[1.0, 2.0]]), torch.tensor([[True, True]]))
    tensor([1.5000])
    """
    count = max(x.shape[-1], 1) if mask is None else (mask != 0).sum(-1).clamp_min(1)
    return sequence_sum(x, mask) / count


def batch_mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean over all tokens that the mask has, a scalar; 0 without one.

    >>> batch_mean(torch.tensor([[1.0, 2.0]]), torch.tensor([[False, True]])).item()
    2.0
    """
    count = max(x.numel(), 1) if mask is None else (mask != 0).sum().clamp_min(1)
    return masked(widened(x), mask).sum() / count


def over_rows(
    where: str, x: Tensor, mask: Tensor, reduction: str = "mean", normalizer: float | Tensor | None = None
) -> Tensor:
    """What `kk.divergence_loss` makes of its rows: "mean", over `normalizer` where it is given, "sum" or "none".

    Raises ValueError, which begins with `where`, for another reduction.

    >>> over_rows("loss", torch.tensor([1.0, 2.0]), torch.tensor([False, True]))
    tensor(2.)
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{where}: reduction is {reduction!r}; expected mean, sum or none")
    x = masked(widened(x), mask)
    if reduction == "none":
        return x
    how = "token-mean" if reduction == "mean" else "token-sum"
    return aggregate(x, mask, how, normalizer if reduction == "mean" else None, True)


def segment_sum(x: Tensor, segments: Tensor, count: int) -> Tensor:
    """Sums of the tokens of a segment: [B, T] -> [B, count]; a token of segment −1 is left out.

    >>> segment_sum(torch.tensor([[1.0, 2.0, 4.0, 8.0]]), torch.tensor([[0, 0, 1, -1]]), 2)
    tensor([[3., 4.]])
    """
    x, inside = widened(x), segments >= 0
    zeros = x.new_zeros(x.shape[0], count)
    return zeros.scatter_add(1, segments.clamp_min(0), torch.where(inside, x, 0.0))


def segment_mean(x: Tensor, segments: Tensor, count: int) -> Tensor:
    """Means of the tokens of a segment: [B, T] -> [B, count]; 0 for an empty one.

    >>> segment_mean(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0, 0, -1]]), 2)
    tensor([[1.5000, 0.0000]])
    """
    size = segment_sum(torch.ones_like(x), segments, count)
    return segment_sum(x, segments, count) / size.clamp_min(1)


def reverse_cumsum(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Σ_{j ≥ t} x_j of each sequence: [B, T] -> [B, T].

    >>> reverse_cumsum(torch.tensor([[1.0, 2.0, 4.0]]))
    tensor([[7., 6., 4.]])
    """
    return masked(widened(x), mask).flip(-1).cumsum(-1).flip(-1)


def group_sum(x: Tensor, groups: Tensor, mask: Tensor | None = None) -> Tensor:
    """Σ over the sample's group, at each sample: [B] -> [B].

    >>> group_sum(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([5, 5, 0]))
    tensor([3., 3., 4.])
    """
    index = numbered(groups)
    return sums(masked(widened(x), mask), index)[index]


def group_mean(x: Tensor, groups: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean over the sample's group, at each sample: [B] -> [B]; of the masked in; 0 in a group without one.

    >>> group_mean(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([5, 5, 0]))
    tensor([1.5000, 1.5000, 4.0000])
    """
    count = group_sum(torch.ones_like(x), groups, mask)
    return group_sum(x, groups, mask) / count.clamp_min(1)


def group_logsumexp(x: Tensor, groups: Tensor, mask: Tensor | None = None) -> Tensor:
    """log Σ exp over the sample's group, at each sample: [B] -> [B]; −inf in a group without one.

    >>> group_logsumexp(torch.zeros(3), torch.tensor([5, 5, 0])).exp()
    tensor([2., 2., 1.])
    """
    index, share, top = _shares(x, groups, mask)
    total = sums(share, index)[index]
    none = total == 0
    return torch.where(none, -torch.inf, torch.where(none, 1.0, total).log() + top)


def group_softmax(x: Tensor, groups: Tensor, mask: Tensor | None = None) -> Tensor:
    """exp(x) / Σ exp over the sample's group: [B] -> [B]; 0 where the mask is False.

    >>> group_softmax(torch.zeros(3), torch.tensor([5, 5, 0]))
    tensor([0.5000, 0.5000, 1.0000])
    """
    index, share, _ = _shares(x, groups, mask)
    total = sums(share, index)[index]
    return share / torch.where(total == 0, 1.0, total)


def _shares(x: Tensor, groups: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The groups' numbers, exp(x − the group's largest), and that; 0 for what is not in the mask."""
    index = numbered(groups)
    x = widened(x)
    kept = x if mask is None else torch.where(mask != 0, x, -torch.inf)
    top = extreme(kept.detach(), index, "amax")
    top = torch.where(top.isfinite(), top, 0.0)
    return index, (kept - top).exp(), top


def policy_result(
    per_token: Tensor,
    logprob: Tensor,
    mask: Tensor,
    *,
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
    count_empty_sequences: bool = True,
    entropy: Tensor | None = None,
    metrics: Mapping[str, Tensor] | None = None,
) -> PolicyLoss:
    """A `kk.PolicyLoss` of a loss that a recipe made itself.

    Args:
        per_token: [B, T], the loss of each token, with gradient. logprob: [B, T] of the policy. mask: [B, T] bool.
        aggregation, normalizer, count_empty_sequences: as for `policy_loss`.
        entropy: [B, T]; 0 where the recipe has none. metrics: [B, T] each, by name; their means over the tokens.
    """
    per_token, logprob = masked(per_token, mask), masked(logprob.detach(), mask)
    loss = aggregate(per_token, mask, aggregation, normalizer, count_empty_sequences)
    means = {name: batch_mean(x.detach().to(per_token.dtype), mask) for name, x in (metrics or {}).items()}
    entropy = torch.zeros_like(logprob) if entropy is None else masked(entropy.detach(), mask)
    return PolicyLoss(loss, per_token.detach(), {"tokens": mask.sum(), **means}, logprob, entropy)
