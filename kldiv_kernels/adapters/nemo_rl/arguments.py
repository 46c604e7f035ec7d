"""NeMo-RL's arguments: what they are here, and those that cannot be served."""

from __future__ import annotations

from typing import Any

from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from kldiv_kernels.dtensors import columns_of
from kldiv_kernels.parallel import Group


def columns(
    where: str, logits: Tensor, first: int, end: int, group: Group | None, vocab_size: int | None
) -> dict[str, Any]:
    """The arguments of `token_stats` for columns [first, end) of the vocabulary."""
    if end - first != logits.shape[-1]:
        raise ValueError(
            f"{where}: vocab_start_index and vocab_end_index are {first} and {end}; expected {logits.shape[-1]} "
            f"columns between them, those of the logits"
        )
    if group is None:
        raise ValueError(
            f"{where}: the process group of the columns is None; expected a torch.distributed.ProcessGroup"
        )
    even = first == distributed.get_rank(group) * logits.shape[-1]
    # Where they are not even and vocab_size is missing, token_stats says so, on all ranks.
    return {"group": group, "vocab_start": None if even and vocab_size is None else first, "vocab_size": vocab_size}


def of_rank(where: str, rank: int | None, group: Group) -> int:
    """The rank in its group, which NeMo-RL's callers give beside it."""
    known = distributed.get_rank(group)
    if rank != known:
        raise ValueError(f"{where}: vocab_parallel_rank is {rank}; expected {known}, this process's in the group")
    return known


def local(where: str, logits: DTensor) -> tuple[Tensor, dict[str, Any]]:
    """This rank's columns of a DTensor whose mesh has a dimension "tp", and the arguments for them."""
    group = logits.device_mesh.get_group("tp")
    rank, ranks = distributed.get_rank(group), distributed.get_world_size(group)
    here: Tensor = logits.to_local()
    part = columns_of(where, logits.shape[-1], ranks, rank)
    if here.shape[-1] != part.width:
        raise ValueError(
            f"{where}: the logits have {here.shape[-1]} of {logits.shape[-1]} columns here; expected a DTensor with "
            f'Shard(-1) on the dimension "tp" of its mesh'
        )
    return here, {"group": group, **part.options(part.total)}


def served(where: str, chunk_size: int | None, sampling_params: Any) -> None:
    if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"{where}: chunk_size is {chunk_size!r}; expected None or 1 and more")
    top_k, top_p = getattr(sampling_params, "top_k", None), getattr(sampling_params, "top_p", None)
    if top_k is not None and top_k > 0:
        raise ValueError(
            f"{where}: sampling_params.top_k is {top_k}; expected None or -1: the softmax here is over the whole "
            f"vocabulary, not over the tokens that sampling leaves. Keep NeMo-RL's own function for such a policy"
        )
    if top_p is not None and top_p != 1:
        raise ValueError(
            f"{where}: sampling_params.top_p is {top_p}; expected 1.0: the softmax here is over the whole vocabulary, "
            f"not over the tokens that sampling leaves. Keep NeMo-RL's own function for such a policy"
        )
