"""`make gpu-check` cannot pass by skipping: what becomes of a step of tests, with backends that are faked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = str(ROOT / "benchmarks")
sys.path.insert(0, FOLDER)
import gpu_check_steps  # noqa: E402
from gpu_check_steps import Runner, Step  # noqa: E402

sys.path.remove(FOLDER)


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
    files = sorted((ROOT / "tests" / "gpu").glob("test_gpu_*.py"))
    found = [line for line in _collected("tests/gpu").splitlines() if line.startswith("tests/gpu/")]
    assert "tests/gpu/test_gpu_large.py::test_a_loss_beyond_two_billion_elements[new]" in found
    assert not [line for line in found if "[cpu" in line or "cpu]" in line or "reference]" in line]
    # All that is in test_gpu_topk.py is about the cuda backend's kernel.
    about_new = {line.partition("::")[0] for line in found if "new" in line}
    assert about_new == {f"tests/gpu/{file.name}" for file in files} - {"tests/gpu/test_gpu_topk.py"}
    none = _collected("-rs", "tests/gpu/test_gpu_large.py", KLDIV_GPU_BACKENDS="cuda")
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
    step = _step(body, tmp_path, processes=2 if status == "pass" else 1)
    assert step.status == status, step
    assert summary in step.summary
    if "broken" in body:
        assert "broken" in step.details["failed"][0]["message"]


def _step(body: str, root: Path, processes: int = 1, backends: list[str] | None = None) -> Step:
    # The conftest of tests/gpu writes the results; the file stands beside a copy of it.
    folder = root / "tests" / "gpu"
    folder.mkdir(parents=True)
    (folder / "conftest.py").write_text((ROOT / "tests" / "gpu" / "conftest.py").read_text())
    (folder / "test_this.py").write_text(body)
    (root / "log").write_text("")
    runner = Runner(root / "log", {}, lambda text: None, root=root)
    return runner.tests("this", ["test_this.py"], processes, 8, backends or [])


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("import time\n@PARAM\ndef test_a(backend): time.sleep(60)", "hung in tests/gpu/test_this.py::test_a[cuda]"),
        ("import os\n@PARAM\ndef test_a(backend): os.abort()", "crashed in tests/gpu/test_this.py::test_a[cuda]"),
        (
            "@PARAM\ndef test_a(backend): raise RuntimeError('CUDA error: an illegal memory access')\n"
            "def test_b(): pass",
            "crashed in tests/gpu/test_this.py::test_a[cuda]: RuntimeError: CUDA error: an illegal memory access",
        ),
        ("@PARAM\ndef test_a(backend): assert 1 == 2", None),
    ],
    ids=["hangs", "aborts", "loses the device", "is wrong"],
)
def test_a_step_that_breaks_the_backend_says_so(
    body: str, what: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check_steps, "HUNG", 2)
    body = f"import pytest\n{body}".replace("@PARAM", "@pytest.mark.parametrize('backend', ['cuda'])")
    step = _step(body, tmp_path, backends=["cuda"])
    assert step.status == "fail"
    assert step.details["broken"] == ({} if what is None else {"cuda": what}), step
    if what is not None and "illegal" in what:
        assert step.details["collected"] == 2
        assert step.details["passed"] == 0, "no kernel could be launched after it"


def test_tests_are_shared_without_doing_one_twice(tmp_path: Path) -> None:
    """Three processes take from one pile; the sixty tests leave a line each."""
    body = (
        "import pytest, pathlib\n@pytest.mark.parametrize('name', range(20))\n"
        "@pytest.mark.parametrize('dtype', 'abc')\ndef test_a(name, dtype):\n"
        f" with open('{tmp_path}/done', 'a') as file: file.write(f'{{name}} {{dtype}}\\n')"
    )
    step = _step(body, tmp_path, processes=3)
    assert (step.status, step.summary) == ("pass", "60 tests, 60 passed, 0 failed, 0 skipped")
    assert len(set((tmp_path / "done").read_text().splitlines())) == 60
    assert len((tmp_path / "done").read_text().splitlines()) == 60
