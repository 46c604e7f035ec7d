"""Sums over the ranks of a process group, with gradients, and their tensors behind each other.

A group of None, or of one rank, means this rank alone: nothing is sent. Every rank of the group has to make the same
calls in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup


def group_checked(where: str, name: str, group: Any) -> ProcessGroup | None:
    """The group, None where it is of one rank; TypeError, ValueError for what is none or has no place for this rank."""
    if group is None:
        return None
    # What new_group gives to ranks that are left out.
    if isinstance(group, int):
        raise ValueError(f"{where}: {name} does not have this rank in it; expected a group of its own ranks, or None")
    if not isinstance(group, ProcessGroup):
        raise TypeError(f"{where}: {name} is {type(group).__name__}; expected None or a torch.distributed.ProcessGroup")
    return group if group.size() > 1 else None


def summed(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Σ of x over the ranks, without gradient. One all_reduce of x.

    >>> summed(torch.tensor([1.0]), None)
    tensor([1.])
    """
    if group is None:
        return x.detach()
    total = x.detach().clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total, group=group)
    return total


def summed_shares(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Σ of x over the ranks, of which a loss is made that is the sum of the ranks' losses.

    Its gradient on each rank is that of all ranks' losses: one all_reduce forward and, where a gradient of the sum is
    asked for, one backward.

    >>> summed_shares(torch.tensor([1.0]), None)
    tensor([1.])
    """
    if group is None:
        return x
    total: Tensor = _SummedShares.apply(x, group)  # type: ignore[no-untyped-call]
    return total


class _SummedShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return summed(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Every rank's loss depends on this rank's x.
        return summed(gradient, ctx.group), None


def place_of(x: Tensor, group: ProcessGroup) -> Tensor:
    """[ranks, *]: x in the row of this rank, and 0 in the others. Its sum over the ranks is everyone's x."""
    row = x.new_zeros(group.size(), *x.shape)
    row[group.rank()] = x.detach()
    return row


def concatenated(x: Tensor, group: ProcessGroup | None) -> tuple[Tensor, slice]:
    """([k, N over all ranks], the columns of this rank) of x [k, n] in the order of ranks, whose n may differ.

    Two collectives: the numbers n, for which the host waits, and x padded to the longest, k · longest elements a rank.

    >>> concatenated(torch.tensor([[1, 2]]), None)
    (tensor([[1, 2]]), slice(0, 2, None))
    """
    x = x.detach()
    columns = x.shape[-1]
    if group is None:
        return x, slice(0, columns)
    size = torch.tensor(columns, device=x.device)
    sizes = [int(n) for n in summed(place_of(size, group), group).tolist()]
    padded = x.new_zeros(x.shape[0], max(sizes))
    padded[:, :columns] = x
    everyone = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(everyone, padded, group=group)
    whole = torch.cat([part[:, :n] for part, n in zip(everyone, sizes, strict=True)], dim=1)
    before = sum(sizes[: group.rank()])
    return whole, slice(before, before + columns)
