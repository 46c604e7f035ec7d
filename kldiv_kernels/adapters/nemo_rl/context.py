"""Context parallelism: which tokens of the sequences a rank has, and all of them from what each rank has of its own.

Megatron and PyTorch balance the load of causal attention: a sequence is cut into 2p chunks for p ranks, and rank r has
chunks r and 2p − 1 − r. `balanced` says that as a table of token numbers [ranks, tokens a rank]; everything else works
with any such table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from kldiv_kernels.parallel import Group


def size_of(group: Group | None) -> int:
    return 1 if group is None else distributed.get_world_size(group)


def balanced(bounds: Tensor, tokens: int, ranks: int) -> Tensor:
    """[ranks, tokens], tokens of sequences that follow each other, [bounds[i], bounds[i + 1]) of all ranks.

    >>> balanced(torch.tensor([0, 4, 12]), tokens=6, ranks=2)
    tensor([[ 0,  3,  4,  5, 10, 11],
            [ 1,  2,  6,  7,  8,  9]])
    """
    here = torch.arange(tokens, device=bounds.device)
    starts = bounds.long() // ranks
    # Empty sequences share their start with the next one: the last of them is meant.
    sequence = (torch.searchsorted(starts, here, right=True) - 1).clamp(0, bounds.shape[0] - 2)
    start, chunk = starts[sequence], (starts.diff() // 2)[sequence]
    offset = here - start
    rank = torch.arange(ranks, device=bounds.device)[:, None]
    # The second chunk of a rank is counted from the end.
    return start * ranks + torch.where(offset < chunk, rank * chunk, (2 * ranks - 2 - rank) * chunk) + offset


def of_this_rank(x: Tensor, table: Tensor, group: Group) -> Tensor:
    """[batch, tokens of this rank, *] of [batch, tokens, *]"""
    return x.index_select(1, table[distributed.get_rank(group)])


def of_all_ranks(x: Tensor, table: Tensor, group: Group, *, sum_gradients: bool = True) -> Tensor:
    """[batch, tokens, *] from [batch, tokens of this rank, *] of each rank.

    Args:
        sum_gradients: what the ranks say of a token is summed in backward, as where each of them has a loss. False: a
            rank's own gradient is that of its tokens.
    """
    whole: Tensor = _OfAllRanks.apply(x, table, group, sum_gradients)  # type: ignore[no-untyped-call]
    return whole


class _OfAllRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, group: Group, sum_gradients: bool) -> Tensor:
        ctx.table, ctx.group, ctx.sum_gradients = table, group, sum_gradients
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(table.shape[0])]
        distributed.all_gather(parts, x.contiguous(), group=group)
        everything = torch.cat(parts, dim=1)
        return torch.empty_like(everything).index_copy_(1, table.flatten(), everything)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.sum_gradients:
            gradient = gradient.clone(memory_format=torch.contiguous_format)
            distributed.all_reduce(gradient, group=ctx.group)
        return of_this_rank(gradient, ctx.table, ctx.group), None, None, None
