"""Writes a cache shard by shard, and goes on after a kill with the first sequence that is not on disk."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from kldiv_kernels.linear import TeacherProjection
from kldiv_kernels.teacher_cache import shard
from kldiv_kernels.teacher_cache.info import (
    RECORD,
    CacheInfo,
    Totals,
    first_difference,
    read_record,
    write_record,
)
from kldiv_kernels.teacher_cache.rows import SequenceRows, checked
from kldiv_kernels.teacher_cache.shard import Header

_LOCK = ".lock"


class TeacherCacheWriter:
    """Appends sequences to a cache in `folder`; one writer at a time.

    Where shards end depends on the sequences alone: a killed writer that is reopened and fed from sequence
    `writer.sequences` on leaves the same bytes as one that was not killed.

    Args:
        folder: of the cache; made where it does not exist.
        info: what the cache is of. A cache that is continued must have the same.
        resume: continue the cache in `folder`, or start it where there is none yet. Without it `folder` must hold no
            cache.

    As a context manager it finishes the cache at the end of the block; after an exception only whole shards stay.

    Raises:
        ValueError: a cache is there and `resume` is not given, it is of another teacher, K or vocabulary, it is
            finished, or one of its shards is damaged.
        BlockingIOError: another writer has it open.
        OSError: the disk is full, or refuses otherwise, here or in `append` and `finish`: it names the folder and the
            bytes. The writer is then closed, and what was on disk before goes on with `resume`.

    >>> import tempfile, torch
    >>> folder = tempfile.mkdtemp()
    >>> info = CacheInfo(teacher="coin", vocab_size=2, k=2)
    >>> with TeacherCacheWriter(folder, info) as writer:
    ...     writer.append([0, 1, 1], [[0, 1], [0, 1]], torch.full((2, 2), 0.5).log())
    >>> from kldiv_kernels.teacher_cache import TeacherCache
    >>> TeacherCache(folder)[0].topk_logprobs.exp()
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """

    def __init__(self, folder: str | Path, info: CacheInfo, *, resume: bool = False) -> None:
        self.folder, self.info = Path(folder), info
        self.folder.mkdir(parents=True, exist_ok=True)
        self._pending: list[SequenceRows] = []
        self._pending_rows = 0
        self._on_disk = Totals(shards=0, sequences=0, tokens=0, rows=0)
        self._lock: int | None = _locked(self.folder)
        try:
            self._open(resume)
        except BaseException:
            self.close()
            raise

    @property
    def sequences(self) -> int:
        """Sequences safely on disk: a reopened writer wants the ones after these."""
        return self._on_disk.sequences

    def append(
        self, token_ids: Any, topk_ids: Any, topk_logprobs: Any, *, positions: Any = None,
        projection: TeacherProjection | None = None,
    ) -> None:  # fmt: skip
        """One sequence, or a batch of sequences of one length. They are on disk once their shard is full.

        Args:
            token_ids: [tokens] or [batch, tokens] integers, the teacher's input; tensor, array or list.
            topk_ids: [rows, K] or [batch, rows, K] integers, -1 pads.
            topk_logprobs: the same shape, raw log-probs over the whole vocabulary; what stands at pads is ignored.
                Up to 1e-4 above 0 is rounding, and stored as 0. Give float16 or bfloat16 values in their dtype: rows
                may then sum to as much above 1 as it rounds.
            positions: [rows] integers, increasing: row r is the distribution of token positions[r] + 1. Default:
                0, 1, …, where there are as many rows as tokens, or one fewer.
            projection: of the same rows, [rows] or [batch, rows], where `info.hidden_size` is not 0: the teacher as
                forward KL sees it through a frozen head (`kk.teacher_projection`).

        Raises:
            TypeError, ValueError: naming the argument, the place and the sequence; nothing of the call is then kept.
        """
        if self._lock is None:
            raise ValueError("append: the writer is closed; open the cache with resume=True to continue it")
        ids, rows, logprobs = (torch.as_tensor(value) for value in (token_ids, topk_ids, topk_logprobs))
        where = None if positions is None else torch.as_tensor(positions)
        first = self._on_disk.sequences + len(self._pending)
        if (projection is None) != (self.info.hidden_size == 0):
            raise ValueError(
                f"append: projection is {'None' if projection is None else 'given'}, with hidden_size = "
                f"{self.info.hidden_size} in info; expected {'one' if projection is None else 'none'}"
            )
        if ids.dim() == 2:
            if rows.shape[:1] != ids.shape[:1] or logprobs.shape[:1] != ids.shape[:1]:
                raise ValueError(
                    f"append: token_ids, topk_ids and topk_logprobs have shapes {list(ids.shape)}, {list(rows.shape)} "
                    f"and {list(logprobs.shape)}; expected the same number of sequences in each"
                )
            batch = [
                checked(self.info, first + i, ids[i], where, rows[i], logprobs[i], _of_sequence(projection, i))
                for i in range(ids.shape[0])
            ]
        else:
            batch = [checked(self.info, first, ids, where, rows, logprobs, projection)]
        try:
            for sequence in batch:
                self._add(sequence)
        except OSError:
            # What is in memory may be a part of the call's sequences: only those on disk are known to the caller.
            self.close()
            raise

    def finish(self) -> None:
        """Write what is left and mark the cache as whole; nothing can be appended any more."""
        if self._lock is None:
            raise ValueError("finish: the writer is closed")
        try:
            self._flush()
            write_record(self.folder, self.info, self._on_disk)
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the cache without finishing it: what is in no whole shard yet is dropped."""
        self._pending.clear()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> TeacherCacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self._lock is not None:
            self.finish()
        self.close()

    def _open(self, resume: bool) -> None:
        paths = shard.numbered(self.folder)
        if not (self.folder / RECORD).exists():
            # Without the record nothing says whose shards these are.
            if paths:
                raise ValueError(f"{self.folder} holds {len(paths)} shards but no {RECORD}; choose another folder")
            write_record(self.folder, self.info, None)
            return
        info, finished = read_record(self.folder)
        if not resume:
            raise ValueError(
                f"{self.folder} holds a cache of {info.teacher!r}; expected none (resume=True continues it)"
            )
        difference = first_difference(self.info, info)
        if difference is not None:
            raise ValueError(f"info: {difference}, as the cache in {self.folder} began")
        if finished is not None:
            raise ValueError(
                f"{self.folder} is a finished cache of {finished.sequences} sequences; nothing can be added"
            )
        headers = [shard.read_header(path, info) for path in paths]
        if paths:
            # The others were read back, or written over, by nobody since they were whole; this one is the newest.
            shard.read_tensors(paths[-1], info, headers[-1], check=True)
        for header in headers:
            self._count(header)

    def _add(self, sequence: SequenceRows) -> None:
        rows = len(sequence.positions)
        if self._pending and self._pending_rows + rows > self.info.shard_rows:
            self._flush()
        self._pending.append(sequence)
        self._pending_rows += rows
        # A full shard is written at once, not when the next sequence comes.
        if self._pending_rows >= self.info.shard_rows:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        mass = np.concatenate([sequence.mass for sequence in self._pending])
        arrays = {
            name: np.concatenate([getattr(sequence, name) for sequence in self._pending])
            for name in ("token_ids", "positions", "topk_ids", "topk_logprobs")
        }
        for name in self._pending[0].projected:
            arrays[name] = np.concatenate([sequence.projected[name] for sequence in self._pending])
        arrays["token_offsets"] = _offsets([len(sequence.token_ids) for sequence in self._pending])
        arrays["row_offsets"] = _offsets([len(sequence.positions) for sequence in self._pending])
        header = Header(
            number=self._on_disk.shards, sequences=len(self._pending), tokens=len(arrays["token_ids"]),
            rows=len(mass), mass_sum=float(mass.sum()), mass_min=float(mass.min()),
        )  # fmt: skip
        shard.write(self.folder, self.info, header, arrays)
        self._count(header)
        self._pending, self._pending_rows = [], 0

    def _count(self, header: Header) -> None:
        before = self._on_disk
        self._on_disk = Totals(
            shards=before.shards + 1,
            sequences=before.sequences + header.sequences,
            tokens=before.tokens + header.tokens,
            rows=before.rows + header.rows,
        )


def _of_sequence(batch: TeacherProjection | None, number: int) -> TeacherProjection | None:
    if batch is None:
        return None
    projection, offset, entropy = batch.projection[number], batch.offset[number], batch.entropy[number]
    return TeacherProjection(projection, offset, entropy, batch.vocab_size)


def _locked(folder: Path) -> int:
    """A lock that ends with its process, however that ends."""
    descriptor = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise BlockingIOError(error.errno, f"another writer has the cache in {folder} open") from None
        raise
    return descriptor


def _offsets(lengths: list[int]) -> np.ndarray[Any, Any]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
