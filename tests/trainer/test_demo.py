"""The demo with models of a few thousand parameters: what it leaves, and what a second call does."""

from __future__ import annotations

import io
import json
import shlex
import time
from pathlib import Path

import commands
import pytest
import tiny
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from pictures import unreadable
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from kldiv_kernels import cli
from kldiv_kernels.benchmarking import peers
from kldiv_kernels.benchmarking.cases import Case, Inputs
from kldiv_kernels.benchmarking.memory import PeakMemory
from kldiv_kernels.trainer import loss_cost, plots, run
from kldiv_kernels.trainer.demo import (
    Settings,
    Size,
    _report,
    next_commands,
    open_demo,
    run_demo,
    standard_library_text,
)

SMALL = Settings(
    steps=10, batch_size=2, block_size=32, vocab_size=300, characters_a_token=20, held_out_blocks=4,
    teacher=Size(32, 1, 2), student=Size(16, 1, 2),
)  # fmt: skip
STAGES = ("teacher", "student_distilled", "student_ce")


def demo(folder: Path, settings: Settings = SMALL, *, resume: bool = False) -> str:
    printed = io.StringIO()
    open_demo(folder, settings, resume=resume)
    run_demo(folder, settings, Console(file=printed, width=150))
    return printed.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo") / "demo"
    return folder, demo(folder)


def test_the_text_is_the_standard_librarys_own() -> None:
    text = dict(standard_library_text())
    assert {"json/__init__.py", "pydoc_data/topics.py", "argparse.py"} <= text.keys()
    assert "JSON" in text["json/__init__.py"]
    assert not any("site-packages" in name or name.startswith("test/") for name in text)


