"""A cache that somebody forged, or whose JSON is none: its checksums are right, and it is refused with a sentence."""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import Tensor

from kldiv_kernels.teacher_cache import CacheInfo, TeacherCache, TeacherCacheWriter, shard
from kldiv_kernels.teacher_cache.info import read_record

INFO = CacheInfo("teacher", vocab_size=40, k=5)
LENGTHS = (9, 4, 5)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    with TeacherCacheWriter(tmp_path, INFO) as writer:
        for length in LENGTHS:
            logprobs, ids = (3 * torch.randn(length, 40)).log_softmax(-1).topk(5)
            writer.append(torch.randint(0, 40, (length,)), ids, logprobs)
    return tmp_path


def forge(path: Path, tensors: dict[str, Tensor] | None = None, **header: Any) -> None:
    """Other tensors or another header in the place of a shard's, under a checksum that is right for them."""
    info = read_record(path.parent)[0]
    old = shard.read_header(path, info)
    held = {name: x.numpy() for name, x in {**load_file(path), **(tensors or {})}.items()}
    parts = {
        "format": 1, "info": info.described(), "shard": {**dataclasses.asdict(old), **header, "checksum": ""}
    }  # fmt: skip
    crc = zlib.crc32(json.dumps(parts, sort_keys=True).encode())
    for name in sorted(held):
        crc = zlib.crc32(held[name].tobytes(), crc)
    parts["shard"]["checksum"] = f"crc32:{crc:08x}"
    save_file(held, path, {"kldiv_kernels.teacher_cache": json.dumps(parts, sort_keys=True)})


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("name", ["row_offsets", "token_offsets"])
@pytest.mark.parametrize(
    ("offsets", "told"),
    [
        ([0, 14, 9, 18], r"\[0, 14, 9, 18\]; expected increasing, from 0 to 18"),
        ([0, -4, 9, 18], r"\[0, -4, 9, 18\]; expected increasing"),
        ([-9, 4, 9, 18], r"\[-9, 4, 9, 18\]; expected increasing, from 0"),
        ([0, 4, 9, 2**40], r"\[0, 4, 9, 1099511627776\]; expected increasing, from 0 to 18"),
        ([0, 4, 9, 17], r"\[0, 4, 9, 17\]; expected increasing, from 0 to 18"),
        ([0, 9, 9, 18], r"\[0, 9, 9, 18\]; expected increasing"),
        ([0, -(2**63), 2**63 - 1, 18], "expected increasing"),
    ],
)
def test_forged_offsets_are_refused(offsets: list[int], told: str, name: str, check: bool, cache: Path) -> None:
    """Whose checksum is right: they would cut other sequences out of the shard, or none."""
    path = cache / "shard-00000.safetensors"
    forge(path, {name: torch.tensor([0, 9, 13, 18])})
    assert TeacherCache(cache, check=check).lengths == [9, 4, 5], "a forgery of what is there is taken"
    forge(path, {name: torch.tensor(offsets)})
    opened = TeacherCache(cache, check=check)
    for read in (lambda: opened[1], lambda: opened.lengths, opened.verify):
        with pytest.raises(ValueError, match=rf"shard-00000.safetensors is corrupt: its {name} are .*{told}"):
            read()
    forge(path, {name: torch.tensor(offsets[:-1])})
    with pytest.raises(ValueError, match=r"shard-00000.safetensors has a corrupt header: its tensors are"):
        TeacherCache(cache)


@pytest.mark.parametrize(
    ("field", "value"),
    [("number", "0"), ("rows", -1), ("rows", 18.0), ("sequences", True), ("tokens", None), ("mass_sum", "1")],
)
def test_a_forged_header_is_refused(field: str, value: Any, cache: Path) -> None:
    forge(cache / "shard-00000.safetensors", **{field: value})
    with pytest.raises(ValueError, match=rf"shard-00000.safetensors has a corrupt header: .*{field} is {value!r}"):
        TeacherCache(cache)


DEEP = "[" * 100_000


def test_json_that_is_too_deep_or_too_large(cache: Path) -> None:
    first = cache / "shard-00000.safetensors"
    save_file(
        {name: x.numpy() for name, x in load_file(first).items()}, first, {"kldiv_kernels.teacher_cache": DEEP}
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"shard-00000.safetensors has a corrupt header: RecursionError"):
        TeacherCache(cache)
    record = cache / "cache.json"
    content = json.loads(record.read_text())
    for text in (DEEP, '{"a": ' * 100_000):
        record.write_text(text)
        with pytest.raises(ValueError, match=r"cache.json is damaged: maximum recursion depth"):
            TeacherCache(cache)
    record.write_text(json.dumps({**content, "info": {**content["info"], "temperature": 10**400}}))
    with pytest.raises(ValueError, match=r"cache.json does not describe a cache: OverflowError"):
        TeacherCache(cache)
