"""Which tokens a recipe looks at. Masks are bool; no count leaves the device, so nothing waits for it."""

from __future__ import annotations

import torch
from torch import Tensor

from kldiv_kernels.recipes.reductions import widened


def highest(scores: Tensor, mask: Tensor, fraction: float | Tensor, *, per_sequence: bool = False) -> Tensor:
    """Bool like `scores`: the tokens with the highest scores, ⌊fraction · tokens⌋ of them, and at least one.

    Args:
        scores: [B, T]. mask: [B, T] bool; no other token is chosen. fraction: of the mask's tokens, 0 to 1.
        per_sequence: the fraction of each sequence, not of the batch.

    Among equal scores the first are chosen.

    >>> highest(torch.tensor([[3.0, 9.0, 5.0, 7.0]]), torch.tensor([[True, False, True, True]]), 0.67)
    tensor([[False, False,  True,  True]])
    """
    shape, mask = scores.shape, mask != 0
    if not per_sequence:
        scores, mask = scores.reshape(1, -1), mask.reshape(1, -1)
    keys = torch.where(mask, scores.detach(), -torch.inf)
    # What is masked stands behind a score of −inf too. NaN is larger than every number: a score that is none is seen.
    keys = torch.where(mask, keys.clamp_min(torch.finfo(keys.dtype).min), -torch.inf)
    order = keys.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(keys.shape[-1], device=keys.device).expand_as(order)
    )
    wanted = (mask.sum(-1, keepdim=True).double() * fraction).floor().clamp_min(1)
    return ((rank < wanted) & mask).reshape(shape)


def lowest(scores: Tensor, mask: Tensor, fraction: float | Tensor, *, per_sequence: bool = False) -> Tensor:
    """As `highest`, of the lowest scores.

    >>> lowest(torch.tensor([[3.0, 9.0]]), torch.tensor([[True, True]]), 0.5)
    tensor([[ True, False]])
    """
    return highest(-scores, mask, fraction, per_sequence=per_sequence)


def prefix_share(x: Tensor, mask: Tensor, fraction: float) -> Tensor:
    """Bool [B, T]: the first tokens of each sequence, until their x ≥ 0 has summed to `fraction` of the sequence's.

    The token that reaches the share is one of them.

    >>> prefix_share(torch.tensor([[1.0, 1.0, 8.0]]), torch.tensor([[True, True, True]]), 0.2)
    tensor([[ True,  True, False]])
    """
    mask = mask != 0
    held = torch.where(mask, x.detach(), 0.0)
    before = held.cumsum(-1) - held
    total = held.sum(-1, keepdim=True)
    # Where all x are 0 the first token has the share.
    first = mask & (mask.cumsum(-1) == 1)
    return mask & ((before < fraction * total) | first)


def turn_window(turns: Tensor, count: int) -> Tensor:
    """Bool like `turns`: tokens of turns 0 to count − 1; a token of turn −1 is in none.

    >>> turn_window(torch.tensor([[-1, 0, 1, 2]]), 2)
    tensor([[False,  True,  True, False]])
    """
    return (turns >= 0) & (turns < count)


def first_tokens(mask: Tensor, count: int) -> Tensor:
    """Bool [B, T]: the first `count` tokens of each sequence that the mask has.

    >>> first_tokens(torch.tensor([[False, True, True, True]]), 2)
    tensor([[False,  True,  True, False]])
    """
    mask = mask != 0
    return mask & (mask.cumsum(-1) <= count)


def quantile_band(x: Tensor, mask: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """The quantiles `low` and `high` of each sequence's x over its mask, [B] each, without gradient.

    Linear interpolation, as `torch.nanquantile`; NaN for a sequence without tokens.

    >>> quantile_band(torch.tensor([[1.0, 2.0, 3.0, 9.0]]), torch.tensor([[True, True, True, False]]), 0.0, 0.5)
    (tensor([1.]), tensor([2.]))
    """
    kept = torch.where(mask != 0, x.detach(), torch.nan)
    if kept.numel() == 0:
        return kept.new_full(kept.shape[:-1], torch.nan), kept.new_full(kept.shape[:-1], torch.nan)
    return torch.nanquantile(kept, low, dim=-1), torch.nanquantile(kept, high, dim=-1)


def otsu_threshold(x: Tensor, mask: Tensor, bins: int = 100, *, per_sequence: bool = False) -> Tensor:
    """Otsu's threshold (1979) of x over the mask, a scalar: where the variance between the two sides is largest.

    Of a histogram of `bins` between the lowest and the highest; a value on the threshold is above it. Where all x are
    equal it is their value, and 0 where the mask has none. per_sequence: one of each sequence, [B, T] -> [B].

    >>> 0.2 < otsu_threshold(torch.tensor([0.0, 0.1, 1.0, 1.1]), torch.ones(4, dtype=torch.bool)).item() < 1.0
    True
    """
    x, mask = widened(x.detach()), mask != 0
    if not per_sequence:
        x, mask = x.reshape(1, -1), mask.reshape(1, -1)
    if x.numel() == 0:
        return x.new_zeros(len(x) if per_sequence else ())
    some = mask.any(-1, keepdim=True)
    low = torch.where(some, torch.where(mask, x, torch.inf).amin(-1, keepdim=True), 0.0)
    high = torch.where(some, torch.where(mask, x, -torch.inf).amax(-1, keepdim=True), 0.0)
    width = (high - low) / bins
    place = ((x - low) / width).nan_to_num(0.0).clamp(0, bins - 1).long()
    counts = x.new_zeros(len(x), bins).scatter_add(-1, place, mask.to(x.dtype))
    numbers = torch.arange(bins, device=x.device)
    below, total = counts.cumsum(-1), counts.sum(-1, keepdim=True)
    # In bins from the lowest on: the width changes nothing about which cut is best.
    sums = (counts * numbers).cumsum(-1)
    above = total - below
    means_apart = sums / below.clamp_min(1) - (sums[:, -1:] - sums) / above.clamp_min(1)
    between = below * above * means_apart.square()
    # Behind any of the empty bins between two heaps the cut is the same: the middle of them.
    together = below == below.gather(-1, between.argmax(-1, keepdim=True))
    at = (together * numbers).sum(-1, keepdim=True) / together.sum(-1, keepdim=True)
    cut = (low + width * (at + 1))[:, 0]
    return cut if per_sequence else cut[0]
