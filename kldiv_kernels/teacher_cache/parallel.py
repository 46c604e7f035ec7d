"""Writes a cache from several processes: every one of them whole shards, whose sequences are known beforehand.

    process 0   shard 0           shard 3   shard 4
    process 1        shard 1                     shard 5
    process 2          shard 2  ✗ killed               (shard 3 began here: nothing of it is there)

Where all sequences have as many rows, shard n is of the same sequences whoever writes it and when. So nobody needs to
know what the others do, and the files are those of `TeacherCacheWriter`.
"""

from __future__ import annotations

from itertools import pairwise
from operator import index
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from kldiv_kernels.linear import TeacherProjection
from kldiv_kernels.teacher_cache import shard
from kldiv_kernels.teacher_cache.assembly import checked_batch, write_shard
from kldiv_kernels.teacher_cache.info import CacheInfo, Totals, open_record, write_record
from kldiv_kernels.teacher_cache.lock import Lock
from kldiv_kernels.teacher_cache.rows import SequenceRows
from kldiv_kernels.teacher_cache.shard import Header


class ParallelCacheWriter:
    """Appends sequences of as many rows each to a cache in `folder`, by their number, from one process or several.

    Shard n holds the sequences n·S to (n + 1)·S − 1, with S = max(1, info.shard_rows // rows). It is on disk when all
    of them are appended, in the process that appends them. Who writes which shard is the caller's to deal out: give
    each of `missing()` to one process. One process calls `finish` when there is none left.

    Args:
        folder: of the cache, which all processes see; made where it does not exist.
        info: what the cache is of, the same in all processes. A cache that is continued must have the same.
        sequences: of the whole cache, at least 1.
        rows: of each sequence, at least 1.
        resume: continue the cache in `folder`, written by however many processes, or start it where there is none.
        join: write beside the process that opened the cache before, without this argument.

    As a context manager it closes at the end of the block; `finish` is for one process to call.

    Raises:
        ValueError: `sequences` or `rows` below 1; what `TeacherCacheWriter` raises; with `join`, no cache in `folder`.
        BlockingIOError: another writer has the cache open, or, without `join`, other processes have.
        OSError: the disk is full, or refuses otherwise. Whole shards stay.

    >>> import tempfile, torch
    >>> from kldiv_kernels.teacher_cache import CacheInfo, TeacherCache
    >>> folder, info = tempfile.mkdtemp(), CacheInfo(teacher="coin", vocab_size=2, k=1, shard_rows=2)
    >>> first = ParallelCacheWriter(folder, info, sequences=3, rows=1)
    >>> second = ParallelCacheWriter(folder, info, sequences=3, rows=1, join=True)
    >>> second.append(2, [1, 1], [[0]], torch.zeros(1, 1))
    >>> first.missing(), first.sequences_of(0)
    ([0], range(0, 2))
    >>> first.append(0, [[0, 1], [1, 0]], [[[1]], [[0]]], torch.zeros(2, 1, 1))
    >>> first.finish()
    >>> [sequence.token_ids.tolist() for sequence in TeacherCache(folder)]
    [[0, 1], [1, 0], [1, 1]]
    """

    def __init__(
        self, folder: str | Path, info: CacheInfo, *, sequences: int, rows: int, resume: bool = False,
        join: bool = False,
    ) -> None:  # fmt: skip
        self.folder, self.info, self.sequences, self.rows = Path(folder), info, index(sequences), index(rows)
        for name, value in (("sequences", self.sequences), ("rows", self.rows)):
            if value < 1:
                raise ValueError(f"ParallelCacheWriter: {name} is {value}; expected at least 1")
        self._a_shard = max(1, info.shard_rows // self.rows)
        self.shards = -(-self.sequences // self._a_shard)
        self._pending: dict[int, SequenceRows] = {}
        if not join:
            self.folder.mkdir(parents=True, exist_ok=True)
        elif not self.folder.is_dir():
            raise ValueError(f"ParallelCacheWriter: {self.folder} is no folder; expected that of the first process")
        self._lock = Lock(self.folder, shared=join)
        try:
            open_record(
                self.folder, self.info, resume=resume or join, shards=len(shard.present(self.folder)), begin=not join
            )
            if not join:
                # Alone until here, so that no other command goes on with the same cache.
                self._lock.share()
        except BaseException:
            self.close()
            raise

    def sequences_of(self, number: int) -> range:
        """The numbers of the sequences that shard `number` holds. IndexError outside of 0 to `shards` − 1."""
        if not 0 <= number < self.shards:
            raise IndexError(f"ParallelCacheWriter: shard {number} of {self.shards}")
        return range(number * self._a_shard, min((number + 1) * self._a_shard, self.sequences))

    def present(self) -> list[int]:
        """The numbers of the shards that are on disk now, increasing; of all processes and of earlier ones."""
        return shard.present(self.folder)

    def missing(self) -> list[int]:
        """The numbers of those that are not."""
        there = set(self.present())
        return [number for number in range(self.shards) if number not in there]

    def verify(self, number: int) -> list[Tensor]:
        """The token ids, [tokens] int32 each, of the sequences of shard `number`, after a look at all of it.

        Raises ValueError that names the shard where it is damaged, of another cache or not of these sequences.
        """
        header = self._header(number)
        tensors = shard.read_tensors(shard.path_of(self.folder, number), self.info, header, check=True)
        offsets = tensors["token_offsets"].tolist()
        return [tensors["token_ids"][start:end] for start, end in pairwise(offsets)]

    def append(
        self, first: int, token_ids: Any, topk_ids: Any, topk_logprobs: Any, *, positions: Any = None,
        projection: TeacherProjection | None = None,
    ) -> None:  # fmt: skip
        """Sequence `first`, or a batch of sequences from this number on; on disk once their shards are whole.

        Args:
            first: number of the first sequence, from 0. A number may come in any order, of the shards that this
                process writes.
            token_ids, topk_ids, topk_logprobs, positions, projection: as in `TeacherCacheWriter.append`.

        Raises:
            TypeError, ValueError: naming the argument, the place and the sequence; nothing of the call is then kept.
        """
        if not self._lock.held:
            raise ValueError("append: the writer is closed; open the cache with resume=True to continue it")
        start = index(first)
        batch = checked_batch(self.info, start, token_ids, topk_ids, topk_logprobs, positions, projection)
        if not 0 <= start <= self.sequences - len(batch):
            raise ValueError(
                f"append: first is {start}, of {len(batch)} sequences; expected 0 to {self.sequences - len(batch)}"
            )
        for number, sequence in enumerate(batch, start):
            if len(sequence.positions) != self.rows:
                raise ValueError(
                    f"append: topk_ids has {len(sequence.positions)} rows (sequence {number}); expected {self.rows}"
                )
        self._pending |= dict(enumerate(batch, start))
        touched = range(start // self._a_shard, -(-(start + len(batch)) // self._a_shard))
        try:
            for number in touched:
                self._write_whole(number)
        except OSError:
            # What is in memory may be a part of the call's sequences: only those on disk are known to the caller.
            self.close()
            raise

    def finish(self) -> None:
        """Mark the cache as whole. ValueError, naming the first, where a shard is not there."""
        if not self._lock.held:
            raise ValueError("finish: the writer is closed")
        try:
            missing = self.missing()
            if missing:
                which = self.sequences_of(missing[0])
                raise ValueError(
                    f"finish: {len(missing)} shards of {self.shards} are missing; expected "
                    f"{shard.path_of(self.folder, missing[0]).name} with the sequences {which[0]} to {which[-1]}"
                )
            if len(self.present()) > self.shards:
                raise ValueError(
                    f"finish: {self.folder} has {len(self.present())} shards; {self.sequences} sequences make "
                    f"{self.shards}"
                )
            headers = [self._header(number) for number in range(self.shards)]
            totals = Totals(
                self.shards,
                *(sum(getattr(header, name) for header in headers) for name in ("sequences", "tokens", "rows")),
            )
            write_record(self.folder, self.info, totals)
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the cache without finishing it: what is in no whole shard yet is dropped."""
        self._pending.clear()
        self._lock.close()

    def __enter__(self) -> ParallelCacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write_whole(self, number: int) -> None:
        """Shard `number`, if all of its sequences are here."""
        wanted = self.sequences_of(number)
        if all(sequence in self._pending for sequence in wanted):
            write_shard(self.folder, self.info, number, [self._pending[sequence] for sequence in wanted])
            for sequence in wanted:
                del self._pending[sequence]

    def _header(self, number: int) -> Header:
        path, wanted = shard.path_of(self.folder, number), len(self.sequences_of(number))
        header = shard.read_header(path, self.info)
        if (header.sequences, header.rows) != (wanted, wanted * self.rows):
            raise ValueError(
                f"{path} holds {header.sequences} sequences with {header.rows} rows; expected {wanted} with "
                f"{wanted * self.rows}"
            )
        return header
