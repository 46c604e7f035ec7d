"""Shards in any order, from several writers at once, are the files of one writer; and what a gap between them means."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kldiv_kernels.linear import TeacherProjection
from kldiv_kernels.teacher_cache import CacheInfo, ParallelCacheWriter, TeacherCache, TeacherCacheWriter

# Sequences of 8 rows: two a shard of 20, so that the last of four shards has one.
INFO = CacheInfo(teacher="teacher", vocab_size=40, k=5, shard_rows=20)
SEQUENCES, TOKENS, ROWS = 7, 9, 8


def rows(number: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    logprobs, ids = (3 * torch.randn(ROWS, 40, generator=generator)).log_softmax(-1).topk(5)
    return torch.randint(0, 40, (TOKENS,), generator=generator), ids, logprobs


def batch(first: int, count: int) -> tuple[Tensor, ...]:
    return tuple(torch.stack(values) for values in zip(*map(rows, range(first, first + count)), strict=True))


def opened(folder: Path, info: CacheInfo = INFO, *, resume: bool = False, join: bool = False) -> ParallelCacheWriter:
    return ParallelCacheWriter(folder, info, sequences=SEQUENCES, rows=ROWS, resume=resume, join=join)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.fixture(scope="module")
def one_writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one writer")
    with TeacherCacheWriter(folder, INFO) as writer:
        for number in range(SEQUENCES):
            writer.append(*rows(number))
    return folder


@pytest.fixture
def gap(tmp_path: Path) -> Path:
    """Shards 0 and 3 are there, and those between them are not."""
    with opened(tmp_path) as first, opened(tmp_path, join=True) as second:
        second.append(6, *rows(6))
        first.append(0, *batch(0, 3))
    return tmp_path


@pytest.mark.parametrize("seed", range(4))
def test_any_order_in_any_number_of_writers_gives_the_same_files(seed: int, one_writer: Path, tmp_path: Path) -> None:
    chance = random.Random(seed)
    first = opened(tmp_path)
    writers = [first, *(opened(tmp_path, join=True) for _ in range(seed))]
    order = chance.sample(range(first.shards), first.shards)
    for number in order:
        assert number in first.missing()
        writer = chance.choice(writers)
        for sequence in chance.sample(list(first.sequences_of(number)), len(first.sequences_of(number))):
            writer.append(sequence, *rows(sequence))
        assert number in first.present()
    for writer in writers[1:]:
        writer.close()
    first.finish()
    assert files(tmp_path) == files(one_writer)


def test_a_batch_over_the_ends_of_shards(one_writer: Path, tmp_path: Path) -> None:
    with opened(tmp_path) as writer:
        writer.append(3, *batch(3, 4))
        assert writer.present() == [2, 3], "sequence 3 waits for sequence 2"
        writer.append(0, *batch(0, 3))
        writer.finish()
    assert files(tmp_path) == files(one_writer)


def test_a_projection_and_sequences_longer_than_a_shard(tmp_path: Path) -> None:
    info = CacheInfo("t", 40, 5, hidden_size=3, head="h", shard_rows=5)
    projections = [
        TeacherProjection(torch.full((ROWS, 3), float(n)), torch.zeros(ROWS), torch.ones(ROWS), 40) for n in range(2)
    ]
    with TeacherCacheWriter(tmp_path / "one", info) as one:
        for number, projection in enumerate(projections):
            one.append(*rows(number), projection=projection)
    with ParallelCacheWriter(tmp_path / "parallel", info, sequences=2, rows=ROWS) as writer:
        for number in (1, 0):
            writer.append(number, *rows(number), projection=projections[number])
        writer.finish()
    assert files(tmp_path / "one") == files(tmp_path / "parallel")


def test_a_gap_is_refused_by_all_but_the_one_who_can_fill_it(gap: Path, one_writer: Path) -> None:
    with pytest.raises(ValueError, match="is not finished, 2 shards are there"):
        TeacherCache(gap)
    missing = r"shard-00001.safetensors is missing; shard-00003.safetensors is there"
    with pytest.raises(ValueError, match=missing):
        TeacherCache(gap, partial=True)
    with pytest.raises(ValueError, match=missing):
        TeacherCacheWriter(gap, INFO, resume=True)
    with opened(gap, resume=True) as writer:
        assert writer.missing() == [1, 2]
        assert [len(tokens) for tokens in writer.verify(3)] == [TOKENS]
        assert writer.verify(0)[1].tolist() == rows(1)[0].tolist()
        writer.append(4, *batch(4, 2))
        with pytest.raises(ValueError, match=r"1 shards of 4 are missing; expected shard-00001\S+ with .* 2 to 3"):
            writer.finish()
    with opened(gap, resume=True) as writer:
        writer.append(2, *batch(2, 2))
        writer.finish()
    assert files(gap) == files(one_writer)


def test_who_may_write_together(tmp_path: Path) -> None:
    busy = re.escape(f"another writer has the cache in {tmp_path} open")
    first = opened(tmp_path)
    second = opened(tmp_path, join=True)
    first.close()
    for stranger in (lambda: opened(tmp_path, resume=True), lambda: TeacherCacheWriter(tmp_path, INFO, resume=True)):
        # The process that opened it may be gone: another one of its command still writes.
        with pytest.raises(BlockingIOError, match=busy):
            stranger()
    second.close()
    with TeacherCacheWriter(tmp_path, INFO, resume=True), pytest.raises(BlockingIOError, match=busy):
        opened(tmp_path, join=True)


def test_what_is_refused(one_writer: Path, gap: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ParallelCacheWriter: rows is 0; expected at least 1"):
        ParallelCacheWriter(tmp_path / "new", INFO, sequences=1, rows=0)
    with pytest.raises(ValueError, match="is no folder; expected that of the first process"):
        opened(tmp_path / "new", join=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no teacher cache"):
        opened(tmp_path / "empty", join=True)
    assert not (tmp_path / "empty/cache.json").exists()
    with pytest.raises(ValueError, match="is a finished cache of 7 sequences"):
        opened(one_writer, resume=True)
    with pytest.raises(ValueError, match=r"holds a cache of 'teacher'; expected none"):
        opened(gap)
    with pytest.raises(ValueError, match="info: k is 6; expected 5"):
        opened(gap, CacheInfo("teacher", 40, 6, shard_rows=20), resume=True)
    with opened(gap, resume=True) as writer:
        with pytest.raises(ValueError, match="append: first is 6, of 2 sequences; expected 0 to 5"):
            writer.append(6, *batch(5, 2))
        with pytest.raises(ValueError, match=r"topk_ids has 7 rows \(sequence 2\); expected 8"):
            writer.append(2, *(values[:-1] for values in rows(2)))
        with pytest.raises(ValueError, match=r"is NaN \(sequence 5\)"):
            writer.append(5, *rows(5)[:2], rows(5)[2] * torch.nan)
        with pytest.raises(IndexError, match="shard 4 of 4"):
            writer.sequences_of(4)
        assert writer.present() == [0, 3]
    with pytest.raises(ValueError, match="the writer is closed"):
        writer.append(2, *batch(2, 2))
    # More sequences than the cache was begun with: its last shard is not one of theirs.
    with ParallelCacheWriter(gap, INFO, sequences=8, rows=ROWS, resume=True) as longer:
        with pytest.raises(ValueError, match="holds 1 sequences with 8 rows; expected 2 with 16"):
            longer.verify(3)
        longer.append(2, *batch(2, 4))
        with pytest.raises(ValueError, match="holds 1 sequences"):
            longer.finish()
    shorter = ParallelCacheWriter(gap, INFO, sequences=6, rows=ROWS, resume=True)
    with pytest.raises(ValueError, match="has 4 shards; 6 sequences make 3"):
        shorter.finish()
