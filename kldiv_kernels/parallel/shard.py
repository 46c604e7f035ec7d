"""Which columns of the vocabulary a process has, and what a call on all of them is on these."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kldiv_kernels.backends import Call

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    Group = ProcessGroup
else:
    Group = Any

# As a label: none; and a column that another process has (csrc/tokens.h).
_NONE, _ELSEWHERE = -1, -2


@dataclass(frozen=True)
class Shard:
    """Columns [start, start + width) of `total`, those of this one of `size` processes, which are in their order."""

    group: Group
    rank: int
    size: int
    start: int
    width: int
    total: int

    def columns(self, vocab_size: int) -> int:
        """How many of them are no padding, of a vocabulary of that size."""
        return max(0, min(self.width, vocab_size - self.start))

    def here(self, ids: Tensor, vocab_size: int) -> Tensor:
        """Which of these columns of the whole are here."""
        return (ids >= self.start) & (ids < self.start + self.columns(vocab_size))

    def local(self, call: Call, logits: Tensor, reference: Tensor | None) -> Call:
        """The call on this process's logits, with labels and exclude counted from their first column.

        A process without columns gets one in which nothing has mass.
        """
        columns = self.columns(call.vocab_size)
        if columns == 0:
            logits = logits.new_full((*logits.shape[:-1], 1), -torch.inf)
            reference = None if reference is None else torch.full_like(logits, -torch.inf, dtype=reference.dtype)
        labels, exclude = call.labels, call.exclude
        if labels is not None:
            elsewhere = torch.where(labels < 0, _NONE, _ELSEWHERE)
            labels = torch.where(self.here(labels, call.vocab_size), labels - self.start, elsewhere)
        if exclude is not None:
            exclude = torch.where(self.here(exclude, call.vocab_size), exclude - self.start, _NONE)
        return replace(
            call, logits=logits, reference=reference, labels=labels, exclude=exclude, vocab_size=max(1, columns)
        )

    def picked(self, call: Call, local: Call) -> Tensor | None:
        """[2, N, K]: the logits at the labels that are here, of both sides, and 0 at the others.

        What is no column at all is NaN, as it is in a call on whole rows. None without labels.
        """
        labels, local_labels = call.labels, local.labels
        if labels is None or local_labels is None:
            return None
        dtype = torch.float64 if local.logits.dtype == torch.float64 else torch.float32
        out = torch.zeros((2, *labels.shape), dtype=dtype, device=labels.device)
        here = local_labels >= 0
        if call.mask is not None:
            here = here & call.mask[:, None]
        at = local_labels.clamp_min(0).reshape(*local.logits.shape[:-1], labels.shape[-1])
        for i, side in enumerate((local.logits, local.reference)):
            if side is not None:
                logits = side.detach().gather(-1, at).reshape(labels.shape).to(dtype)
                out[i] = torch.where(here, logits, 0.0)
        if call.exclude is not None:
            out.masked_fill_(here & (labels == call.exclude[:, None]), -torch.inf)
        return out.masked_fill_(labels >= call.vocab_size, torch.nan)


def checked_shard(
    where: str, group: Group, vocab_start: int | None, width: int, vocab_size: int | None
) -> Shard | None:
    """The shard for these arguments; None where there is nothing to share: a group of one."""
    from torch import distributed

    if not isinstance(group, distributed.ProcessGroup):
        raise TypeError(f"{where}: group is {type(group).__name__}; expected a torch.distributed.ProcessGroup")
    rank, size = distributed.get_rank(group), distributed.get_world_size(group)
    if rank < 0:
        raise ValueError(f"{where}: group does not have this process; expected a group that it belongs to")
    if vocab_start is None:
        return None if size == 1 else Shard(group, rank, size, rank * width, width, size * width)
    if isinstance(vocab_start, bool) or not isinstance(vocab_start, int) or vocab_start < 0:
        raise ValueError(f"{where}: vocab_start is {vocab_start!r}; expected the first column of this process, from 0")
    if vocab_size is None:
        raise ValueError(
            f"{where}: vocab_size is None beside vocab_start = {vocab_start}; expected the size of the whole "
            f"vocabulary, which shards of different widths do not tell"
        )
    if size == 1:
        if vocab_start != 0:
            raise ValueError(f"{where}: vocab_start is {vocab_start} in a group of one process; expected 0")
        return None
    return Shard(group, rank, size, vocab_start, width, vocab_size)


def all_gather(group: Group, mine: Tensor) -> Tensor:
    """[ranks, *shape], of tensors that have the same shape on every rank."""
    from torch import distributed

    # The second name is the older one.
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    mine = mine.contiguous()
    everything = mine.new_empty((distributed.get_world_size(group), *mine.shape))
    gather(everything.reshape(-1), mine.reshape(-1), group=group)
    return everything


def all_reduce(group: Group, mine: Tensor) -> None:
    """The sum over the ranks, in its place."""
    from torch import distributed

    distributed.all_reduce(mine, group=group)
