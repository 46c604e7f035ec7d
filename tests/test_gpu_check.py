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
    assert len(cases) == 5
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


ON_THE_MODEL = """
import json, sys
sys.path[:0] = ["tests", "benchmarks"]
import cuda_host
cuda_host.serve_cpu_tensors()
from pathlib import Path
import gpu_library, gpu_memcheck
from kldiv_kernels.benchmarking import gpu, gpu_tune
gpu_library.ROWS = 3
print(json.dumps(gpu_library.check("cpu")))
sys.argv[1:] = ["cpu", "--cuda-backend"]
gpu_memcheck.main()
gpu_tune.run(gpu_tune.quick_cases(), gpu.Device("cpu"), 60, Path(sys.argv[0] + "tune.json"))
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
    errors, calls, *_, rows = done.stdout.splitlines()
    assert set(json.loads(errors)) == {"one-read", "two-sweep"}
    # Six clusters and two sweeps, five losses and a policy's; four calls of any backend.
    assert calls == f"{7 * 6 + 4} calls with gradients"
    assert all(row["agrees"] and row["milliseconds"] for row in json.loads(rows))
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


NCU = """\
==PROF== Connected to process 7 (/usr/bin/python3.12)
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"Section Name","Metric Name","Metric Unit","Metric Value"
"""


def _profiled(*kernels: tuple[str, int, int, int]) -> str:
    rest = '"1","7","(576, 1, 1)","(128, 1, 1)","0","9.0","Command line profiler metrics"'
    return NCU + "".join(
        f'"{i}","7","python3.12","127.0.0.1","{name}",{rest},"{metric}","byte","{value:,}"\n'
        for i, (name, *values) in enumerate(kernels)
        for metric, value in zip(gpu_check_tools.METRICS, values, strict=True)
    )


def test_bytes_of_main_memory() -> None:
    """ncu's kernels are those of the calls between the marks."""
    text = _profiled(
        ("spin_kernel(long)", 0, 32, 900), ("void one_read<ForwardKl, 1>(OneReadArguments)", 2_040, 990, 1_980_000),
        ("fill", 0, 0, 1_000), ("spin_kernel(long)", 0, 0, 900), ("sweep", 4_000, 0, 2_000_000),
    )  # fmt: skip
    calls = [
        {"case": "forward_kl", "rows": 1, "vocab": 2, "backend": "cuda", "floor_bytes": 3_000, "planned": 3_000},
        {"case": "js", "rows": 1, "vocab": 2, "backend": "triton", "floor_bytes": 2_000, "planned": None},
    ]
    first, second = gpu_check_tools.by_call(gpu_check_tools.kernels_of(text), calls)
    assert (first["bytes"], first["over_floor"], second["over_floor"]) == (3_030, 1.01, 2)
    assert [kernel["milliseconds"] for kernel in first["kernels"]] == [1.98, 0.001]
    lines = gpu_check_report.dram_lines([first, second], gpu_check_tools.REACH)
    assert "cuda forward_kl" in lines[0]
    assert "1.010× (within 1.05)" in lines[0]
    assert "2.000× (above 1.05)" in lines[1]
    with pytest.raises(ValueError, match="2 marks for 1 calls"):
        gpu_check_tools.by_call(gpu_check_tools.kernels_of(text), calls[:1])
    with pytest.raises(ValueError, match="no line"):
        gpu_check_tools.kernels_of("==ERROR== no counters")


def test_the_table_of_clusters() -> None:
    shape = {"vocab": 32_000, "tensors": 2, "cluster": 2, "stages": 3, "shared_bytes": 204_800, "clusters": 66}
    assert gpu_check_report.cluster_lines({"shapes": [shape, {**shape, "cluster": 4, "clusters": 32}]}) == [
        "clusters for 2 bf16 rows of 32000: 2×3 (200 KiB): 66, 4×3 (200 KiB): 32"
    ]
    assert gpu_check_report.cluster_lines({}) == []


def _row(implementation: str, milliseconds: float | None, **changes: object) -> dict[str, object]:
    case = {"case": "logprob_entropy forward", "kind": "logprob_entropy", "rows": gpu_cases.ROWS}
    return {"implementation": implementation, "milliseconds": milliseconds, "vocab": gpu_cases.VOCAB, **case, **changes}


def test_targets_are_about_one_backend_on_the_promised_gpu() -> None:
    rows = [_row("triton", 0.7), _row("cuda", 0.6), _row("trl", 0.61), _row("eager", 0.1), _row("liger", None)]
    known = {"case": "logprob_entropy known"}
    other_shape = [_row("triton", 0.9, vocab=32_000), _row("trl", 0.5, vocab=32_000)]

    def verdicts(measured: list[dict[str, object]], device: str) -> dict[str, object]:
        found = gpu_cases.targets(measured, ["triton", "cuda"], device)
        return {target["target"].partition(" at ")[0]: target["met"] for target in found if target["met"] is not None}

    trl = "logprob and entropy: time of the best of ours / time of TRL's kernel, on any shape"
    assert verdicts(rows, "NVIDIA H200") == {"triton: logprob_entropy forward": True, trl: True}
    assert verdicts(rows, "NVIDIA A100") == {trl: True}
    assert verdicts([*rows, *other_shape], "NVIDIA H200")[trl] is False
    assert verdicts([_row("cuda", 1.31, **known)], "NVIDIA H200") == {"cuda: logprob_entropy known": False}
    assert verdicts([_row("triton", 1.2, **known)], "NVIDIA H200") == {}


def test_every_promise_is_measured() -> None:
    cases = gpu_cases.cases()
    for promise in gpu_cases.PROMISES:
        assert any(
            (c.name, c.rows, c.vocab) == (promise.case.name, promise.case.rows, promise.case.vocab) for c in cases
        )
        # The floor is that of the bytes at 4.3 TB/s, what copying reaches there; js has arithmetic to do beside them.
        assert promise.floor == pytest.approx(promise.case.floor_bytes / 4.3e9, rel=0.05)
        assert promise.reach > promise.floor


def test_the_floor_of_a_case() -> None:
    units = {case.name: case.floor_units for case in gpu_cases.cases()}
    assert units["forward_kl"] == units["js"] == 3
    assert units["forward_kl forward"] == units["logprob_entropy"] == units["logprob_entropy known"] == 2
    assert units["logprob_entropy forward"] == 1
    assert gpu_cases.GpuCase("js", 4, 10).floor_bytes == 3 * 4 * 10 * 2
    assert len(set(gpu_cases.cases())) == len(gpu_cases.cases())
