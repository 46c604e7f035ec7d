"""A head whose parameters are DTensors, as `fully_shard` (FSDP2) makes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard


class _Mean(torch.autograd.Function):
    """The tensor; its gradient divided by a number."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, count: int) -> Tensor:
        ctx.count = count
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.count, None


def gathered(where: str, name: str, parameter: Tensor) -> Tensor:
    """The whole parameter. Its gradient is the mean over the ranks, as FSDP's is of all other parameters.

    `full_tensor()` alone would leave each rank's shard with the gradient of that rank's own rows.
    """
    return kept(where, name, parameter, None, [], [])


def kept(
    where: str,
    name: str,
    parameter: Tensor,
    vocabulary: list[int] | None,
    rows: list[list[int]],
    same: list[list[int]],
) -> Tensor:
    """The parameter with those of its rows that its mesh's dimension of the ranks `vocabulary` leaves here.

    Over the other dimensions it is gathered. The gradient is summed over the ranks that are among `rows`, each of which
    has a part of one loss; those among `same` have it all; over others it is the mean, as FSDP's is.
    """
    assert isinstance(parameter, DTensor)
    if any(placement.is_partial() for placement in parameter.placements):
        raise ValueError(
            f"{where}: {name} is a DTensor with placements {parameter.placements}; expected Shard or Replicate "
            f"(redistribute() it)"
        )
    mesh, count = parameter.device_mesh, 1
    here: list[Placement] = []
    of_gradient: list[Placement] = []
    for i, placement in enumerate(parameter.placements):
        ranks = distributed.get_process_group_ranks(mesh.get_group(i))
        if ranks == vocabulary and placement == Shard(0):
            here.append(placement)
            of_gradient.append(placement)
            continue
        here.append(Replicate())
        of_gradient.append(Replicate() if ranks in same else Partial("sum"))
        count *= 1 if ranks in (*rows, *same) else mesh.size(i)
    local = parameter.redistribute(placements=here).to_local(grad_placements=of_gradient)
    return local if count == 1 else _Mean.apply(local, count)  # type: ignore[no-untyped-call]
