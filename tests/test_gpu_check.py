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

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"
sys.path.insert(0, str(SCRIPT.parent))
import gpu_check_report  # noqa: E402
import gpu_check_tools  # noqa: E402
from gpu_check_steps import Runner, Step  # noqa: E402

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
    for word in ("examples:", "--quick", "gpu-check.json", "exit status"):
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
    steps = ("library", "large", "memory errors", "races", "clusters", "dram", "benchmark", "tune")
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
    assert report["steps"][1]["details"]["passed"] == 2
    rows = report["benchmark"]["rows"]
    cases = {case.name for case in gpu_cases.quick_cases()}
    assert len(cases) == 7
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


FAKED = """
import sys
import kldiv_kernels as kk
import pytest
import torch
torch.cuda.is_available = lambda: True
kk.backends = lambda: {"cpu": "available", "new": "available", "cuda": "there is none", "reference": "available"}
sys.exit(pytest.main(["-p", "no:cacheprovider", "--collect-only", *sys.argv[1:]]))
"""


def _collected(*arguments: str, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("KLDIV_", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, "-c", FAKED, *arguments], capture_output=True, text=True, check=False, cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **variables},
    )  # fmt: skip
    return done.stdout + done.stderr


def test_on_a_gpu_every_available_backend_is_tested() -> None:
    """Whatever its name: the tests take what the library calls available, and a file that takes none says why."""
    files = [str(path) for path in sorted((ROOT / "tests" / "gpu").glob("test_gpu_*.py"))]
    found = _collected("-q", *files)
    counts = dict(line.rsplit(": ", 1) for line in found.splitlines() if line.startswith("tests/gpu/"))
    assert len(counts) == len(files) >= 9, found
    of_one = _collected("tests/gpu/test_gpu_large.py")
    assert "test_a_loss_beyond_two_billion_elements[new]" in of_one
    assert "cpu]" not in of_one
    assert "reference]" not in of_one
    none = _collected("-rs", "tests/gpu/test_gpu_large.py", KLDIV_TEST_BACKENDS="cuda")
    assert "no tests collected" in none


ONE_BACKEND = "import pytest\n@pytest.mark.parametrize('backend', ['cuda'])\ndef test_a(backend): pass"
SKIPS = "import pytest\npytest.skip('needs a GPU', allow_module_level=True)"
SKIPS_ONE = (
    "import pytest\n@pytest.mark.parametrize('backend', ['cuda', 'triton'])\n"
    "def test_a(backend):\n if backend == 'triton': pytest.skip('no Triton here')"
)


@pytest.mark.parametrize(
    ("body", "backends", "status", "summary"),
    [
        (ONE_BACKEND, ["cuda"], "pass", "1 passed"),
        (ONE_BACKEND, ["cuda", "triton"], "fail", "no test of triton passed: there is none"),
        (SKIPS_ONE, ["cuda", "triton"], "fail", "no test of triton passed: Skipped: no Triton here"),
        (SKIPS, ["cuda"], "fail", "no test of cuda passed: Skipped: needs a GPU"),
        ("def test_of_no_backend(): pass", ["cuda"], "fail", "no test of cuda passed"),
    ],
    ids=["tested", "untested", "one skipped", "all skipped", "about none"],
)
def test_a_step_on_a_gpu_does_not_pass_by_skipping(
    body: str, backends: list[str], status: str, summary: str, tmp_path: Path
) -> None:
    step = _step(body, tmp_path, backends=backends)
    assert (step.status, summary in step.summary) == (status, True), step


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
    step = _step(body, tmp_path, shards=2 if status == "pass" else 1)
    assert step.status == status, step
    assert summary in step.summary
    if "broken" in body:
        assert "broken" in step.details["failed"][0]["message"]


def _step(body: str, root: Path, shards: int = 1, backends: list[str] | None = None) -> Step:
    # The conftest of tests/gpu writes the results; the file stands beside a copy of it.
    folder = root / "tests" / "gpu"
    folder.mkdir(parents=True)
    (folder / "conftest.py").write_text((ROOT / "tests" / "gpu" / "conftest.py").read_text())
    (folder / "test_this.py").write_text(body)
    (root / "log").write_text("")
    runner = Runner(root / "log", {}, lambda text: None, root=root)
    return runner.tests("this", ["test_this.py"], shards, 8, backends or [])


ON_THE_MODEL = """
import json, sys
sys.path[:0] = ["tests", "benchmarks"]
import cuda_host
cuda_host.serve_cpu_tensors()
from pathlib import Path
import gpu_dram, gpu_library, gpu_memcheck
from kldiv_kernels.benchmarking import gpu, gpu_tune
gpu_library.ROWS = 3
print(json.dumps(gpu_library.check("cpu")))
sys.argv[1:] = ["cpu", "--cuda-backend"]
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
    errors, calls, *_, profiled, rows = done.stdout.splitlines()
    assert set(json.loads(errors)) == {"one-read", "two-sweep"}
    # Six clusters and two sweeps, five losses and two of a policy's; four calls of any backend.
    assert calls == f"{7 * 7 + 4} calls with gradients"
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
