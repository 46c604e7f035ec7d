"""The README is true: its code runs, its commands exist and run, its table of statistics is the registry."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import tiny
import torch
import triton_aot
from typer.testing import CliRunner

from kldiv_kernels.cli import app
from kldiv_kernels.divergences import Statistic
from kldiv_kernels.registry import STATISTICS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```console\n(.*?)```", README, re.S) for line in block.splitlines()]
# Run by .ci/run, by tests/building/test_packaging.py and by tests/gpu_check/test_gpu_check.py.
ELSEWHERE = ("make demo", "make test", "make gpu-check", "pip install ")
# The README's runs are long or need the demo's models: the same commands on small data.
SMALLER = {
    "bench": "--rows 2 --vocab 1000 --kinds forward_kl --dtypes fp32 --peers none --repeats 1 --no-memory",
    "train grpo": "--steps 2 --warm-up-steps 2 --batch-size 2 --group-size 2",
    "train distill": "--steps 2 --batch-size 2",
    "train": "--steps 2 --batch-size 2 --block-size 16",
    "cache-teacher": "--batch-size 2 --block-size 16",
}


def row_of(statistic: Statistic) -> str:
    uses = [name for name in ("alpha", "beta") if getattr(statistic, name) is not None]
    loss = "loss" if statistic.is_divergence else ""
    return f"| `{statistic.name}` | {statistic.formula.replace('|', '∣')} | {', '.join(uses)} | {loss} |"


@pytest.mark.parametrize("name", [name for name, statistic in STATISTICS.items() if statistic.builtin])
def test_the_table_has_the_statistic(name: str) -> None:
    assert row_of(STATISTICS[name]) in README


def test_the_table_of_compiled_kernels() -> None:
    resources = json.loads((ROOT / "benchmarks/triton_resources.json").read_text())
    assert f"with Triton {resources['triton']}:" in README
    most = max(spilled for _, _, spilled, _ in triton_aot.cells(resources))
    assert f"the most that any kernel spills is {most} bytes" in README
    for name in ("forward_kl", "js"):
        for kernel in resources["kernels"]:
            if name in kernel["statistics"] and kernel["kernel"] not in ("finish_kernel", "scale_kernel"):
                row = " | ".join(f"{registers} · {programs}" for registers, _, _, programs in kernel["bf16"].values())
                assert f"| {name} | `{kernel['kernel']}` | {row} |" in README


def test_the_table_of_compiled_cuda_kernels() -> None:
    resources = json.loads((ROOT / "benchmarks/cuda_resources.json").read_text())
    assert f"Compiled with nvcc {resources['nvcc']}:" in README
    targets = [name for name in resources["kernels"][0] if name.startswith("sm_")]
    assert f"| | {' | '.join(targets)} |" in README
    cells = [kernel[target] for kernel in resources["kernels"] for target in targets if kernel.get(target)]
    assert not any(any(cell[1:4]) for cell in cells), "README says that no kernel spills or has a stack"
    shown = 0
    for kernel in resources["kernels"]:
        numbers = " | ".join(str(kernel[target][0]) if kernel.get(target) else "" for target in targets)
        name = kernel["kernel"].removesuffix(" bfloat16")
        if f"| `{name}` |" in README:
            assert f"| `{name}` | {numbers} |" in README
            shown += 1
    assert shown >= 6


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 3
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    student = names["student"]
    assert isinstance(student, torch.Tensor)
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("command", [line for line in COMMANDS if not line.startswith(ELSEWHERE)])
def test_the_command_runs(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *options = shlex.split(command)
    assert program == "kldiv"
    smaller = next((smaller for name, smaller in SMALLER.items() if f"{command} ".startswith(f"kldiv {name} ")), "")
    for model, seed in (("student_ce", 1), ("teacher", 2)):
        tiny.llama(seed).save_pretrained(tmp_path / "runs/demo" / model)
        tiny.word_tokenizer().save_pretrained(tmp_path / "runs/demo" / model)
    (tmp_path / "README.md").write_text(tiny.words(2000))
    monkeypatch.chdir(tmp_path)
    if "--teacher-cache runs/teacher_cache" in command:
        (first,) = [line for line in COMMANDS if line.endswith("--output runs/teacher_cache")]
        CliRunner().invoke(app, [*shlex.split(first)[1:], *SMALLER["cache-teacher"].split()])
    result = CliRunner().invoke(app, [*options, *smaller.split()])
    assert result.exit_code == 0, result.output


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    wanted = [line.split()[1] for line in COMMANDS if line.startswith("make ")]
    assert sorted(wanted) == ["demo", "gpu-check", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in wanted)
