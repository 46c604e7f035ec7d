"""Sequences that were checked, as the arrays and the header of one shard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kldiv_kernels.linear import TeacherProjection
from kldiv_kernels.teacher_cache import shard
from kldiv_kernels.teacher_cache.info import CacheInfo
from kldiv_kernels.teacher_cache.rows import SequenceRows, checked
from kldiv_kernels.teacher_cache.shard import Header


def checked_batch(
    info: CacheInfo, first: int, token_ids: Any, topk_ids: Any, topk_logprobs: Any, positions: Any,
    projection: TeacherProjection | None,
) -> list[SequenceRows]:  # fmt: skip
    """One sequence, number `first`, or as many as the batch has, as `TeacherCacheWriter.append` takes them.

    Raises TypeError or ValueError naming the argument, the place in it and the sequence.
    """
    ids, rows, logprobs = (torch.as_tensor(value) for value in (token_ids, topk_ids, topk_logprobs))
    where = None if positions is None else torch.as_tensor(positions)
    if (projection is None) != (info.hidden_size == 0):
        raise ValueError(
            f"append: projection is {'None' if projection is None else 'given'}, with hidden_size = "
            f"{info.hidden_size} in info; expected {'one' if projection is None else 'none'}"
        )
    if ids.dim() != 2:
        return [checked(info, first, ids, where, rows, logprobs, projection)]
    if rows.shape[:1] != ids.shape[:1] or logprobs.shape[:1] != ids.shape[:1]:
        raise ValueError(
            f"append: token_ids, topk_ids and topk_logprobs have shapes {list(ids.shape)}, {list(rows.shape)} "
            f"and {list(logprobs.shape)}; expected the same number of sequences in each"
        )
    return [
        checked(info, first + i, ids[i], where, rows[i], logprobs[i], _of_sequence(projection, i))
        for i in range(ids.shape[0])
    ]


def write_shard(folder: Path, info: CacheInfo, number: int, sequences: Sequence[SequenceRows]) -> Header:
    """Shard `number`, of these sequences, of which there is at least one."""
    mass = np.concatenate([sequence.mass for sequence in sequences])
    arrays = {
        name: np.concatenate([getattr(sequence, name) for sequence in sequences])
        for name in ("token_ids", "positions", "topk_ids", "topk_logprobs")
    }
    for name in sequences[0].projected:
        arrays[name] = np.concatenate([sequence.projected[name] for sequence in sequences])
    arrays["token_offsets"] = _offsets([len(sequence.token_ids) for sequence in sequences])
    arrays["row_offsets"] = _offsets([len(sequence.positions) for sequence in sequences])
    header = Header(
        number=number, sequences=len(sequences), tokens=len(arrays["token_ids"]), rows=len(mass),
        mass_sum=float(mass.sum()), mass_min=float(mass.min()),
    )  # fmt: skip
    shard.write(folder, info, header, arrays)
    return header


def _of_sequence(batch: TeacherProjection | None, number: int) -> TeacherProjection | None:
    if batch is None:
        return None
    projection, offset, entropy = batch.projection[number], batch.offset[number], batch.entropy[number]
    return TeacherProjection(projection, offset, entropy, batch.vocab_size)


def _offsets(lengths: list[int]) -> np.ndarray[Any, Any]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
