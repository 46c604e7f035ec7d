"""A writer killed at any step leaves whole shards, and one that goes on leaves the bytes of one that was not killed."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from kldiv_kernels.teacher_cache import CacheInfo, TeacherCache, TeacherCacheWriter, commit, shard
from kldiv_kernels.teacher_cache.info import write_record

INFO = CacheInfo(teacher="teacher", vocab_size=40, k=5, shard_rows=20)
LENGTHS = (9, 4, 9, 9, 30, 4, 4, 9)


def rows(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logprobs, ids = (3 * torch.randn(LENGTHS[seed], 40, generator=generator)).log_softmax(-1).topk(5)
    return torch.randint(0, 40, (LENGTHS[seed],), generator=generator), ids, logprobs


def fill(folder: Path) -> None:
    """Start or continue the cache of all sequences, as a caller does that knows them by number."""
    with TeacherCacheWriter(folder, INFO, resume=True) as writer:
        for number in range(writer.sequences, len(LENGTHS)):
            writer.append(*rows(number))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    fill(folder)
    return folder


class Steps:
    """Calls `at_step(step, what)` before each thing that a writer asks of the disk, and in the middle of a shard."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at_step: Callable[[int, str], None]) -> None:
        self.taken = 0
        self.at_step = at_step
        self._wrap(monkeypatch, commit.os, "replace", lambda source, target: f"rename {Path(target).name}")
        self._wrap(monkeypatch, commit, "_to_disk", lambda path: f"sync {'folder' if path.is_dir() else 'file'}")
        save = shard.save_file

        def save_in_two(arrays: Any, path: Path, metadata: Any) -> None:
            save(arrays, path, metadata)
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
            self.step("half a shard")
            path.write_bytes(whole)

        monkeypatch.setattr(shard, "save_file", save_in_two)

    def step(self, what: str) -> None:
        self.at_step(self.taken, what)
        self.taken += 1

    def _wrap(self, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, describe: Callable[..., str]) -> None:
        original = getattr(where, name)

        def wrapped(*arguments: Any) -> None:
            self.step(describe(*arguments))
            original(*arguments)

        monkeypatch.setattr(where, name, wrapped)


def test_a_file_has_its_name_only_when_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    Steps(monkeypatch, lambda _, what: steps.append(what))
    fill(tmp_path / "cache")
    record = ["sync file", "rename cache.json", "sync folder"]
    expected = list(record)
    for number in range(4):
        expected += ["half a shard", "sync file", f"rename shard-{number:05d}.safetensors", "sync folder"]
    assert steps == expected + record


