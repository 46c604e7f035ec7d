"""The command line: what it prints, and that bad input is an error of its option, without a traceback."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import kldiv_kernels as kk
from kldiv_kernels import cli
from kldiv_kernels.benchmarking import peers, report
from kldiv_kernels.cli import doctor
from kldiv_kernels.extras import OPTIONAL

SMALL = ("--rows", "3", "--vocab", "64", "--repeats", "2")


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich wraps to the terminal's width; a wide one keeps each message on one line."""
    monkeypatch.setenv("COLUMNS", "300")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "300"})


@pytest.mark.parametrize(
    "command",
    ["doctor", "plan", "bench", "recipes", "train", "train distill", "train opd", "train grpo", "train preference",
     "demo", "cache-teacher"],
)  # fmt: skip
def test_help_has_examples(command: str) -> None:
    result = invoke(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"$ kldiv {command}" in result.output


@pytest.mark.parametrize(
    ("arguments", "option", "message"),
    [
        (("plan", "--rows", "0", "--vocab", "8"), "--rows", "0; expected an integer of at least 1"),
        (("plan", "--rows", "8", "--vocab", "-1"), "--vocab", "-1; expected an integer of at least 1"),
        (("plan", "--rows", "8", "--vocab", "8", "--dtype", "int8"), "--dtype", "'int8' is no dtype"),
        (
            ("plan", "--rows", "8", "--vocab", "8", "--device", "H200"),
            "--device",
            "'H200'; expected 'cpu', a CUDA device",
        ),
        (("plan", "--rows", "8", "--vocab", "8", "--kind", "helinger"), "--kind", "did you mean hellinger"),
        (("plan", "--rows", "8", "--vocab", "8", "--stats", "entropi"), "--stats", "did you mean entropy"),
        (("bench", "--rows", "0"), "--rows", "0; expected at least 1"),
        (("recipes", "vodp"), "NAME", "no method is called 'vodp'; did you mean vOPD?"),
        (("recipes", "1000"), "NAME", "there is no paper 1000"),
        (("recipes", "--family", "credits"), "--family", "'credits'; expected None, distillation"),
        (("recipes", "vopd", "--family", "token_credit"), "--family", "pass one of them"),
        (("bench", "--kinds", "forward_lk"), "--kinds", "did you mean forward_kl"),
        (("bench", "--kinds", ","), "--kinds", "no case"),
        (("bench", "--dtypes", "bf16,fp8"), "--dtypes", "'fp8' is no dtype"),
        (("bench", "--peers", "eager,jax"), "--peers", "unknown jax; expected none or eager, compile, trl"),
        (("bench", "--output", "/dev/null/bench"), "--output", "Not a directory"),
        (("bench", "--repeats", "0"), "--repeats", "1"),
    ],
)
def test_bad_input_is_an_error_of_its_option(arguments: tuple[str, ...], option: str, message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Invalid value for" in result.output
    assert option in result.output
    assert message in result.output
    assert "Traceback" not in result.output


def test_recipes_are_listed_and_told_one_by_one() -> None:
    # As narrow as terminals are: names are to be copied.
    listed = CliRunner().invoke(cli.app, ["recipes"], env={"COLUMNS": "80"})
    assert "…" not in listed.output
    assert listed.exit_code == 0, listed.output
    for recipe in kk.recipes.listing():
        assert all(name in listed.output for name in recipe.functions)
        one = invoke("recipes", str(recipe.paper))
        assert one.exit_code == 0, one.output
        assert recipe.title in one.output
        for name in recipe.functions:
            function = getattr(kk.recipes, name)
            assert f"kk.recipes.{name}(" in one.output
            assert all(parameter in one.output for parameter in inspect.signature(function).parameters)
            assert ">>> " in one.output
    family = invoke("recipes", "--family", "token_credit")
    assert "dgpo_weights" in family.output
    assert "vopd_loss" not in family.output
    record = json.loads(invoke("recipes", "vopd", "--json").output)
    assert record["paper"] == 3
    assert [r["paper"] for r in json.loads(invoke("recipes", "--json").output)] == sorted(kk.recipes.RECIPES)


def test_plan_shows_what_the_api_says() -> None:
    result = invoke("plan", "--rows", "4", "--vocab", "1000", "--dtype", "fp32", "--kind", "js")
    expected = kk.plan(rows=4, vocab=1000, dtype=torch.float32, kind="js")
    assert result.exit_code == 0, result.output
    assert f"{expected.bytes:,}" in result.output
    assert expected.kernel in result.output


def test_plan_of_a_gpu_that_is_not_here() -> None:
    result = invoke("plan", "--rows", "8192", "--vocab", "151936", "--kind", "reverse_kl", "--device", "sm_90")
    assert result.exit_code == 0, result.output
    expected = kk.plan(rows=8192, vocab=151_936, kind="reverse_kl", device="sm_90")
    for value in (expected.kernel, expected.reason, str(expected.cluster), str(expected.shared_memory)):
        assert value in result.output


def test_plan_of_statistics_without_gradient() -> None:
    result = invoke("plan", "--rows", "4", "--vocab", "1000", "--stats", "logprob, entropy", "--no-gradient")
    assert result.exit_code == 0, result.output
    assert f"{4 * 1000 * 2:,}" in result.output


def test_doctor_names_every_backend_and_optional_package() -> None:
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    for name in (*kk.backends(), *OPTIONAL, "Python", "PyTorch", "threads", "C++ compiler"):
        assert name in result.output


def test_doctor_says_how_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "backends", lambda: {"cpu": "it was not built; run: pip install ."})
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor.native, "load", lambda: "it was not built; run: pip install .")
    found = {check.name: check for check in doctor.checks()}
    for name in ("backend cpu", "compiled part", "C++ compiler", *OPTIONAL):
        assert found[name].status == "missing"
        assert found[name].hint
    assert found["backend cpu"].detail == "it was not built"
    assert found["backend cpu"].hint == "run: pip install ."
    assert "g++" in found["C++ compiler"].hint
    assert found["transformers"].hint == "pip install kldiv_kernels[train]"


