"""Sums, means and deviations of groups of samples, without a loop over groups and without a wait for the device.

`groups` [B] holds one integer a sample, any values in any order; samples with the same integer form a group. `numbered`
makes of them what the others take as `index`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def numbered(groups: Tensor) -> Tensor:
    """The groups' numbers, from 0 to their number − 1, in the shape of `groups`.

    >>> numbered(torch.tensor([7, 7, -2]))
    tensor([1, 1, 0])
    """
    # torch.unique would wait for the device, to know how many there are.
    ordered, order = groups.reshape(-1).sort(stable=True)
    begins = torch.zeros_like(ordered, dtype=torch.int64)
    begins[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(begins).scatter_(0, order, begins.cumsum(0)).reshape(groups.shape)


def sums(values: Tensor, index: Tensor) -> Tensor:
    """[groups, *], the sum of each; as many rows as there are samples, of which those beyond the groups are 0."""
    return values.new_zeros(max(values.shape[0], 1), *values.shape[1:]).index_add(0, index, values)


def extreme(values: Tensor, index: Tensor, which: str) -> Tensor:
    """[B], the "amin" or "amax" of each sample's group."""
    return torch.zeros_like(values).scatter_reduce_(0, index, values, which, include_self=False)[index]


def centre(rewards: Tensor, index: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """reward − mean of its group [B] and size of its group [B], float64, without gradient.

    From differences to a reward of the group, so that equal rewards give exactly 0. With `kept` [B] bool of the kept
    alone, and 0 for the others.
    """
    rewards = rewards.detach().double()
    kept = torch.ones_like(rewards, dtype=torch.bool) if kept is None else kept
    lowest = extreme(torch.where(kept, rewards, torch.inf), index, "amin")
    above = torch.where(kept, rewards - lowest, 0.0)
    count = sums(kept.double(), index)[index]
    return torch.where(kept, above - sums(above, index)[index] / count, 0.0), count


def unbiased_variance(centred: Tensor, count: Tensor, index: Tensor) -> Tensor:
    """[B], of each sample's group, from what `centre` returns; 0 in a group of one."""
    return sums(centred.square(), index)[index] / (count - 1).clamp_min(1)
