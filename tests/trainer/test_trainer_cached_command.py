"""`kldiv train distill --teacher-cache` from option to file, without the network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import commands
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from kldiv_kernels.teacher_cache import CacheInfo, TeacherCacheWriter
from kldiv_kernels.trainer.cache_command import cache_teacher
from kldiv_kernels.trainer.command import distill

STEPS, K, BLOCK = 8, 8, 16


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    commands.stay_offline(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, seed, hidden in (("student", 1, 16), ("teacher", 2, 24)):
        tiny.llama(seed, hidden=hidden).save_pretrained(folder / name)
        tiny.word_tokenizer().save_pretrained(folder / name)
    (folder / "text.txt").write_text(tiny.words(40 * BLOCK))
    code, printed = commands.run(
        cache_teacher,
        {
            "--teacher": str(folder / "teacher"), "--data": str(folder / "text.txt"), "--k": str(K),
            "--block-size": str(BLOCK), "--output": str(folder / "cache"),
        },
    )  # fmt: skip
    assert code == 0, printed
    return folder


def options(folder: Path, output: Path) -> dict[str, str]:
    return {
        "--student": str(folder / "student"), "--teacher-cache": str(folder / "cache"), "--output": str(output),
        "--steps": str(STEPS), "--batch-size": "4", "--lr": "1e-2", "--log-every": "1", "--eval-every": "4",
        "--save-every": "4", "--held-out": "0.1",
    }  # fmt: skip


def train(given: dict[str, str], *flags: str) -> tuple[int, str]:
    return commands.run(distill, given, *flags)


def test_a_run_needs_neither_teacher_nor_text(folder: Path, tmp_path: Path) -> None:
    output, moved = tmp_path / "run", folder / "moved"
    (folder / "teacher").rename(moved)
    given = options(folder, output) | {"--kind": "js", "--tail": "renormalize", "--ce-weight": "0.1"}
    try:
        code, printed = train(given)
    finally:
        moved.rename(folder / "teacher")
    assert code == 0, printed
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in metrics if "loss" in entry] == list(range(1, STEPS + 1))
    found = [entry["eval_topk_kl"] for entry in metrics if "eval_topk_kl" in entry]
    assert len(found) == 3
    assert found[2] < 0.9 * found[0]
    assert not any("eval_kl" in entry for entry in metrics)
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["teacher_student_kl"], summary["teacher_student_topk_kl"]) == (None, found[2])
    assert (summary["loss"]["tail"], summary["loss"]["k"]) == ("renormalize", K)
    assert summary["tokens"] == STEPS * 4 * BLOCK
    assert f"top-{K} KL(teacher ∥ student) {found[2]:.4f} nats per token, at most the full KL" in printed
    assert f"top-k KL(teacher ∥ student) {found[0]:.4f}" in printed
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    stored = json.loads((output / "options.json").read_text())
    assert (stored["teacher_cache"], stored["tail"]) == (str(folder / "cache"), "renormalize")
    assert not {"data", "teacher", "block_size"} & stored.keys()

    assert train(given, "--resume")[0] == 0, "a finished run resumes to its summary"
    code, printed = train(given | {"--tail": "bucket"}, "--resume")
    assert (code, "--resume: --tail is 'bucket', but the run in" in printed) == (2, True), printed


def test_cross_entropy_alone_and_mixed_precision(folder: Path, tmp_path: Path) -> None:
    found = {}
    for name, flags in (("alone", ["--ce-weight", "1"]), ("distilled", []), ("bf16", ["--bf16"])):
        code, printed = train(options(folder, tmp_path / name), *flags)
        assert code == 0, printed
        found[name] = json.loads((tmp_path / name / "summary.json").read_text())["teacher_student_topk_kl"]
    assert found["alone"] > found["distilled"]
    assert found["bf16"] == pytest.approx(found["distilled"], rel=0.05)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bf16").dtype == torch.float32


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"--teacher": "./teacher"}, "for --teacher: not with --teacher-cache"),
        ({"--data": "README.md"}, "for --data: not with --teacher-cache, whose sequences"),
        ({"--block-size": "512"}, "for --block-size: not with --teacher-cache"),
        ({"--text-column": "text"}, "for --text-column: not with --teacher-cache"),
        ({"--tail": "buckets"}, "for --tail: 'buckets'; expected bucket, renormalize, renormalize_teacher or none"),
        ({"--tail": "none", "--kind": "js"}, "kind is 'js'; expected forward_kl, reverse_kl, jeffreys, cross_entropy"),
        ({"--temperature": "2"}, "were taken at 1.0 (pass --temperature 1.0)"),
        ({"--teacher-cache": "./nowhere"}, "for --teacher-cache: nowhere holds no teacher cache"),
        ({"--vocab-size": "65"}, "for --vocab-size: vocab_size is 65; expected 1 to 64"),
        ({"--vocab-size": "32"}, "for --vocab-size: 32 columns are shared with"),
    ],
    ids=str,
)
def test_a_wrong_option_is_named_and_nothing_is_written(
    wrong: dict[str, str], message: str, folder: Path, tmp_path: Path
) -> None:
    code, printed = train(options(folder, tmp_path / "run") | wrong)
    assert (code, message in printed) == (2, True), printed
    assert not (tmp_path / "run").exists()


def test_tail_without_a_cache_and_neither_data_nor_cache_are_named(folder: Path, tmp_path: Path) -> None:
    given = options(folder, tmp_path / "run")
    del given["--teacher-cache"]
    code, printed = train(given)
    assert (code, "for --data: missing; only --teacher-cache has data of its own" in printed) == (2, True), printed
    given |= {"--teacher": str(folder / "teacher"), "--data": str(folder / "text.txt"), "--tail": "bucket"}
    code, printed = train(given)
    assert (code, "for --tail: only with --teacher-cache" in printed) == (2, True), printed


def test_a_cache_that_does_not_fit_is_named(folder: Path, tmp_path: Path) -> None:
    def refused(cache: Path, message: str) -> None:
        code, printed = train(options(folder, tmp_path / "run") | {"--teacher-cache": str(cache)})
        assert (code, "for --teacher-cache: " in printed, message in printed) == (2, True, True), printed
        assert not (tmp_path / "run").exists()

    def written(name: str, lengths: list[int], token: int = 3, **info: int) -> Path:
        about = CacheInfo(teacher="t", **{"vocab_size": tiny.VOCAB, "k": 1, **info})
        with TeacherCacheWriter(tmp_path / name, about) as writer:
            for length in lengths:
                writer.append([1] * length, [[token]] * length, torch.full((length, 1), -1.0))
        return tmp_path / name

    refused(written("empty", []), "empty has 0 sequence(s); expected at least 2, one of them held out")
    refused(written("one", [5]), "one has 1 sequence(s); expected at least 2")
    refused(written("long", [5, 65, 64]), "has 65 tokens; the student has 64 positions")
    refused(written("narrow", [5, 5], vocab_size=32), "32 columns are shared with ")
    refused(written("wide", [5, 5], token=70, vocab_size=80), "has the top-k id 70; expected below vocab_size = 64")
    fits = written("fits", [5, 5], vocab_size=80)
    assert train(options(folder, tmp_path / "fitted") | {"--teacher-cache": str(fits)})[0] == 0, "its ids are below 64"

    damaged = tmp_path / "damaged"
    shutil.copytree(folder / "cache", damaged)
    shard = damaged / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    refused(damaged, "is corrupt: its checksum is")
    content = json.loads((folder / "cache/tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["w7"], vocab["w8"] = vocab["w8"], vocab["w7"]
    other = tmp_path / "other tokens"
    shutil.copytree(folder / "cache", other)
    (other / "tokenizer.json").write_text(json.dumps(content))
    refused(other, "expected one vocabulary")
