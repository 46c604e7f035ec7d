"""`kldiv train distill` under torchrun: two ranks make the run that one process makes of the same batches."""

from __future__ import annotations

import json
from pathlib import Path

import commands
import pytest
import tiny
from command_ranks import under_torchrun
from transformers import AutoModelForCausalLM

from kldiv_kernels.trainer.command import distill

STEPS = 3


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    commands.stay_offline(monkeypatch)


def _given(models: Path, output: Path, batch_size: int) -> dict[str, str]:
    return {
        "--student": str(models / "student"), "--teacher": str(models / "teacher"), "--output": str(output),
        "--data": str(models / "text.txt"), "--ce-weight": "0.3", "--block-size": "16", "--held-out": "0.1",
        "--steps": str(STEPS), "--batch-size": str(batch_size), "--lr": "1e-3", "--log-every": "1",
    }  # fmt: skip


def test_two_ranks_make_the_run_of_one_process(tmp_path: Path) -> None:
    models = tiny.pair(tmp_path)
    found = under_torchrun(distill, 2, _given(models, tmp_path / "ranks", 2))
    assert [code for code, _ in found] == [0, 0], found
    assert ["loss" in printed for _, printed in found] == [True, False], "one rank prints"
    assert commands.run(distill, _given(models, tmp_path / "alone", 4))[0] == 0

    def losses(run: str) -> list[float]:
        lines = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]

    assert len(losses("alone")) == STEPS
    assert losses("ranks") == pytest.approx(losses("alone"), rel=1e-4)
    summaries = [json.loads((tmp_path / run / "summary.json").read_text()) for run in ("ranks", "alone")]
    for name in ("steps", "tokens", "held_out_loss", "teacher_student_kl"):
        assert summaries[0][name] == pytest.approx(summaries[1][name], rel=1e-4), name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ranks").num_parameters() == summaries[1]["parameters"]
