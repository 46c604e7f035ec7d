"""The demo with models of a few thousand parameters: what it leaves, and what a second call does."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path

import commands
import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from kldiv_kernels import cli
from kldiv_kernels.trainer import run
from kldiv_kernels.trainer.demo import Settings, Size, next_commands, open_demo, run_demo, standard_library_text

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
    assert len(tried) == 3
    for command in tried:
        assert f"  {command}\n" in finished[1]
        program, *words = shlex.split(command)
        assert program == "kldiv"
        if "--data" in words:
            data = words.index("--data") + 1
            assert Path(words[data]).is_file()
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
