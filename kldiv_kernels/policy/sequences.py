"""Which tokens are one sequence: a row, a stretch between two bounds, or those of one number; of one rank or several.

Under context parallelism each rank of `sequence_group` has a part of the same sequences. What a loss sums over a
sequence is then summed over the ranks too: all such sums of a call in one all_reduce, [sums, sequences] numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kldiv_kernels import inputs
from kldiv_kernels.parallel import Group, concatenated, summed_shares
from kldiv_kernels.policy.segments import Segments, of_bounds, of_ids


@dataclass(frozen=True)
class Sequences:
    """The sequences of tokens [rows, T].

    count: how many, those without a token too. segments: None where each row is one; else there is one row. places:
    [T], where what is given once a sequence has a token's. group: the ranks that share the sequences.
    """

    count: int | Tensor
    segments: Segments | None = None
    places: Tensor | None = None
    group: Group | None = None

    def sums(self, values: Mapping[str, Tensor]) -> SequenceSums:
        """Σ over each sequence's tokens of each of the values [rows, T], bool counted; with gradient."""
        found = {name: self._of_this_rank(x) for name, x in values.items()}
        if self.group is not None:
            dtype = functools.reduce(torch.promote_types, [x.dtype for x in found.values()])
            total = summed_shares(torch.stack([x.to(dtype) for x in found.values()]), self.group)
            found = {
                name: x if values[name].is_floating_point() else x.detach().long()
                for name, x in zip(found, total.unbind(), strict=True)
            }
        return SequenceSums(self, found)

    def _of_this_rank(self, x: Tensor) -> Tensor:
        return x.sum(-1) if self.segments is None else self.segments.sums(x.reshape(-1))

    def at_tokens(self, x: Tensor) -> Tensor:
        """[sequences] -> [rows, 1] or [1, T]."""
        return x[:, None] if self.segments is None else self.segments.at_tokens(x)[None]

    def given(self, x: Tensor) -> Tensor:
        """What is given once a sequence, [sequences], at the tokens; NaN for a sequence that it does not have."""
        if self.places is None:
            return x[:, None]
        places = self.places.long()
        if len(x) == 0:
            return x.new_full((1, len(places)), torch.nan)
        return torch.where((places >= 0) & (places < len(x)), x[places.clamp(0, len(x) - 1)], torch.nan)[None]


@dataclass(frozen=True)
class SequenceSums:
    """Sums over sequences by name. `sums["tokens"]` is [sequences], `sums.at("tokens")` [rows, 1] or [1, T]."""

    sequences: Sequences
    by_name: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.by_name[name]

    def at(self, name: str) -> Tensor:
        return self.sequences.at_tokens(self.by_name[name])


def rows(mask: Tensor) -> Sequences:
    """Each row of a mask [B, T] is a sequence."""
    return Sequences(mask.shape[0])


def in_sequences(valid: Tensor, cu_seqlens: Tensor | None, sequence_ids: Tensor | None) -> Tensor:
    """Which of the valid tokens are in a sequence, and no padding."""
    if cu_seqlens is not None:
        position = torch.arange(valid.numel(), device=valid.device).reshape(valid.shape)
        return valid & (position >= cu_seqlens[0]) & (position < cu_seqlens[-1])
    return valid if sequence_ids is None else valid & (sequence_ids != -1)


def sequences_of(
    shape: torch.Size, cu_seqlens: Tensor | None, sequence_ids: Tensor | None, group: Group | None
) -> Sequences:
    """The sequences of tokens of this shape."""
    if cu_seqlens is not None:
        segments = of_bounds(cu_seqlens, shape.numel())
        return Sequences(len(cu_seqlens) - 1, segments, segments.index, group)
    if sequence_ids is not None:
        ids = sequence_ids.reshape(-1)
        everyone, own = concatenated(ids.long()[None], group)
        segments, count = of_ids(ids, everyone[0], own)
        return Sequences(count, segments, ids, group)
    return Sequences(shape[0] if len(shape) == 2 else 1, group=group)


def check(where: str, logits: Tensor, cu_seqlens: Tensor | None, sequence_ids: Tensor | None) -> None:
    """Raises where the bounds or numbers of packed sequences are wrong."""
    if cu_seqlens is None and sequence_ids is None:
        return
    if cu_seqlens is not None and sequence_ids is not None:
        raise ValueError(f"{where}: cu_seqlens and sequence_ids are both given; pass one")
    name = "sequence_ids" if cu_seqlens is None else "cu_seqlens"
    if logits.dim() == 3 and logits.shape[0] != 1:
        raise ValueError(
            f"{where}: {name} is given beside logits of shape {list(logits.shape)}, whose rows are sequences; expected "
            f"[tokens, vocab] or [1, tokens, vocab]"
        )
    if sequence_ids is not None:
        inputs.per_token_checked(where, "sequence_ids", sequence_ids, logits, integers=True)
    if cu_seqlens is not None:
        _check_bounds(where, cu_seqlens, logits)


def _check_bounds(where: str, cu_seqlens: Tensor, logits: Tensor) -> None:
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{where}: cu_seqlens is {type(cu_seqlens).__name__}; expected a torch.Tensor")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{where}: cu_seqlens has dtype {cu_seqlens.dtype}; expected int32 or int64")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        raise ValueError(
            f"{where}: cu_seqlens has shape {list(cu_seqlens.shape)}; expected [sequences + 1], from 0 to the end of "
            f"the last sequence"
        )
    if cu_seqlens.device != logits.device:
        raise ValueError(f"{where}: cu_seqlens is on {cu_seqlens.device}; expected {logits.device} like logits")
    if not inputs.looks_at(cu_seqlens):
        return
    tokens = logits.shape[:-1].numel()
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] > tokens or sorted(bounds) != bounds:
        raise ValueError(
            f"{where}: cu_seqlens is {bounds if len(bounds) <= 8 else [*bounds[:4], '...', *bounds[-3:]]}; expected "
            f"numbers from 0 on that do not fall, to {tokens} at most, the number of tokens"
        )


def check_places(where: str, sequence_ids: Tensor, advantages: Tensor) -> None:
    """Raises where the number of a sequence is no place in advantages [sequences]."""
    if sequence_ids.numel() == 0 or not inputs.looks_at(sequence_ids):
        return
    low, high = int(sequence_ids.amin()), int(sequence_ids.amax())
    if low < -1 or high >= len(advantages):
        raise ValueError(
            f"{where}: sequence_ids has {low if low < -1 else high}; with advantages of shape "
            f"{list(advantages.shape)} expected their places, 0 to {len(advantages) - 1}, or -1 for padding"
        )
