"""`make gpu-check` on a machine without a GPU: what it says there, and that its harness works from end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_host.build import compiler

from kldiv_kernels.benchmarking import gpu_cases

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"
sys.path.insert(0, str(SCRIPT.parent))
import gpu_check_report  # noqa: E402
import gpu_check_tools  # noqa: E402
from gpu_check_steps import Runner  # noqa: E402

sys.path.remove(str(SCRIPT.parent))
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
    for word in ("examples:", "--quick", "--backends", "--steps", "gpu-check.json", "exit status"):
        assert word in done.stdout


def test_the_interpreter_is_not_mistaken_for_a_gpu() -> None:
    done = _check("--device", "cpu")
    assert done.returncode == 2
    assert "--device cpu needs --quick" in done.stderr


def test_a_step_without_time_is_no_pass(tmp_path: Path) -> None:
    done = _check("--device", "cpu", "--quick", "--minutes", "0.01", "--steps", "large", OUT=str(tmp_path))
    assert done.returncode == 1
    assert "no time was left" in done.stdout
    assert json.loads((tmp_path / "gpu-check.json").read_text())["ok"] is False


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
    steps = ("library", "clusters", "benchmark", "dram", "large", "barriers", "memory errors", "races", "tune")
    done = _check("--device", "cpu", "--quick", "--steps", *steps, OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu-check.json").read_text())
    assert report["ok"] is True
    assert report["versions"]["torch"] == torch.__version__
    assert report["backends"]["triton"] == "available"
    passed = ("large", "memory errors", "benchmark")
    assert [(step["name"], step["status"]) for step in report["steps"]] == [
        (name, "pass" if name in passed else "skip") for name in steps
    ]
    assert all("needs a GPU" in step["summary"] for step in report["steps"] if step["status"] == "skip")
    assert report["steps"][4]["details"]["passed_by_backend"] == {"triton": 2}
    rows = report["benchmark"]["rows"]
    cases = {case.name for case in gpu_cases.quick_cases()}
    assert len(cases) == 8
    for name in ("triton", "eager"):
        mine = [row for row in rows if row["implementation"] == name]
        assert {row["case"] for row in mine} == cases
        for row in mine:
            assert row["error"] is None
            assert row["agrees"] is True
            assert row["milliseconds"] > 0
    for target in report["benchmark"]["targets"]:
        assert target["met"] is target["share_met"] is None, "a CPU says nothing about a GPU"
    assert (tmp_path / "gpu-check.png").read_bytes().startswith(PNG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-check.json", "gpu-check.log", "gpu-check.png"]
    assert "forward_kl 2×67 (copying as much" in done.stdout


WITHOUT_MODULE = """
import runpy, sys
sys.modules["kldiv_kernels._C"] = None
sys.argv[:] = sys.argv[1:]
if sys.argv[0] == "-m":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


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
        ["-m", "kldiv_kernels.benchmarking.gpu_tune", "--help"],
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", "tests/gpu"],
    ],
    ids=["device", "benchmark", "memory errors", "tune", "tests"],
)
def test_pytorch_triton_and_pytest_are_enough(command: list[str], bare: Path) -> None:
    """In a Python that `_C` was not built for."""
    pytest.importorskip("triton")
    environment = {**os.environ, "KLDIV_TEST_DEVICE": "cpu", "KLDIV_TEST_QUICK": "1", "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(bare)))
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    # -S: no site-packages but those of the folder.
    done = subprocess.run(
        [sys.executable, "-S", "-c", WITHOUT_MODULE, *command], capture_output=True, text=True, check=False, cwd=ROOT,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


ON_THE_MODEL = """
import json, sys
sys.path[:0] = ["tests", "benchmarks"]
import os
import cuda_host
cuda_host.serve_cpu_tensors()
os.environ["KLDIV_GPU_BACKENDS"] = "cuda"
from pathlib import Path
import gpu_dram, gpu_library, gpu_memcheck
from kldiv_kernels.benchmarking import gpu, gpu_tune
gpu_library.ROWS = 3
print(json.dumps(gpu_library.check("cpu")))
sys.argv[1:] = ["cpu"]
gpu_memcheck.main()
gpu_tune.run(gpu_tune.quick_cases(), gpu.Device("cpu"), 60, Path(sys.argv[0] + "tune.json"))
gpu_dram.profiled = lambda work: work()
print(json.dumps(gpu_dram.run(gpu.quick_cases(), "cpu", "sm_90")))
rows = [row for case in gpu.quick_cases() for row in gpu.measure(case, gpu.Device("cpu"), 1, ["cuda", "eager"])]
print(json.dumps(rows))
"""


@pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
def test_what_runs_the_cuda_backend(tmp_path: Path) -> None:
    """On the host's model of a GPU: the library's check, the sanitizers' calls, the plans, the benchmark's cases."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv[0] = {str(tmp_path) + os.sep!r}\n{ON_THE_MODEL}"],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    errors, profiled, rows = (line for line in lines if line[0] in "[{")
    # Each plan is named before it runs.
    plans = [line.removeprefix("cuda ").removesuffix(" ...") for line in lines[: lines.index(errors)][::2]]
    assert plans == [
        "two-sweep, forward_kl, 3 × 8192", "cluster=1,stages=3, forward_kl, 3 × 8192",
        "cluster=8,stages=3, forward_kl, 3 × 151936", "cluster=16,stages=2, forward_kl, 3 × 262144",
        "as planned, logprob_entropy, 3 × 151936", "as planned, js, 3 × 151936",
    ]  # fmt: skip
    assert list(json.loads(errors)) == plans
    # Four clusters and two sweeps, two losses, two of a policy's and one of many labels; four calls of any backend.
    assert f"{5 * 5 + 4} calls with gradients" in lines
    assert lines[lines.index("29 calls with gradients") - 1] == "cuda two-sweep top-k ..."
    assert all(row["agrees"] and row["milliseconds"] for row in json.loads(rows))
    # 2 × 67 bfloat16: rows that short and odd are swept twice where there is a gradient.
    moved = {call["case"]: (call["floor_bytes"], call["planned"]) for call in json.loads(profiled)}
    assert moved["forward_kl"] == (3 * 268, 5 * 268)
    assert moved["forward_kl forward"] == (2 * 268, 2 * 268)
    assert moved["logprob_entropy"] == (2 * 268, 3 * 268)
    tuned = json.loads((tmp_path / "tune.json").read_text())["rows"]
    timed = [row["implementation"] for row in tuned if row["milliseconds"]]
    assert timed[:2] == ["cuda", "cuda two-sweep"]
    assert "cuda cluster=2,stages=3" in timed
    assert all(row["agrees"] for row in tuned if row["milliseconds"])
    assert all("KLDIV_CUDA_PLAN" in row["error"] for row in tuned if not row["milliseconds"])
    assert "cluster=2,stages=3 " in gpu_check_report.tune_lines({"rows": tuned})[0]


@pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
def test_the_tests_of_the_cuda_backend(tmp_path: Path) -> None:
    """Those of tests/gpu, in small sizes on the host's model of a GPU: a mistake in them would cost time on a card."""
    (tmp_path / "log").write_text("")
    small = {"KLDIV_TEST_DEVICE": "cpu", "KLDIV_TEST_QUICK": "1", "KLDIV_CUDA_HOST": "1"}
    files = [path.name for path in sorted((ROOT / "tests" / "gpu").glob("test_gpu_*.py"))]
    step = Runner(tmp_path / "log", small, print).tests("cuda", files, 1, 500, ["cuda"])
    assert step.status == "pass", step
    assert step.details["passed_by_backend"]["cuda"] >= 80


def test_the_program_that_counts_clusters(tmp_path: Path) -> None:
    """Compiled as on a GPU; without one it says what is missing."""
    if gpu_check_tools.find("nvcc") is None:
        pytest.skip("needs nvcc")
    step = gpu_check_tools.clusters(Runner(tmp_path / "log", {}, lambda text: None), "9.0", 120)
    if torch.cuda.is_available():
        assert step.status == "pass"
        return
    assert step.status == "fail"
    assert "cudaGetDevice" in step.summary, step
    assert gpu_check_tools.clusters(Runner(tmp_path / "log", {}, lambda text: None), "8.0", 1).status == "skip"
