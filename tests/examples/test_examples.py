"""The examples run as examples/README.md says, without network, and what they train gets better."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
README = (EXAMPLES / "README.md").read_text()
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py") if path.stem != "tiny_models")
IN_TABLE = re.findall(r"^\| .* \| `(.+)` \|$", README, re.M)
IN_BLOCKS = [line for block in re.findall(r"```console\n(.*?)```", README, re.S) for line in block.splitlines()]
COMMANDS = [*IN_TABLE, *(line for line in IN_BLOCKS if not line.startswith("pip install"))]
# Fewer steps than a user's run, enough for a difference in the printed digits.
SMALLER = {
    "plain_loop": "--steps 5 --learning-rate 1e-2",
    "transformers_trainer": "--steps 5",
    "trl_gkd": "--steps 5",
    "trl_grpo": "--steps 10 --learning-rate 2e-2",
    "cached_teacher": "--steps 5 --learning-rate 1e-2 --data my.txt",
    "own_divergence": "--steps 5",
    "tensor_parallel": "--steps 5",
}


def load(path: Path) -> Any:
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def run(command: str, folder: Path, more: str, examples: Path) -> str:
    """What the command prints, run in `folder`. It has to succeed."""
    words = [*shlex.split(command), *shlex.split(more)]
    settings = [words.pop(0) for word in list(words) if re.match(r"[A-Z_]+=", word)]
    start = next(i for i, word in enumerate(words) if word.startswith("examples/"))
    launcher = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}[words[0]] + words[1:start]
    script = examples / words[start].removeprefix("examples/")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("KLDIV_", "TRITON_"))}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    environment |= dict(setting.split("=", 1) for setting in settings)
    done = subprocess.run(
        [sys.executable, *launcher, str(script), *words[start + 1 :]],
        cwd=folder, env=environment, text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def before_and_after(printed: str) -> tuple[float, float]:
    (found,) = re.findall(r"([\d.]+) before, ([\d.]+) after$", printed, re.M)
    return float(found[0]), float(found[1])


@pytest.fixture(scope="module")
def users_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of a student and a teacher, and a text."""
    folder = tmp_path_factory.mktemp("user")
    for name, made in zip(("student", "teacher"), load(EXAMPLES / "tiny_models.py").make_tiny_models(), strict=True):
        shutil.move(made, folder / "models" / name)
    (folder / "my.txt").write_text("\n".join(f"{a} and {b} are {a + b}." for a in range(15) for b in range(15)))
    return folder


def test_the_table_has_every_script() -> None:
    assert sorted(command.split()[-1] for command in IN_TABLE) == [f"examples/{path.name}" for path in SCRIPTS]
    assert len(IN_TABLE) == 7


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_the_commands_run(path: Path, users_folder: Path, tmp_path: Path) -> None:
    """In the README's order: the last one of cached_teacher reads what the one before it wrote."""
    shutil.copy(path, tmp_path)
    for command in COMMANDS:
        if f"examples/{path.name}" not in command:
            continue
        smaller = SMALLER[path.stem]
        if "TRITON_INTERPRET" in command:
            smaller = "--steps 1 --block-size 4"
        # With models of the user's a script is to run alone, copied from its folder.
        printed = run(command, users_folder, smaller, examples=tmp_path if "models/" in command else EXAMPLES)
        before, after = before_and_after(printed)
        if path.stem == "tensor_parallel":
            # The same numbers from whole rows, in one process.
            alone = command.replace("--nproc-per-node 2", "--nproc-per-node 1")
            assert printed == run(alone, users_folder, f"{smaller} --tensor-parallel 1", examples=EXAMPLES)
        if path.stem == "trl_grpo":
            assert after > before + 0.05
        else:
            assert 0 < after < before
        if path.stem == "own_divergence":
            assert f"backend {'triton' if 'TRITON_INTERPRET' in command else 'reference'};" in printed


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help_and_size(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(path.read_text().splitlines()) <= 80
    module = load(path)
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert module.__doc__.strip() in printed
    assert all(action.help for action in module.parser._actions)
    commands = [line for line in module.__doc__.splitlines() if " examples/" in line]
    assert commands
    for command in commands:
        words = shlex.split(command, comments=True)
        module.parser.parse_args(words[words.index(f"examples/{path.name}") + 1 :])


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.stem != "trl_grpo"], ids=lambda path: path.stem)
def test_a_student_without_a_teacher(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load(path)
    monkeypatch.setattr(sys, "argv", [path.name, "--student", "models/student"])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 2
    assert "give both --student and --teacher, or neither" in capsys.readouterr().err
