"""`kldiv cache-teacher` in two and three processes: the cache of one process, also after a rank was killed."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import commands
import pytest
import tiny
import torch
from cache_runs import BLOCK, cached_in, options, run, save_teacher_and_text
from command_ranks import Case, in_ranks, under_torchrun
from transformers import LlamaConfig, LlamaForCausalLM

from kldiv_kernels.teacher_cache import TeacherCache
from kldiv_kernels.teacher_cache.info import write_record
from kldiv_kernels.trainer import placement
from kldiv_kernels.trainer.cache_command import cache_teacher
from kldiv_kernels.trainer.ranks import Ranks


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    commands.stay_offline(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_teacher_and_text(folder)
    teacher = tiny.llama(2, hidden=24)
    three = LlamaConfig(
        **teacher.config.to_dict() | {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}
    )
    LlamaForCausalLM(three).save_pretrained(folder / "three heads")
    tiny.word_tokenizer().save_pretrained(folder / "three heads")
    return folder


@pytest.fixture(scope="module")
def cached(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_in(tmp_path_factory.mktemp("runs") / "cache", folder)


def files(output: Path) -> dict[str, bytes]:
    """All but the tokenizer, which says whether it was loaded offline."""
    return {path.name: path.read_bytes() for path in output.iterdir() if not path.name.startswith((".lock", "token"))}


def test_torchrun_leaves_the_files_of_one_process(folder: Path, cached: Path, tmp_path: Path) -> None:
    found = under_torchrun(cache_teacher, 2, options(folder, tmp_path / "cache"))
    assert [code for code, _ in found] == [0, 0], found
    assert ["captured mass" in printed for _, printed in found] == [True, False], "one rank prints"
    assert found[1][1] == ""
    assert files(tmp_path / "cache") == files(cached)


def test_three_ranks_one_of_which_is_killed(folder: Path, cached: Path, tmp_path: Path) -> None:
    output = tmp_path / "cache"
    cases = {
        "killed": Case(options(folder, output), fault="killed", of=1),
        "resumed": Case(options(folder, output), flags=("--resume",)),
    }
    ended = in_ranks(cache_teacher, 3, {"killed": cases["killed"]}, tmp_path)["killed"]
    assert [code for code, _ in ended] == [1, -signal.SIGKILL, 1], ended
    for rank in (0, 2):
        assert f"rank {rank} of 3 cannot reach the others, one of which has ended. What is on disk" in ended[rank][1]
        assert ended[rank][1].endswith("--resume")
    left = {name: content for name, content in files(output).items() if name.startswith("shard")}
    assert len(left) == 5, "all but the shard that the killed rank was writing"
    assert left.items() <= files(cached).items()
    with pytest.raises(ValueError, match="is not finished, 5 shards are there"):
        TeacherCache(output)
    with pytest.raises(ValueError, match=r"shard-0000[0-2].safetensors is missing"):
        TeacherCache(output, partial=True)
    shutil.copytree(output, tmp_path / "one")

    code, printed = run(options(folder, tmp_path / "one"), "--resume")
    assert code == 0, printed
    assert files(tmp_path / "one") == files(cached)
    found = in_ranks(cache_teacher, 3, {"resumed": cases["resumed"]}, tmp_path)["resumed"]
    assert [code for code, _ in found] == [0, 0, 0], found
    assert ["1 shards are left for 3 processes" in printed for _, printed in found] == [True, False, False]
    assert files(output) == files(cached)


def test_two_ranks(folder: Path, cached: Path, tmp_path: Path) -> None:
    write_record(shutil.copytree(cached, tmp_path / "begun"), TeacherCache(cached).info, None)
    for number in (0, 3):
        (tmp_path / f"begun/shard-0000{number}.safetensors").unlink()
    damaged = shutil.copytree(tmp_path / "begun", tmp_path / "damaged") / "shard-00004.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\1")
    for rank in range(2):
        teacher = shutil.copytree(folder / "teacher", tmp_path / f"of rank {rank}/teacher")
        tiny.llama(rank, hidden=24).save_pretrained(teacher)
        (tmp_path / f"of rank {rank}/text.txt").write_text(tiny.words(18 * BLOCK, seed=rank))
    (tmp_path / "of rank 0/alone.txt").write_text(tiny.words(18 * BLOCK))

    new = options(folder, tmp_path / "new")
    resumed = Case(options(folder, tmp_path / "begun"), flags=("--resume",))
    spread = Case(options(folder, tmp_path / "tensor parallel"), flags=("--tensor-parallel",))
    cases = {
        "resumed": resumed,
        "finished": resumed,
        "damaged": Case(options(folder, tmp_path / "damaged"), flags=("--resume",)),
        "k": Case(new | {"--k": "65"}),
        "data": Case(new | {"--data": "text.txt"}),
        "weights": Case(new | {"--teacher": "teacher"}),
        "no data": Case(new | {"--data": "alone.txt"}),
        "other k": Case(new, of=1, theirs={"--k": "7"}),
        "other batches": Case(new, of=0, theirs={"--batch-size": "2"}),
        "other type": Case(new, of=1, more=("--bf16",)),
        "other spread": Case(new, of=1, more=("--tensor-parallel",)),
        "both": Case(new | {"--device-map": "auto"}, flags=("--tensor-parallel",)),
        "heads": Case(new | {"--teacher": str(folder / "three heads")}, flags=("--tensor-parallel",)),
        "tensor parallel": spread,
        "raises": Case(new, fault="broken text", of=1),
        "main killed": Case(options(folder, tmp_path / "main killed"), fault="killed", of=0),
        "full": Case(options(folder, tmp_path / "full"), fault="full disk", of=1),
        "spread full": Case(
            options(folder, tmp_path / "spread full"), flags=("--tensor-parallel",), fault="full disk", of=0
        ),
    }
    found = in_ranks(cache_teacher, 2, cases, tmp_path)

    for name in ("resumed", "finished", "tensor parallel"):
        assert [code for code, _ in found[name]] == [0, 0], found[name]
        assert ["captured mass" in printed for _, printed in found[name]] == [True, False]
    for name, message in (
        ("damaged", "is corrupt: its checksum"),
        ("k", "for --k: 65 is above the 64 columns of the teacher"),
        ("data", "for --data: the ranks have different texts: crc32:"),
        ("weights", "for --teacher: the ranks have different weights: crc32:"),
        ("no data", "for --data: alone.txt does not exist"),
        ("other k", "for --k: rank 1 has 7, rank 0 has 6; expected the same for all"),
        ("other batches", "for --batch-size: rank 1 has 4, rank 0 has 2; expected the same for all"),
        ("other type", "for --bf16: rank 1 has True, rank 0 has False; expected the same for all"),
        ("other spread", "for --tensor-parallel: rank 1 has True, rank 0 has False; expected the same for all"),
        ("both", "for --device-map: not with --tensor-parallel"),
        ("heads", "2 processes; expected a number that divides the teacher's num_attention_heads = 3"),
    ):
        assert [code for code, _ in found[name]] == [2, 2], (name, found[name])
        assert sum(message in printed for _, printed in found[name]) == 1, (name, found[name])
        assert sum(bool(printed) for _, printed in found[name]) == 1, "one rank tells"
    assert not (tmp_path / "new").exists()

    # Rank 0 has the store here, which under torchrun outlives it.
    full, broken = "Invalid value for --output: No space left on device", "RuntimeError: broken text"
    for name, code, own, theirs in (
        ("raises", 1, "RuntimeError('broken text')", f"rank 1 of 2 has ended: {broken}. What is on disk"),
        ("main killed", -signal.SIGKILL, "", "rank 1 of 2 cannot reach the others"),
        ("full", 2, "for --output: No space left on device", f"rank 1 of 2 has ended: {full}. What is on disk"),
        ("spread full", 2, "for --output: No space left on device", "of 2 "),
    ):
        lost = cases[name].of
        assert (found[name][lost][0], own in found[name][lost][1]) == (code, True), (name, found[name])
        assert found[name][1 - lost][0] == 1, (name, found[name])
        assert theirs in found[name][1 - lost][1], (name, found[name])

    assert files(tmp_path / "begun") == files(cached)
    damaged.unlink()
    for name in ("main killed", "full", "damaged"):
        code, printed = run(options(folder, tmp_path / name), "--resume")
        assert code == 0, (name, printed)
        assert files(tmp_path / name) == files(cached)

    for mine, alone in zip(TeacherCache(tmp_path / "tensor parallel"), TeacherCache(cached), strict=True):
        assert torch.equal(mine.token_ids, alone.token_ids)
        assert torch.equal(mine.topk_ids, alone.topk_ids)
        torch.testing.assert_close(mine.topk_logprobs, alone.topk_logprobs, rtol=1e-5, atol=1e-5)
    assert TeacherCache(tmp_path / "tensor parallel").info == TeacherCache(cached).info, "its weights are the same"


def test_a_device_map(folder: Path, cached: Path, tmp_path: Path) -> None:
    """On processors there is one device."""
    code, printed = run(options(folder, tmp_path / "cache") | {"--device-map": "auto"})
    assert code == 0, printed
    assert files(tmp_path / "cache") == files(cached)


def test_what_other_data_left_is_refused(folder: Path, cached: Path, tmp_path: Path) -> None:
    shutil.copytree(cached, tmp_path / "cache")
    info = TeacherCache(cached).info
    write_record(tmp_path / "cache", info, None)
    text = folder / "text.txt"
    kept = text.read_text()
    try:
        text.write_text(tiny.words(15 * BLOCK))
        code, printed = run(options(folder, tmp_path / "cache"), "--resume")
    finally:
        text.write_text(kept)
    assert (code, "for --data: it makes 15 blocks, which are 5 shards; the cache has shard 5" in printed) == (2, True)


@pytest.mark.parametrize(
    ("environment", "flags", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, [], "has WORLD_SIZE=2 and no LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({}, ["--tensor-parallel"], "for --tensor-parallel: 1 process; expected at least 2"),
        ({}, ["--device-map", "cpu"], "for --device-map: 'cpu'; expected auto or sequential"),
    ],
    ids=str,
)
def test_a_wrong_launch(
    environment: dict[str, str], flags: list[str], message: str, folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, printed = run(options(folder, tmp_path / "cache"), *flags)
    assert (code, message in printed) == (2, True), printed
    assert not (tmp_path / "cache").exists()


def test_each_process_has_devices_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with eight devices, which this one has not."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 8)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (device << 30, 1 << 40))
    chosen: list[int] = []
    monkeypatch.setattr("torch.accelerator.set_device_index", chosen.append)
    spread: list[Any] = []
    for local in range(3):
        ranks = Ranks(local + 3, 6, local, 3)
        assert placement.load_options(ranks, None, False) == {"device_map": torch.device("cuda", 2 * local)}
        found = placement.load_options(ranks, "auto", False)
        assert found["device_map"] == "auto"
        spread += found["max_memory"]
        assert found["max_memory"][2 * local + 1] == 2 * local + 1 << 30, "what is free"
    assert spread == list(range(6)), "no device twice, and none of the processor's memory"
    assert chosen == [0, 0, 2, 2, 4, 4]
    assert placement.load_options(Ranks(), "sequential", False) == {"device_map": "sequential"}
    found = placement.load_options(Ranks(9, 16, 1, 8), None, True)
    assert (found["distributed_config"].tp_size, chosen[-1]) == (16, 1)
    with pytest.raises(Exception, match="9 processes were started on a machine with 8 devices"):
        placement.load_options(Ranks(0, 9, 0, 9), None, False)

    model = tiny.llama(2)
    placement.check_placed(model, Ranks(), False)
    model.hf_device_map = {"model": 0, "lm_head": "cpu"}
    with pytest.raises(ValueError, match="does not fit on the devices of a process, and a part of it would be on cpu"):
        placement.check_placed(model, Ranks(), False)
