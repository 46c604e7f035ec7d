"""Writes a cache shard by shard, and goes on after a kill with the first sequence that is not on disk."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from kldiv_kernels.linear import TeacherProjection
from kldiv_kernels.teacher_cache import shard
from kldiv_kernels.teacher_cache.assembly import checked_batch, write_shard
from kldiv_kernels.teacher_cache.info import CacheInfo, Totals, open_record, write_record
from kldiv_kernels.teacher_cache.lock import Lock
from kldiv_kernels.teacher_cache.rows import SequenceRows
from kldiv_kernels.teacher_cache.shard import Header


class TeacherCacheWriter:
    """Appends sequences to a cache in `folder`; one writer at a time (`ParallelCacheWriter`: several processes).

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
            finished, one of its shards is damaged, or one is missing between others, as several processes leave it.
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
        self._lock = Lock(self.folder)
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
        if not self._lock.held:
            raise ValueError("append: the writer is closed; open the cache with resume=True to continue it")
        first = self._on_disk.sequences + len(self._pending)
        batch = checked_batch(self.info, first, token_ids, topk_ids, topk_logprobs, positions, projection)
        try:
            for sequence in batch:
                self._add(sequence)
        except OSError:
            # What is in memory may be a part of the call's sequences: only those on disk are known to the caller.
            self.close()
            raise

    def finish(self) -> None:
        """Write what is left and mark the cache as whole; nothing can be appended any more."""
        if not self._lock.held:
            raise ValueError("finish: the writer is closed")
        try:
            self._flush()
            write_record(self.folder, self.info, self._on_disk)
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the cache without finishing it: what is in no whole shard yet is dropped."""
        self._pending.clear()
        self._lock.close()

    def __enter__(self) -> TeacherCacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self._lock.held:
            self.finish()
        self.close()

    def _open(self, resume: bool) -> None:
        open_record(self.folder, self.info, resume=resume, shards=len(shard.present(self.folder)))
        paths, info = shard.numbered(self.folder), self.info
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
        self._count(write_shard(self.folder, self.info, self._on_disk.shards, self._pending))
        self._pending, self._pending_rows = [], 0

    def _count(self, header: Header) -> None:
        before = self._on_disk
        self._on_disk = Totals(
            shards=before.shards + 1,
            sequences=before.sequences + header.sequences,
            tokens=before.tokens + header.tokens,
            rows=before.rows + header.rows,
        )
