"""Which columns of the vocabulary torchtitan's logits are, and what a sum over their rows is on the mesh."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from kldiv_kernels.dtensors import columns_of
from kldiv_kernels.parallel import Group


class Here(NamedTuple):
    """Logits of this rank, and the arguments of `token_stats` that say which columns they are."""

    logits: Tensor
    columns: dict[str, Any]


def here(where: str, pred: Tensor, global_vocab_size: int | None, tp_group: Group | None) -> Here:
    """Of a DTensor, of a tensor of torchtitan's current mesh, or of one whose group is given; or else whole rows.

    A vocabulary of V columns over p ranks is split as torchtitan and DTensor do it: ceil(V/p) for each, and what is
    left for the last ones.
    """
    if isinstance(pred, DTensor):
        group = _group(where, pred)
        size: int | None = pred.shape[-1]
        if tp_group is not None:
            raise ValueError(f"{where}: tp_group is given beside a DTensor; expected None: pred's mesh has the group")
        if global_vocab_size not in (None, size):
            raise ValueError(f"{where}: global_vocab_size is {global_vocab_size}; expected {size}, the width of pred")
        pred = pred.to_local()
    else:
        group = tp_group if tp_group is not None else _current_group()
        size = global_vocab_size
    if group is None:
        return Here(pred, {"vocab_size": size})
    if size is None:
        return Here(pred, {"group": group})
    rank, ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    columns = columns_of(where, size, ranks, rank)
    if pred.shape[-1] != columns.width:
        raise ValueError(
            f"{where}: pred has {pred.shape[-1]} columns; expected {columns.width}, those of rank {rank} of {ranks} of "
            f"a vocabulary of {size} (global_vocab_size)"
        )
    return Here(pred, {"group": group, **columns.options(size)})


def local(x: Tensor) -> Tensor:
    """Of a DTensor this rank's part."""
    part: Tensor = x.to_local() if isinstance(x, DTensor) else x
    return part


def summed(total: Tensor, pred: Tensor, labels: Tensor) -> Tensor:
    """The sum of the rows here; a DTensor where pred and labels are, partial over what the rows are spread over."""
    if not isinstance(pred, DTensor) or not isinstance(labels, DTensor):
        return total
    placements = [
        Partial() if isinstance(x, Shard) and x.dim % pred.dim() != pred.dim() - 1 else Replicate()
        for x in pred.placements
    ]
    whole: Tensor = DTensor.from_local(total, pred.device_mesh, placements, run_check=False)
    return whole


def _group(where: str, pred: DTensor) -> Group | None:
    if not all(isinstance(x, (Shard, Replicate)) for x in pred.placements):
        raise ValueError(f"{where}: pred has the placements {pred.placements}; expected Shard or Replicate")
    over = [i for i, x in enumerate(pred.placements) if isinstance(x, Shard) and x.dim % pred.dim() == pred.dim() - 1]
    if len(over) > 1:
        raise ValueError(
            f"{where}: pred has the placements {pred.placements}; expected its last dimension in one of them at most"
        )
    return pred.device_mesh.get_group(over[0]) if over else None


def _current_group() -> Group | None:
    # Who trains with torchtitan's mesh has its module loaded.
    loaded = sys.modules.get("torchtitan.distributed.spmd_types")
    mesh = None if loaded is None else loaded.current_spmd_mesh()
    if mesh is None or "tp" not in (mesh.mesh_dim_names or ()):
        return None
    group: Group = mesh.get_group("tp")
    return group
