"""`make gpu-check` on a machine without a GPU: what it says there, and that its harness works from end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kldiv_kernels.benchmarking import gpu_cases

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"
PNG = b"\x89PNG"
# What a machine with a GPU need not have: packages as they are called in site-packages.
EXTRAS = ("rich", "typer", "matplotlib", "hypothesis", "_hypothesis", "transformers", "accelerate", "datasets", "trl",
          "pandas", "pytest_benchmark", "pybind11", "ninja", "scipy")  # fmt: skip


def _check(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("KLDIV_", "TRITON_"))}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False,
        env={**environment, **variables},
    )  # fmt: skip


def test_help_has_examples() -> None:
    done = _check("--help")
    assert done.returncode == 0
    for word in ("examples:", "--quick", "gpu-check.json", "exit status"):
        assert word in done.stdout


def test_the_interpreter_is_not_mistaken_for_a_gpu() -> None:
    done = _check("--device", "cpu")
    assert done.returncode == 2
    assert "--device cpu needs --quick" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = _check("--steps", "large", OUT=str(tmp_path / "out"))
    assert done.returncode == 2
    assert "gpu-check: PyTorch" in done.stderr
    assert "GPU" in done.stderr or "CPUs alone" in done.stderr
    report = json.loads((tmp_path / "out" / "gpu-check.json").read_text())
    assert report["error"]
    assert report["steps"] == []


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    # -S: without site-packages there is no PyTorch, as in an interpreter that has none of it.
    done = subprocess.run(
        [sys.executable, "-S", str(SCRIPT), "--output", str(tmp_path)], capture_output=True, text=True, check=False,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "pip install torch triton numpy pytest" in done.stderr


def test_the_harness_in_the_interpreter(tmp_path: Path) -> None:
    """Two steps of tests' kind, the benchmark, the report and the plot; times and sizes mean nothing here."""
    pytest.importorskip("triton")
    done = _check("--device", "cpu", "--quick", "--steps", "large", "memory errors", "benchmark", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu-check.json").read_text())
    assert report["ok"] is True
    assert report["versions"]["torch"] == torch.__version__
    assert report["backends"]["triton"] == "available"
    assert [(step["name"], step["status"]) for step in report["steps"]] == [
        ("large", "pass"), ("memory errors", "pass"), ("benchmark", "pass"),
    ]  # fmt: skip
    assert report["steps"][0]["details"]["passed"] == 2
    rows = report["benchmark"]["rows"]
    cases = {"forward_kl", "logprob_entropy", "logprob_entropy forward"}
    for name in ("triton", "eager"):
        mine = [row for row in rows if row["implementation"] == name]
        assert {row["case"] for row in mine} == cases
        for row in mine:
            assert row["error"] is None
            assert row["agrees"] is True
            assert row["milliseconds"] > 0
    assert all(target["met"] is None for target in report["benchmark"]["targets"]), "a CPU says nothing about a GPU"
    assert (tmp_path / "gpu-check.png").read_bytes().startswith(PNG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-check.json", "gpu-check.log", "gpu-check.png"]
    assert "forward_kl 2×67: triton" in done.stdout


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages of this interpreter's site-packages, without the extras."""
    folder = tmp_path_factory.mktemp("bare")
    for path in Path(pytest.__file__).parent.parent.iterdir():
        if not path.name.lower().startswith(EXTRAS):
            (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "kldiv_kernels.benchmarking.gpu_device", "cpu"],
        ["-m", "kldiv_kernels.benchmarking.gpu", "--help"],
        ["benchmarks/gpu_memcheck.py", "cpu"],
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", "tests/gpu"],
    ],
    ids=["device", "benchmark", "memory errors", "tests"],
)
def test_pytorch_triton_and_pytest_are_enough(command: list[str], bare: Path) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "KLDIV_TEST_DEVICE": "cpu", "KLDIV_TEST_QUICK": "1", "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(bare)))
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    # -S: no site-packages but those of the folder.
    done = subprocess.run(
        [sys.executable, "-S", *command], capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    ("body", "status", "summary"),
    [
        ("def test_a(): pass\ndef test_b(): pass", "pass", "2 tests, 2 passed"),
        ("def test_a(): pass\ndef test_b(): assert 1 == 2, 'broken'", "fail", "1 failed"),
        ("import time\ndef test_a(): pass\ndef test_b(): time.sleep(60)", "fail", "1 of 2 tests, 1 passed"),
        ("import os\ndef test_a(): os._exit(3)", "fail", "0 of 1 tests"),
        ("import nowhere", "fail", "1 failed"),
        ("import pytest\npytest.skip('needs a GPU', allow_module_level=True)", "skip", "needs a GPU"),
    ],
    ids=["passes", "fails", "hangs", "dies", "does not import", "skips"],
)
def test_what_becomes_of_a_step(body: str, status: str, summary: str, tmp_path: Path) -> None:
    """A step passes only if every test that was collected ran and none failed, also when its process is killed."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        from gpu_check_steps import Runner
    finally:
        sys.path.remove(str(SCRIPT.parent))
    # The conftest of tests/gpu writes the results; the file stands beside a copy of it.
    folder = tmp_path / "tests" / "gpu"
    folder.mkdir(parents=True)
    (folder / "conftest.py").write_text((ROOT / "tests" / "gpu" / "conftest.py").read_text())
    (folder / "test_this.py").write_text(body)
    runner = Runner(tmp_path / "log", {}, lambda text: None, root=tmp_path)
    (tmp_path / "log").write_text("")
    step = runner.tests("this", ["test_this.py"], shards=2 if status == "pass" else 1, limit=8)
    assert step.status == status, step
    assert summary in step.summary
    if "broken" in body:
        assert "broken" in step.details["failed"][0]["message"]


def _row(implementation: str, milliseconds: float | None, **case: object) -> dict[str, object]:
    shape = {"kind": "logprob_entropy", "gradient": False, "rows": gpu_cases.ROWS, "vocab": gpu_cases.VOCAB}
    return {"implementation": implementation, "milliseconds": milliseconds, **shape, **case}


def test_targets_are_about_the_best_of_ours_on_the_promised_gpu() -> None:
    rows = [_row("triton", 0.9), _row("cuda", 0.6), _row("trl", 0.61), _row("eager", 0.1), _row("liger", None)]
    other_shape = [_row("triton", 0.9, vocab=32_000), _row("trl", 0.5, vocab=32_000)]

    def verdicts(measured: list[dict[str, object]], device: str) -> list[object]:
        return [target["met"] for target in gpu_cases.targets(measured, ["triton", "cuda"], device)]

    assert verdicts(rows, "NVIDIA H200") == [True, None, None, None, True]
    assert verdicts(rows, "NVIDIA A100") == [None, None, None, None, True]
    assert verdicts([*rows, *other_shape], "NVIDIA H200")[-1] is False
    assert verdicts(rows[:1], "NVIDIA H200") == [False, None, None, None, None]


def test_the_floor_of_a_case() -> None:
    units = {case.name: case.floor_units for case in gpu_cases.cases()}
    assert units["forward_kl"] == units["js"] == 3
    assert (units["logprob_entropy"], units["logprob_entropy forward"]) == (2, 1)
    assert gpu_cases.GpuCase("js", 4, 10).floor_bytes == 3 * 4 * 10 * 2
    assert len(set(gpu_cases.cases())) == len(gpu_cases.cases())
