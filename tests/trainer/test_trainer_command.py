"""`kldiv train distill` from option to file, on local folders, without the network."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import commands
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kldiv_kernels.trainer.command import distill

STEPS = 4


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    commands.stay_offline(monkeypatch)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.pair(tmp_path_factory.mktemp("models"))


def options(models: Path, output: Path) -> dict[str, str]:
    return {
        "--student": str(models / "student"), "--teacher": str(models / "teacher"), "--data": str(models / "text.txt"),
        "--output": str(output), "--steps": str(STEPS), "--batch-size": "2", "--block-size": "16", "--lr": "1e-2",
        "--log-every": "1", "--eval-every": "2", "--save-every": "2",
    }  # fmt: skip


def kldiv_train(given: dict[str, str], *flags: str) -> tuple[int, str]:
    return commands.run(distill, given, *flags)


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_a_model_metrics_a_summary_and_a_plot(models: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    given = options(models, output) | {"--kind": "js", "--beta": "0.2", "--ce-weight": "0.25"}
    code, printed = kldiv_train(given)
    assert code == 0, printed
    metrics = lines(output)
    assert [entry["step"] for entry in metrics if "loss" in entry] == list(range(1, STEPS + 1))
    assert [entry["step"] for entry in metrics if "eval_kl" in entry] == [0, 2, 4]
    summary = json.loads((output / "summary.json").read_text())
    assert summary["loss"]["kind"] == "js"
    assert (summary["loss"]["beta"], summary["loss"]["ce_weight"]) == (0.2, 0.25)
    assert summary["tokens"] == STEPS * 2 * 16
    assert summary["teacher_student_kl"] == [e["eval_kl"] for e in metrics if "eval_kl" in e][-1]
    assert f"{summary['teacher_student_kl']:.4f}" in printed
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    trained = AutoModelForCausalLM.from_pretrained(output)
    start = AutoModelForCausalLM.from_pretrained(models / "student")
    assert not torch.equal(trained.get_input_embeddings().weight, start.get_input_embeddings().weight)
    assert AutoTokenizer.from_pretrained(output)("w3 w5")["input_ids"] == [4, 6]

    assert kldiv_train(given, "--resume")[0] == 0, "a finished run resumes to its summary"
    code, printed = kldiv_train(given)
    assert (code, "holds a run; pass --resume to continue it" in printed) == (2, True)
    code, printed = kldiv_train(given | {"--lr": "0.5"}, "--resume")
    assert (code, "--resume: --lr is 0.5, but the run" in printed) == (2, True)
    code, printed = kldiv_train(given | {"--steps": "3"}, "--resume")
    assert (code, "began with 4; a continued run may have more of them, not fewer" in printed) == (2, True)

    longer = {"--steps": str(STEPS + 2)}
    code, printed = kldiv_train(given | longer, "--resume")
    assert code == 0, printed
    assert json.loads((output / "summary.json").read_text())["steps"] == STEPS + 2
    assert kldiv_train(given | longer | {"--output": str(tmp_path / "whole")})[0] == 0
    rates, expected = (
        {e["step"]: e["learning_rate"] for e in lines(run) if "loss" in e} for run in (output, tmp_path / "whole")
    )
    assert [rates[step] for step in (5, 6)] == [expected[step] for step in (5, 6)]
    assert rates[4] != expected[4]
    for checkpoint in output.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    code, printed = kldiv_train(given | {"--steps": "9"}, "--resume")
    assert (code, "has no checkpoint from which its finished run could go on" in printed) == (2, True), printed


def test_cross_entropy_alone_runs_without_a_teacher(models: Path, tmp_path: Path) -> None:
    given = options(models, tmp_path / "run") | {"--ce-weight": "1"}
    del given["--teacher"]
    code, printed = kldiv_train(given)
    assert code == 0, printed
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["teacher_student_kl"] is None


def test_mixed_precision_keeps_the_students_weights_in_float32(models: Path, tmp_path: Path) -> None:
    given = options(models, tmp_path / "run")
    code, printed = kldiv_train(given, "--bf16")
    assert code == 0, printed
    assert kldiv_train(given | {"--output": str(tmp_path / "float32")})[0] == 0
    rounded, exact = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "float32"))
    assert rounded["teacher_student_kl"] == pytest.approx(exact["teacher_student_kl"], rel=0.05)
    assert rounded["teacher_student_kl"] != exact["teacher_student_kl"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").dtype == torch.float32


class _RunsCode:
    def __reduce__(self) -> Any:
        return os.mkdir, ("loaded",)


def _damaged(folder: Path, what: str) -> None:
    """`what` becomes of the model in `folder`."""
    weights, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    if what == "a pickle that runs code":
        torch.save({"lm_head.weight": _RunsCode()}, pickled)
    elif what == "a pickled model":
        torch.save(tiny.llama(1), pickled)
    elif what == "a pickle cut short":
        torch.save(tiny.llama(1).state_dict(), pickled)
        pickled.write_bytes(pickled.read_bytes()[:1000])
    elif what == "an empty pickle":
        pickled.write_bytes(b"")
    elif what == "text for a pickle":
        pickled.write_text("a pointer to some other storage")
    elif what == "a pickled list":
        torch.save([1, 2, 3], pickled)
    elif what == "weights cut short":
        weights.write_bytes(weights.read_bytes()[:500])
    elif what == "a pickle for safetensors":
        torch.save({"lm_head.weight": _RunsCode()}, weights)
    elif what == "weights of another width":
        tiny.llama(1, hidden=32).save_pretrained(folder / "other")
        (folder / "other" / "model.safetensors").replace(weights)
    elif what == "a deep config":
        (folder / "config.json").write_text("[" * 100_000)
    else:
        (folder / "tokenizer.json").write_text("{}")
    if pickled.exists():
        weights.unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("a pickle that runs code", "its weights are no pickle of tensors alone; any other could run code"),
        ("a pickled model", "its weights are no pickle of tensors alone; any other could run code"),
        ("a pickle cut short", "it cannot be loaded, a file in it is damaged or of another kind: "),
        ("an empty pickle", "it cannot be loaded, a file in it is damaged or of another kind: EOFError"),
        ("text for a pickle", "it cannot be loaded, a file in it is damaged or of another kind: "),
        ("a pickled list", "it cannot be loaded, a file in it is damaged or of another kind: TypeError"),
        ("weights cut short", "it cannot be loaded, a file in it is damaged or of another kind: SafetensorError("),
        ("a pickle for safetensors", "it cannot be loaded, a file in it is damaged or of another kind: Safetensor"),
        ("weights of another width", "it cannot be loaded, a file in it is damaged or of another kind: RuntimeError"),
        ("a deep config", "it cannot be loaded, a file in it is damaged or of another kind: RecursionError"),
        ("an empty tokenizer", "it cannot be loaded, a file in it is damaged or of another kind: KeyError"),
    ],
)
@pytest.mark.parametrize("option", ["--student", "--teacher"])
def test_a_damaged_model_is_told_in_a_sentence(
    option: str, what: str, message: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "damaged"
    shutil.copytree(models / option[2:], folder)
    _damaged(folder, what)
    output = tmp_path / "run"
    code, printed = kldiv_train(options(models, output) | {option: str(folder)})
    assert (code, f"for {option}: {folder}: {message}" in printed) == (2, True), printed
    assert not output.exists()
    assert not (tmp_path / "loaded").exists(), "a pickle was run"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"--kind": "forwrd_kl"}, "for --kind: unknown statistic 'forwrd_kl'; did you mean forward_kl"),
        ({"--kind": "js", "--beta": "2"}, "for --beta: 2.0 is not between 0 and 1, for js"),
        ({"--kind": "renyi", "--alpha": "1"}, "for --alpha: 1.0 is not above 0, finite and not 1"),
        (
            {"--kind": "forward_kl", "--beta": "0.9"},
            "for --beta: forward_kl has no use for it; it is for js, alpha_beta",
        ),
        ({"--kind": "js", "--alpha": "0.5"}, "for --alpha: js has no use for it; it is for skew_kl, skew_reverse_kl,"),
        ({"--ce-weight": "-1"}, "for --ce-weight: -1.0 is not between 0 and 1"),
        ({"--temperature": "0"}, "for --temperature: 0.0 is not above 0"),
        ({"--lr": "0"}, "for --lr: 0.0 is not above 0"),
        ({"--held-out": "1"}, "for --held-out: 1.0 is not between 0 and 1"),
        ({"--steps": "0"}, "for '--steps': "),
        ({"--backend": "gpu"}, "for --backend: unknown 'gpu'; expected one of auto"),
        ({"--student": "./nowhere"}, "for --student: ./nowhere does not exist"),
        ({"--teacher": "nobody/nothing"}, "for --teacher: nobody/nothing is no folder, it is not in the hub's cache"),
        ({"--data": "missing.txt"}, "for --data: missing.txt does not exist"),
        ({"--data": "nobody/nothing"}, "for --data: data: 'nobody/nothing' is no local file or folder"),
        ({"--block-size": "4096"}, "for --data: data: the text makes 0 block(s)"),
        ({"--text-column": "body"}, "has no column 'body'; it has text"),
        ({"--vocab-size": "65"}, "for --vocab-size: vocab_size is 65; expected 1 to 64"),
        ({"--vocab-size": "32"}, "for --vocab-size: 32 is below the tokenizer's 64 tokens"),
        ({"--kind": "alpha_beta", "--alpha": "0.5", "--beta": "-0.5"}, "alpha + beta is 0.0; expected not 0"),
    ],
    ids=str,
)
def test_a_wrong_option_is_named_and_nothing_is_written(
    wrong: dict[str, str], message: str, models: Path, tmp_path: Path
) -> None:
    code, printed = kldiv_train(options(models, tmp_path / "run") | wrong)
    assert (code, message in printed) == (2, True), printed
    assert not (tmp_path / "run").exists()


def test_a_missing_teacher_and_another_vocabulary_are_named(models: Path, tmp_path: Path) -> None:
    given = options(models, tmp_path / "run")
    code, printed = kldiv_train({name: value for name, value in given.items() if name != "--teacher"})
    assert (code, "for --teacher: missing; only --ce-weight 1, --teacher-cache and --recipe dft" in printed) == (
        2,
        True,
    ), printed
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(models / "teacher").save_pretrained(other)
    tokenizer = tiny.word_tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = content["model"]["vocab"]
    vocab["w7"], vocab["w8"] = vocab["w8"], vocab["w7"]
    tokenizer.save_pretrained(other)
    (other / "tokenizer.json").write_text(json.dumps(content))
    code, printed = kldiv_train(given | {"--teacher": str(other)})
    assert (code, "expected one vocabulary" in printed) == (2, True), printed


def test_a_folder_that_is_not_a_run_is_left_alone(models: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    code, printed = kldiv_train(options(models, tmp_path))
    assert (code, "is not empty, or choose another folder" in printed) == (2, True), printed
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
