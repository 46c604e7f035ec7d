"""A head whose parameters are DTensors, as `fully_shard` (FSDP2) makes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial


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
    assert isinstance(parameter, DTensor)
    if any(placement.is_partial() for placement in parameter.placements):
        raise ValueError(
            f"{where}: {name} is a DTensor with placements {parameter.placements}; expected Shard or Replicate "
            f"(redistribute() it)"
        )
    mesh = parameter.device_mesh
    whole = parameter.full_tensor(grad_placements=[Partial() for _ in range(mesh.ndim)])
    return _Mean.apply(whole, mesh.size())  # type: ignore[no-any-return, no-untyped-call]
