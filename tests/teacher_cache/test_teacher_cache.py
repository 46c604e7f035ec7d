"""A teacher cache gives back what was appended, and a damaged one says which file, and how."""

from __future__ import annotations

import json
import pickle
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kldiv_kernels.teacher_cache import CachedSequence, CacheInfo, TeacherCache, TeacherCacheWriter

K, VOCAB = 5, 40
INFO = CacheInfo(teacher="teacher", vocab_size=VOCAB, k=K, shard_rows=20)
# Sequences of 9 and 4 rows: two or three a shard of 20 rows; one of 30 rows has a shard of its own.
LENGTHS = (9, 4, 9, 9, 30, 4, 4, 9)


def rows(length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [length], ids and log-probs [length, K] of a random teacher, most probable first."""
    generator = torch.Generator().manual_seed(seed)
    logprobs, ids = (3 * torch.randn(length, VOCAB, generator=generator)).log_softmax(-1).topk(K)
    return torch.randint(0, VOCAB, (length,), generator=generator), ids, logprobs


def write(folder: Path, info: CacheInfo = INFO, lengths: tuple[int, ...] = LENGTHS) -> Path:
    with TeacherCacheWriter(folder, info) as writer:
        for seed, length in enumerate(lengths):
            writer.append(*rows(length, seed))
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("caches") / "cache")


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "cache")
    return tmp_path / "cache"


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.safetensors"))


def assert_is(found: CachedSequence, length: int, seed: int, dtype: torch.dtype = torch.float32) -> None:
    tokens, ids, logprobs = rows(length, seed)
    assert found.token_ids.dtype == found.positions.dtype == found.topk_ids.dtype == torch.int32
    assert found.token_ids.tolist() == tokens.tolist()
    assert found.positions.tolist() == list(range(length))
    assert found.topk_ids.tolist() == ids.tolist()
    assert found.topk_logprobs.dtype == dtype
    assert torch.equal(found.topk_logprobs, logprobs.to(dtype))


def test_sequences_come_back_in_any_order(written: Path) -> None:
    cache = TeacherCache(written)
    assert len(cache) == len(LENGTHS)
    for number in (4, 0, 7, 3, 1, 6, 2, 5):
        assert_is(cache[number], LENGTHS[number], number)
    assert_is(cache[-1], LENGTHS[-1], len(LENGTHS) - 1)
    for number, sequence in enumerate(cache):
        assert_is(sequence, LENGTHS[number], number)
    for beyond in (len(LENGTHS), -len(LENGTHS) - 1):
        with pytest.raises(IndexError, match=f"sequence {beyond} of 8"):
            cache[beyond]


def test_float16_rounds_the_logprobs_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "cache", CacheInfo("teacher", VOCAB, K, dtype="float16"))
    for number, sequence in enumerate(TeacherCache(folder)):
        assert_is(sequence, LENGTHS[number], number, torch.float16)


def test_shards_hold_whole_sequences_up_to_their_rows_and_any_reader_reads_them(written: Path) -> None:
    held = [load_file(path) for path in shards(written)]
    lengths = [part["row_offsets"].diff().tolist() for part in held]
    assert lengths == [[9, 4], [9, 9], [30], [4, 4, 9]]
    assert held[2]["topk_ids"].tolist() == rows(30, 4)[1].tolist()
    assert TeacherCache(written).totals.rows == sum(LENGTHS)


def test_a_batch_is_its_sequences(tmp_path: Path) -> None:
    parts = [rows(6, seed) for seed in range(5)]
    with TeacherCacheWriter(tmp_path / "one", INFO) as writer:
        for part in parts:
            writer.append(*part)
    with TeacherCacheWriter(tmp_path / "batch", INFO) as writer:
        writer.append(*(torch.stack(tensors) for tensors in zip(*parts, strict=True)))
    for one, batch in zip(shards(tmp_path / "one"), shards(tmp_path / "batch"), strict=True):
        assert one.read_bytes() == batch.read_bytes()


def test_positions_padding_and_impossible_tokens(tmp_path: Path) -> None:
    info = CacheInfo("teacher", 10, 3)
    ids = [[4, 2, -1], [7, -1, -1]]
    logprobs = [[-0.5, float("-inf"), 5.0], [2e-5, float("nan"), -1.0]]
    with TeacherCacheWriter(tmp_path, info) as writer:
        writer.append([1, 2, 3, 4, 5], ids, logprobs, positions=[1, 3])
        writer.append([1, 2], [[4, -1, -1]], [[-0.5, 0.0, 0.0]])
    first, second = TeacherCache(tmp_path)
    assert first.positions.tolist() == [1, 3]
    assert first.topk_ids.tolist() == ids
    off = float("-inf")
    assert first.topk_logprobs.tolist() == [[-0.5, off, off], [0.0, off, off]], "2e-5 is a rounded 0"
    assert second.positions.tolist() == [0], "one row fewer than tokens: no row after the last"


def test_captured_mass_is_that_of_the_rows_before_rounding(written: Path, tmp_path: Path) -> None:
    mass = torch.cat([rows(length, seed)[2] for seed, length in enumerate(LENGTHS)]).double().exp().sum(-1)
    half = write(tmp_path / "half", CacheInfo("teacher", VOCAB, K, dtype="float16"))
    for folder in (written, half):
        found = TeacherCache(folder).captured_mass
        assert found.mean == pytest.approx(mass.mean().item(), abs=1e-6)
        assert found.min == pytest.approx(mass.min().item(), abs=1e-6)


def test_sequences_are_views_of_the_mapped_file(written: Path) -> None:
    sequence = TeacherCache(written)[1]
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(shards(written)[0]) in line]
    maps = [tuple(int(address, 16) for address in line.split()[0].split("-")) for line in lines]
    assert sequence.projection is None
    for name in ("token_ids", "positions", "topk_ids", "topk_logprobs"):
        tensor = getattr(sequence, name)
        assert any(start <= tensor.data_ptr() < end for start, end in maps), name


def test_a_cache_travels_to_another_process(written: Path) -> None:
    cache = TeacherCache(written)
    closed = pickle.dumps(cache)
    cache[0]
    data = pickle.dumps(cache)
    assert data == closed, "the maps stay behind"
    assert_is(pickle.loads(data)[3], LENGTHS[3], 3)


@pytest.mark.parametrize("name", ["teacher", "vocab_size", "k", "temperature"])
def test_another_cache_than_asked_for(name: str, written: Path) -> None:
    right: Any = getattr(INFO, name)
    assert len(TeacherCache(written, **{name: right})) == len(LENGTHS)
    wrong = "other" if name == "teacher" else right + 1
    with pytest.raises(ValueError, match=f"TeacherCache: {name} of the cache is {right!r}; expected {wrong!r}"):
        TeacherCache(written, **{name: wrong})


def test_the_checksum_is_compared_when_a_shard_is_first_read(copied: Path) -> None:
    damaged = shards(copied)[1]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    cache = TeacherCache(copied)
    assert_is(cache[0], LENGTHS[0], 0)
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is corrupt: its checksum is crc32:.{8}; its header"):
        cache[2]
    seen: list[tuple[int, int]] = []
    with pytest.raises(ValueError, match=r"verify: 1 of 4 shards fail: .*shard-00001.safetensors is corrupt"):
        cache.verify(lambda *progress: seen.append(progress))
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4)]
    unchecked = TeacherCache(copied, check=False)
    assert_is(unchecked[4], LENGTHS[4], 4)
    unchecked[2]


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    folder = write(tmp_path, CacheInfo("t", VOCAB, K), (2,))
    (path,) = shards(folder)
    whole = path.read_bytes()
    TeacherCache(folder).verify()
    for at in range(len(whole)):
        content = bytearray(whole)
        content[at] ^= 1 << at % 8
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"shard-00000\.safetensors"):
            TeacherCache(folder).verify()


def test_any_truncation_is_found(copied: Path) -> None:
    path = shards(copied)[1]
    whole = path.read_bytes()
    for length in (0, 5, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"shard-00001.safetensors is truncated or corrupt: its {length:,} bytes"):
            TeacherCache(copied)


def test_missing_and_foreign_shards(copied: Path, tmp_path: Path) -> None:
    last = shards(copied)[-1]
    kept = last.read_bytes()
    last.unlink()
    with pytest.raises(ValueError, match="has 3 shards; expected 4"):
        TeacherCache(copied)
    last.write_bytes(kept)
    second = shards(copied)[1]
    kept = second.read_bytes()
    second.unlink()
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is missing; shard-00003.safetensors is there"):
        TeacherCache(copied)
    last.rename(second)
    second.with_name("shard-00003.safetensors").write_bytes(kept)
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is shard 3 by its header"):
        TeacherCache(copied)
    for info, message in (
        (CacheInfo("teacher", VOCAB, K + 1, shard_rows=20), "its k is 6; expected 5"),
        (CacheInfo("other", VOCAB, K, shard_rows=20), "its teacher is 'other'; expected 'teacher'"),
        (CacheInfo("teacher", VOCAB + 1, K, shard_rows=20), "its vocab_size is 41; expected 40"),
    ):
        other = tmp_path / f"{info.k}-{info.teacher}-{info.vocab_size}"
        with TeacherCacheWriter(other, info) as writer:
            writer.append([0], [[1] + [-1] * (info.k - 1)], torch.zeros(1, info.k))
        shutil.copy(shards(other)[0], shards(copied)[0])
        with pytest.raises(ValueError, match=f"shard-00000.safetensors is of another cache: {message}"):
            TeacherCache(copied)


def test_a_folder_that_is_no_cache(written: Path, copied: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no teacher cache \(no cache.json\)"):
        TeacherCache(tmp_path)
    record = copied / "cache.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps({**content, "format": 2}))
    with pytest.raises(ValueError, match=r"cache.json: its format is 2; this version of kldiv_kernels reads 1"):
        TeacherCache(copied)
    record.write_text(record.read_text()[:30])
    with pytest.raises(ValueError, match=r"cache.json is damaged"):
        TeacherCache(copied)


def test_the_benchmark_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["", "--sequences", "8", "--folder", str(tmp_path)])
    runpy.run_path(str(Path(__file__).parents[2] / "benchmarks/teacher_cache_speed.py"), run_name="__main__")
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()][:2] == [
        ["float32", "written"],
        ["float32", "read"],
    ]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("k", 0, "k is 0; expected 1 to vocab_size = 40"),
        ("k", 41, "k is 41; expected 1 to vocab_size = 40"),
        ("vocab_size", 2**31, "vocab_size is 2147483648; expected 1 to 2147483647"),
        ("temperature", 0.0, "temperature is 0.0; expected above 0 and finite"),
        ("temperature", float("nan"), "temperature is nan; expected above 0 and finite"),
        ("dtype", "bfloat16", "dtype is 'bfloat16'; expected float32 or float16"),
        ("shard_rows", 0, "shard_rows is 0; expected at least 1"),
    ],
)
def test_a_description_that_is_none(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"CacheInfo: {message}"):
        CacheInfo(**{"teacher": "t", "vocab_size": VOCAB, "k": K, field: value})