def test_the_demo_leaves_models_metrics_table_and_plots(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    table = (folder / "summary.md").read_text()
    for stage in STAGES:
        AutoModelForCausalLM.from_pretrained(folder / stage)
        assert AutoTokenizer.from_pretrained(folder / stage)("def f(x):")["input_ids"]
        mine = [entry for entry in entries if entry["stage"] == stage]
        steps = 25 if stage == "teacher" else SMALL.steps
        assert [entry["step"] for entry in mine if "loss" in entry] == list(range(1, steps + 1))
        reported = f"{[entry['eval_loss'] for entry in mine if 'eval_loss' in entry][-1]:.4f}"
        assert reported == f"{summary[stage]['held_out_loss']:.4f}"
        assert reported in table
        assert reported in printed
    for plot in ("loss_curves.png", "comparison.png", "teacher/loss.png"):
        assert (folder / plot).read_bytes().startswith(b"\x89PNG")
    assert summary["teacher"]["parameters"] > summary["student_ce"]["parameters"]
    assert summary["teacher"]["teacher_student_kl"] is None
    for name in ("student, distilled", "student, cross-entropy alone"):
        assert name in table
        assert name in printed


def test_the_summary_says_what_the_loss_costs(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    cost = json.loads((folder / "summary.json").read_text())["loss_cost"]
    assert (cost["rows"], cost["vocab"]) == (SMALL.batch_size * SMALL.block_size, SMALL.vocab_size)
    assert json.loads((folder / "summary.json").read_text())["student_distilled"]["fused_linear"] is True
    for name in ("kldiv_kernels", "eager"):
        assert 0 < cost[name]["loss_seconds"] < cost[name]["step_seconds"]
    assert cost["sentence"] == loss_cost.sentence(cost)
    assert cost["sentence"] in " ".join(printed.split())
    assert cost["sentence"] in (folder / "summary.md").read_text()


def test_the_table_fits_a_terminal_of_80_columns(finished: tuple[Path, str]) -> None:
    printed = io.StringIO()
    console = Console(file=printed, width=80)
    _report(finished[0], json.loads((finished[0] / "summary.json").read_text())["loss_cost"], console)
    rows = [line for line in printed.getvalue().splitlines() if line.startswith("│")]
    assert rows
    assert all(line.endswith("│") and "…" not in line for line in rows)


def test_the_cost_of_each_loss_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    built = peers.build

    def slow_eager(name: str, case: Case) -> peers.Loss:
        loss = built(name, case)

        def slow(inputs: Inputs) -> torch.Tensor:
            time.sleep(0.2 if name == "eager" else 0)
            return loss(inputs)

        return slow

    monkeypatch.setattr(loss_cost.peers, "build", slow_eager)
    memory = {"kldiv_kernels": PeakMemory(10_000_000), "eager": PeakMemory(50_000_000)}
    monkeypatch.setattr(loss_cost, "measure_in_subprocess", lambda case, name, threads: memory[name])
    student, teacher = tiny.llama(0), tiny.llama(1)
    before = [x.detach().clone() for x in student.parameters()]
    cost = loss_cost.measure(student, teacher, torch.arange(10).view(2, 5))
    assert cost["eager"]["loss_seconds"] > 0.2 > cost["kldiv_kernels"]["loss_seconds"]
    assert any(not torch.equal(x, y) for x, y in zip(student.parameters(), before, strict=True)), "it takes steps"
    assert all(x.grad is None for x in teacher.parameters())


def test_the_sentence_on_cost() -> None:
    ours = {"loss_seconds": 0.02, "step_seconds": 0.5, "extra_bytes": 17_000_000}
    eager = {"loss_seconds": 0.3, "step_seconds": 1.2, "extra_bytes": 101_000_000}
    text = loss_cost.sentence({"kldiv_kernels": ours, "eager": eager})
    assert text == (
        "Logits, loss and gradients took 4.0% of a training step (20.0 of 500.0 ms) with kldiv_kernels, and 25.0% of a "
        "training step (300.0 of 1,200.0 ms) with plain PyTorch. Beyond hidden states and weights they needed 17 MB "
        "and 101 MB of memory."
    )
    unknown = loss_cost.sentence({"kldiv_kernels": ours, "eager": {**eager, "extra_bytes": None}})
    assert unknown.endswith("plain PyTorch.")


def test_everything_in_the_plots_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    names = ("teacher", "student, distilled", "student, cross-entropy alone")
    ends = ((3.8875, None), (4.1737, 0.2009), (4.4903, 0.5725))
    # Long before the end, and before the first step, where all are far away.
    histories = {
        name: [
            {"step": step, "eval_loss": 8.3 - (8.3 - loss) * step / 400, **({} if kl is None else {"eval_kl": kl})}
            for step in (0, 300, 400)
        ]
        for name, (loss, kl) in zip(names, ends, strict=True)
    }
    finals = {
        name: {"held-out cross-entropy": loss, "KL(teacher ∥ student)": kl}
        for name, (loss, kl) in zip(names, ends, strict=True)
    }
    plots.plot_comparison(Path(), histories)
    plots.plot_final(Path(), finals)
    plots.plot_run(Path(), histories["student, distilled"], title="student_distilled")
    for figure in drawn:
        assert unreadable(figure) == []
    curves, bars = drawn[0].axes, drawn[1].axes
    assert curves[0].get_ylim()[1] < 8, "the untrained models would hide the gap"
    assert bars[0].get_xlim()[0] > 3
    assert bars[1].get_xlim()[0] == 0, "these differ by far more than a fifth"
    assert [to_hex(line.get_color()) for line in curves[0].lines] == [
        to_hex(x.get_facecolor()) for x in bars[0].patches
    ]
    # The teacher has no KL to itself, and the students keep their colours without it.
    assert [to_hex(line.get_color()) for line in curves[1].lines] == [
        to_hex(x.get_facecolor()) for x in bars[1].patches
    ]
    assert [to_hex(x.get_facecolor()) for x in bars[0].patches][1:] == [
        to_hex(x.get_facecolor()) for x in bars[1].patches
    ]


def test_both_students_start_from_the_same_weights_and_learn_differently(finished: tuple[Path, str]) -> None:
    starts, ends = {}, {}
    for stage in STAGES[1:]:
        lines = (finished[0] / stage / "metrics.jsonl").read_text().splitlines()
        values = [(e["eval_loss"], e["eval_kl"]) for e in map(json.loads, lines) if "eval_loss" in e]
        starts[stage], ends[stage] = values[0], values[-1]
    assert starts["student_distilled"] == starts["student_ce"]
    assert ends["student_distilled"] != ends["student_ce"]


def test_the_commands_to_try_next_are_printed_and_run(
    finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands.stay_offline(monkeypatch)
    text = tmp_path / "text.txt"
    text.write_text("def add(a, b):\n    return a + b\n" * 100)
    tried = next_commands(finished[0], SMALL)
    assert len(tried) == 4
    for command in tried:
        assert f"  {command}\n" in finished[1]
        program, *words = shlex.split(command)
        assert program == "kldiv"
        if "--data" in words:
            data = words.index("--data") + 1
            assert Path(words[data]).is_file()
            if words[data].endswith(".py"):
                words[data] = str(text)
        if "--steps" in words:
            words += ["--steps", "2"]
        code, printed = commands.invoke(cli.app, *words)
        assert code == 0, printed


def test_resume_skips_finished_stages_and_finishes_the_others(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    before = json.loads((folder / "summary.json").read_text())
    (folder / "student_ce" / run.SUMMARY).unlink()
    untouched = (folder / "student_distilled" / "model.safetensors").stat().st_mtime_ns
    assert demo(folder, resume=True).count("finished before") == 2
    assert (folder / "student_distilled" / "model.safetensors").stat().st_mtime_ns == untouched
    assert json.loads((folder / "summary.json").read_text()) == before


def test_other_settings_and_other_folders_are_refused_and_an_old_demo_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    open_demo(folder, SMALL, resume=False)
    with pytest.raises(ValueError, match="--resume: --demo"):
        open_demo(folder, Settings(steps=11), resume=True)
    (folder / "teacher").mkdir()
    open_demo(folder, Settings(steps=11), resume=False)
    assert not (folder / "teacher").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"--output: .* is not empty"):
        open_demo(mine, SMALL, resume=False)
    assert (mine / "notes.txt").exists()
