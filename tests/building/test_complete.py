"""What CI makes of tests that skip: tests/complete.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
CONFTEST = "from complete import watch\ndef pytest_configure(config):\n    watch(config)\n"
PASSES = "def test_a():\n    pass\n"
MISSING = "import pytest\npytest.importorskip('no_such_package')\n"
UNBUILT = "import pytest\n@pytest.mark.skipif(True, reason='the compiled part is not built')\n"
NO_GPU = "import pytest\n@pytest.mark.skipif(True, reason='needs a GPU')\n"


@pytest.mark.parametrize(
    ("given", "one", "other", "left_out"),
    [
        (["."], PASSES, PASSES, ""),
        (["."], NO_GPU + PASSES, PASSES, ""),
        (["test_one.py", "test_other.py"], NO_GPU + PASSES, PASSES, "test_one.py: nothing of it ran"),
        (["test_one.py", "test_other.py"], "", PASSES, "test_one.py: nothing of it ran"),
        (["."], MISSING + PASSES, PASSES, "test_one.py: could not import 'no_such_package'"),
        (["."], UNBUILT + PASSES, PASSES, "test_one.py::test_a: the compiled part is not built"),
    ],
)
def test_what_was_left_out_fails_the_run(given: list[str], one: str, other: str, left_out: str, tmp_path: Path) -> None:
    for name, text in {"conftest": CONFTEST, "test_one": one, "test_other": other}.items():
        (tmp_path / f"{name}.py").write_text(text)

    def run(complete: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-n", "2", *given],
            env=os.environ | {"PYTHONPATH": str(TESTS), "KLDIV_COMPLETE": complete},
            cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    assert run("0").returncode == 0
    seen = run("1")
    assert (seen.returncode, "LEFT OUT" in seen.stdout) == (bool(left_out), bool(left_out)), seen.stdout
    assert left_out in seen.stdout