def run_without(missing: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`kldiv` in a process where `missing` cannot be imported."""
    program = f"import sys; sys.modules[{missing!r}] = None; sys.argv[0] = 'kldiv'\n"
    program += "from kldiv_kernels.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, "COLUMNS": "300"},
    )  # fmt: skip


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_doctor_needs_no_extra(missing: str) -> None:
    done = run_without(missing, "doctor")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[1]: line for line in done.stdout.splitlines()}
    assert lines["kldiv_kernels"].startswith("ok")
    assert lines[missing].startswith("missing")
    assert f"pip install kldiv_kernels[{OPTIONAL[missing].extra}]" in lines[missing]


@pytest.mark.parametrize(
    ("missing", "extra", "arguments"),
    [
        ("typer", "cli", ("plan", "--rows", "2", "--vocab", "8")),
        ("rich", "cli", ("plan", "--rows", "2", "--vocab", "8")),
        ("transformers", "train", ("demo", "--output", "{folder}/demo")),
        ("matplotlib", "cli", ("bench", "--rows", "2", "--output", "{folder}/bench")),
    ],
)
def test_a_missing_extra_is_one_line(missing: str, extra: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = run_without(missing, *(argument.format(folder=tmp_path) for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"kldiv: {missing} is not installed; run: pip install kldiv_kernels[{extra}]\n"


@pytest.mark.parametrize(
    ("missing", "program", "where"),
    [
        ("transformers", "from kldiv_kernels.trainer import DistillationTrainer", "kldiv_kernels.trainer"),
        ("safetensors", "import kldiv_kernels.teacher_cache", "kldiv_kernels.teacher_cache"),
        ("numpy", "import kldiv_kernels.teacher_cache", "kldiv_kernels.teacher_cache"),
    ],
)
def test_a_missing_extra_in_a_program_says_the_same(missing: str, program: str, where: str) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None\n{program}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    sentence = f"{where}: {missing} is not installed; run: pip install kldiv_kernels[{OPTIONAL[missing].extra}]"
    assert done.stderr.splitlines()[-1] == f"ModuleNotFoundError: {sentence}"


def test_help_version_and_a_typo_answer_without_pytorch() -> None:
    """Which takes seconds to import."""
    for arguments, code, said in (
        (["--help"], 0, "doctor"),
        (["--version"], 0, f"kldiv {kk.__version__}\n"),
        (["train", "distill", "--help"], 0, "--student"),
        (["trian"], 2, "Did you mean 'train'?"),
    ):
        done = run_without("torch", *arguments)
        assert done.returncode == code, done.stderr
        assert said in done.stdout + done.stderr


def test_plan_needs_no_extra_of_training() -> None:
    done = run_without("transformers", "plan", "--rows", "2", "--vocab", "8")
    assert done.returncode == 0, done.stderr


def test_bench_writes_results_and_plot(tmp_path: Path) -> None:
    output = tmp_path / "bench"
    result = invoke(
        "bench", *SMALL, "--kinds", "forward_kl,js,logprob_entropy", "--dtypes", "fp32", "--peers", "eager",
        "--no-memory", "--output", str(output),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in output.iterdir()) == ["results.json", "times.png"]
    assert (output / "times.png").read_bytes().startswith(b"\x89PNG")
    assert report.EXPLANATION in " ".join(result.output.split())
    record = json.loads((output / "results.json").read_text())
    assert [case["kind"] for case in record["cases"]] == ["forward_kl", "js", "logprob_entropy"]
    for case, units in zip(record["cases"], (3, 3, 2), strict=True):
        ours, *_, eager = case["implementations"]
        assert case["floor_bytes"] == units * 3 * 64 * 4
        assert case["targets"] == []  # the project promises nothing at this shape
        assert (ours["name"], eager["name"]) == (peers.OURS, "eager")
        assert ours["loss"] == pytest.approx(eager["loss"], rel=1e-5)
        assert len(ours["all_seconds"]) == 2
        assert eager["ours_is_faster_by"] == pytest.approx(eager["seconds"] / ours["seconds"])


def test_bench_reports_a_peer_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(*arguments: object, **options: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(peers.torch, "compile", compiled)
    result = invoke(
        "bench", *SMALL, "--kinds", "forward_kl", "--dtypes", "bf16", "--peers", "compile", "--no-memory",
        "--output", str(tmp_path),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "forward_kl bf16, compile: RuntimeError: no compiler" in result.output
    case = json.loads((tmp_path / "results.json").read_text())["cases"][0]
    assert case["implementations"][-1] == {"name": "compile", "error": "RuntimeError: no compiler"}