def killed(folder: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a process that fills `folder` came to step `at`, and was killed there."""

    def kill(step: int, _: str) -> None:
        if step == at:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            with monkeypatch.context() as patch:
                Steps(patch, kill)
                fill(folder)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_killed_at_any_step_and_continued(uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kills = safe_before = 0
    while killed(folder := tmp_path / str(kills), kills, monkeypatch):
        left = sorted(path.name for path in folder.glob("shard-*"))
        for name in left:
            assert (folder / name).read_bytes() == (uninterrupted / name).read_bytes()
        finished = (folder / "cache.json").exists() and b'"finished": null' not in (folder / "cache.json").read_bytes()
        if not finished:
            writer = TeacherCacheWriter(folder, INFO, resume=True)
            assert writer.sequences == [0, 2, 4, 5, 8][len(left)]
            assert writer.sequences >= safe_before, "what was safe at an earlier step is not"
            safe_before = writer.sequences
            writer.close()
            fill(folder)
        assert files(folder) == files(uninterrupted)
        kills += 1
    assert kills == 22
    assert safe_before == len(LENGTHS)


def test_an_exception_leaves_whole_shards(uninterrupted: Path, tmp_path: Path) -> None:
    writer = TeacherCacheWriter(tmp_path, INFO)
    for number in range(4):
        writer.append(*rows(number))
    assert writer.sequences == 2, "the other two are in no whole shard"
    with pytest.raises(ValueError, match="topk_ids"), writer:
        writer.append([0], [0], [0.0])
    with pytest.raises(ValueError, match="the writer is closed"):
        writer.append(*rows(4))
    with pytest.raises(ValueError, match=r"is not finished, 1 shards are there; expected a finished cache"):
        TeacherCache(tmp_path)
    assert len(TeacherCache(tmp_path, partial=True)) == 2
    fill(tmp_path)
    assert files(tmp_path) == files(uninterrupted)


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """The operating system refuses to let a file of this process grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full_disk(arrays: Any, path: Path, metadata: Any) -> None:
    path.write_bytes(b"half of it")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("how", ["a limit of the system", "safetensors", "sync", "rename"])
def test_a_full_disk_is_told_and_leaves_nothing_half_done(
    how: str, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = TeacherCacheWriter(tmp_path, INFO)
    for number in range(4):
        writer.append(*rows(number))
    safe = files(tmp_path)

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    code = errno.EFBIG if how == "a limit of the system" else errno.ENOSPC
    told = (
        rf"{os.strerror(code)}: shard-00001.safetensors, 1,[0-9]{{3}} bytes, cannot be written to {tmp_path}, which "
        "has [0-9,]+ bytes free; none of it is left there"
    )
    with monkeypatch.context() as patch, ExitStack() as stack:
        if code == errno.EFBIG:
            stack.enter_context(small_files(600))
        elif how == "safetensors":
            patch.setattr(shard, "save_file", full_disk)
        elif how == "sync":
            patch.setattr(commit, "_to_disk", refuse)
        else:
            patch.setattr(commit.os, "replace", refuse)
        with pytest.raises(OSError, match=told) as caught:
            writer.append(*rows(4))
    assert caught.value.errno == code
    assert files(tmp_path) == safe
    assert writer.sequences == 2
    with pytest.raises(ValueError, match="the writer is closed"):
        writer.append(*rows(4))
    fill(tmp_path)
    assert files(tmp_path) == files(uninterrupted)


def test_a_disk_that_is_full_from_the_start_or_at_the_end(tmp_path: Path) -> None:
    with small_files(100), pytest.raises(OSError, match=rf"cache.json, \d+ bytes, cannot be written to {tmp_path}"):
        TeacherCacheWriter(tmp_path, INFO)
    assert files(tmp_path) == {}
    writer = TeacherCacheWriter(tmp_path, INFO)
    writer.append(*rows(0))
    with small_files(600), pytest.raises(OSError, match=r"shard-00000\.safetensors"):
        writer.finish()
    assert list(files(tmp_path)) == ["cache.json"]
    with TeacherCacheWriter(tmp_path, INFO, resume=True) as writer:
        assert writer.sequences == 0
        writer.append(*rows(0))
    assert len(TeacherCache(tmp_path)) == 1


def test_a_full_shard_is_written_at_once(tmp_path: Path) -> None:
    with TeacherCacheWriter(tmp_path, CacheInfo("t", 40, 5, shard_rows=9)) as writer:
        writer.append(*rows(0))
        assert writer.sequences == 1


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    first = TeacherCacheWriter(tmp_path, INFO)
    with pytest.raises(BlockingIOError, match=f"another writer has the cache in {tmp_path} open"):
        TeacherCacheWriter(tmp_path, INFO, resume=True)
    first.close()
    TeacherCacheWriter(tmp_path, INFO, resume=True).close()


def test_a_cache_is_not_written_over(uninterrupted: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds a cache of 'teacher'; expected none \(resume=True continues it\)"):
        TeacherCacheWriter(uninterrupted, INFO)
    with pytest.raises(ValueError, match="is a finished cache of 8 sequences; nothing can be added"):
        TeacherCacheWriter(uninterrupted, INFO, resume=True)
    (tmp_path / "shard-00000.safetensors").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"holds 1 shards but no cache.json; choose another folder"):
        TeacherCacheWriter(tmp_path, INFO, resume=True)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (CacheInfo("other", 40, 5, shard_rows=20), "info: teacher is 'other'; expected 'teacher', as the cache in"),
        (CacheInfo("teacher", 41, 5, shard_rows=20), "info: vocab_size is 41; expected 40"),
        (CacheInfo("teacher", 40, 6, shard_rows=20), "info: k is 6; expected 5"),
        (CacheInfo("teacher", 40, 5, 2.0, shard_rows=20), "info: temperature is 2.0; expected 1.0"),
        (CacheInfo("teacher", 40, 5, dtype="float16", shard_rows=20), "info: dtype is 'float16'; expected 'float32'"),
        (CacheInfo("teacher", 40, 5, weights="new", shard_rows=20), "info: weights is 'new'; expected ''"),
        (CacheInfo("teacher", 40, 5), "info: shard_rows is 65536; expected 20"),
    ],
)
def test_a_continued_cache_keeps_its_description(other: CacheInfo, message: str, tmp_path: Path) -> None:
    write_record(tmp_path, INFO, None)
    with pytest.raises(ValueError, match=message):
        TeacherCacheWriter(tmp_path, other, resume=True)


def test_equal_descriptions_of_other_types_continue_each_other(tmp_path: Path) -> None:
    loose: Any = {"teacher": Path("teacher"), "k": np.int64(5), "temperature": 2, "shard_rows": torch.tensor(9)}
    strict = CacheInfo("teacher", 40, 5, 2.0, shard_rows=9)
    first = TeacherCacheWriter(tmp_path, CacheInfo(**loose, vocab_size=40))
    first.append(*rows(0))
    first.close()
    with TeacherCacheWriter(tmp_path, strict, resume=True) as second:
        assert second.sequences == 1
        second.append(*rows(2))
    TeacherCache(tmp_path).verify()


def test_the_newest_shard_is_checked_before_the_cache_goes_on(uninterrupted: Path, tmp_path: Path) -> None:
    for name, content in files(uninterrupted).items():
        (tmp_path / name).write_bytes(content)
    write_record(tmp_path, INFO, None)
    newest = tmp_path / "shard-00003.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\1")
    with pytest.raises(ValueError, match=r"shard-00003.safetensors is corrupt"):
        TeacherCacheWriter(tmp_path, INFO, resume=True)
    newest.unlink()
    fill(tmp_path)
    assert files(tmp_path) == files(uninterrupted), "without the damaged shard the writer makes it again"
