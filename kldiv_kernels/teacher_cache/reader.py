"""Reads a cache: any sequence by its number, straight from memory-mapped shards."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from operator import index as as_index
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from kldiv_kernels.linear import TeacherProjection
from kldiv_kernels.teacher_cache import shard
from kldiv_kernels.teacher_cache.info import Totals, read_record


@dataclass(frozen=True)
class CachedSequence:
    """One sequence: views of the memory map, valid as long as they live. Clone them before writing into them.

    token_ids: [tokens] int32, the teacher's input.
    positions: [rows] int32, increasing; row r is the distribution of token positions[r] + 1.
    topk_ids: [rows, K] int32, -1 pads.
    topk_logprobs: [rows, K] float32 or float16, raw (not renormalised over the K), -inf at pads.
    projection: of the same rows, for `linear_divergence_loss(reference_projection=)`; None where none is stored.
    """

    token_ids: Tensor
    positions: Tensor
    topk_ids: Tensor
    topk_logprobs: Tensor
    projection: TeacherProjection | None = None


class CapturedMass(NamedTuple):
    """Mean and minimum over rows of Σ exp(log-prob): the part of the teacher's distribution that the cache has."""

    mean: float
    min: float


class TeacherCache:
    """The sequences of a cache, by number: `len(cache)`, `cache[i]`, iteration; a map-style data set for PyTorch.

    A shard is mapped, and its checksum compared, when the first of its sequences is asked for. Copies for workers
    (pickling) map their own.

    Args:
        folder: of the cache.
        teacher, vocab_size, k, temperature, head: what the caller needs the cache to have; None (default) takes any.
        partial: accept a cache whose writer has not finished, and read the shards that are there. Several processes
            may have left out one between others: such a cache is refused until it goes on.
        check: compare each shard's checksum when it is first read, which reads all of it (1.4 GB/s here). False
            leaves that to `verify`.

    Raises:
        ValueError: no cache in `folder`, one that is not finished, one with another teacher, vocabulary, K or
            temperature than asked for; a shard that is missing, truncated, corrupt or from another cache, by name.

    >>> import tempfile, torch
    >>> from kldiv_kernels.teacher_cache import CacheInfo, TeacherCacheWriter
    >>> folder = tempfile.mkdtemp()
    >>> with TeacherCacheWriter(folder, CacheInfo(teacher="t", vocab_size=4, k=1)) as writer:
    ...     writer.append([[3, 2], [1, 0]], [[[2]], [[0]]], torch.zeros(2, 1, 1))
    >>> cache = TeacherCache(folder, vocab_size=4)
    >>> len(cache), cache[1].token_ids.tolist(), cache[-1].topk_ids.tolist()
    (2, [1, 0], [[0]])
    >>> TeacherCache(folder, k=64)
    Traceback (most recent call last):
        ...
    ValueError: TeacherCache: k of the cache is 1; expected 64
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        teacher: str | None = None,
        vocab_size: int | None = None,
        k: int | None = None,
        temperature: float | None = None,
        head: str | None = None,
        partial: bool = False,
        check: bool = True,
    ) -> None:
        self.folder, self._check = Path(folder), check
        self.info, finished = read_record(self.folder)
        wanted = {"teacher": teacher, "vocab_size": vocab_size, "k": k, "temperature": temperature, "head": head}
        for name, value in wanted.items():
            found = getattr(self.info, name)
            if value is not None and found != value:
                raise ValueError(f"TeacherCache: {name} of the cache is {found!r}; expected {value!r}")
        if finished is None and not partial:
            raise ValueError(
                f"TeacherCache: {folder} is not finished, {len(shard.present(self.folder))} shards are there; "
                "expected a finished cache (continue its writer, or pass partial=True to read these)"
            )
        self._paths = shard.numbered(self.folder)
        if finished is not None and len(self._paths) != finished.shards:
            raise ValueError(f"TeacherCache: {folder} has {len(self._paths)} shards; expected {finished.shards}")
        self._headers = [shard.read_header(path, self.info) for path in self._paths]
        self.totals = Totals(
            len(self._headers),
            *(sum(getattr(header, name) for header in self._headers) for name in ("sequences", "tokens", "rows")),
        )
        if finished is not None and self.totals != finished:
            raise ValueError(f"TeacherCache: the shards in {folder} hold {self.totals}; expected {finished}")
        # The number of the first sequence of each shard.
        self._starts = list(accumulate((header.sequences for header in self._headers), initial=0))
        self._open: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return self.totals.sequences

    def __getitem__(self, number: int) -> CachedSequence:
        sequence = as_index(number)
        if sequence < 0:
            sequence += len(self)
        if not 0 <= sequence < len(self):
            raise IndexError(f"TeacherCache: sequence {number} of {len(self)}")
        where = bisect_right(self._starts, sequence) - 1
        tensors, local = self._shard(where), sequence - self._starts[where]
        tokens, rows = (slice(*tensors[name][local : local + 2].tolist()) for name in ("token_offsets", "row_offsets"))
        projection = None
        if self.info.hidden_size:
            parts = [tensors[name][rows] for name in ("projection", "projection_offset", "projection_entropy")]
            projection = TeacherProjection(parts[0], parts[1], parts[2], self.info.vocab_size)
        return CachedSequence(
            tensors["token_ids"][tokens], tensors["positions"][rows],
            tensors["topk_ids"][rows], tensors["topk_logprobs"][rows], projection,
        )  # fmt: skip

    def __iter__(self) -> Iterator[CachedSequence]:
        return (self[number] for number in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        # A memory map does not travel: the copy opens the files where it arrives.
        return {**self.__dict__, "_open": {}}

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, from the shards' offsets: no row is read, and no checksum compared."""
        found: list[int] = []
        for path, header in zip(self._paths, self._headers, strict=True):
            offsets = shard.read_tensors(path, self.info, header, check=False)["token_offsets"]
            found.extend(offsets.diff().tolist())
        return found

    @property
    def captured_mass(self) -> CapturedMass:
        """Over all rows, from the shards' headers: as it was before rounding to the stored dtype. NaN without rows."""
        if not self.totals.rows:
            return CapturedMass(float("nan"), float("nan"))
        total = sum(header.mass_sum for header in self._headers)
        return CapturedMass(total / self.totals.rows, min(header.mass_min for header in self._headers))

    @property
    def bytes(self) -> int:
        """Size of the shards' files."""
        return sum(path.stat().st_size for path in self._paths)

    def verify(self, on_progress: Callable[[int, int], None] = lambda done, shards: None) -> None:
        """Compare every shard's checksum; `on_progress` hears how many are done, of how many.

        Raises ValueError that names each shard that fails.
        """
        failed = []
        for done, (path, header) in enumerate(zip(self._paths, self._headers, strict=True)):
            on_progress(done, len(self._paths))
            try:
                shard.read_tensors(path, self.info, header, check=True)
            except ValueError as error:
                failed.append(str(error))
        if failed:
            raise ValueError(f"verify: {len(failed)} of {len(self._paths)} shards fail: {'; '.join(failed)}")

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._open:
            self._open[number] = shard.read_tensors(
                self._paths[number], self.info, self._headers[number], check=self._check
            )
        return self._open[number]
