"""The host's model of a CUDA machine: what a kernel leaves out is seen, and what it does right is not complained of."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from cuda_host.build import build, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

TEST = Path(__file__).parent / "machine_test.cpp"
# Without the variables that choose the machine: the test sets its own.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("KLDIV_HOST_")}


@pytest.mark.parametrize("how", ["plain", "sanitized", "without assembly"])
def test_the_machine_keeps_its_promises(how: str) -> None:
    defines = ["KLDIV_HOST_UCONTEXT"] if how == "without assembly" else []
    program = build("machine_test", [TEST], sanitize=how == "sanitized", defines=defines)
    seeds = 60 if how == "plain" else 10
    done = subprocess.run([program, "0", str(seeds)], capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every promise kept" in done.stdout


def test_a_library_is_built_again_only_when_something_changed(tmp_path: Path) -> None:
    source, header = tmp_path / "answer.cu", tmp_path / "answer.cuh"
    source.write_text('#include "answer.cuh"\nextern "C" int answer() { return kAnswer; }\n')
    header.write_text("#pragma once\nconstexpr int kAnswer = 41;\n")
    first = build("answer.so", [source])
    made = first.stat().st_ino
    assert build("answer.so", [source]) == first
    assert first.stat().st_ino == made
    header.write_text("#pragma once\nconstexpr int kAnswer = 42;\n")
    second = build("answer.so", [source])
    assert second != first
    source.write_text("no C++\n")
    with pytest.raises(RuntimeError, match="no C"):
        build("answer.so", [source])
