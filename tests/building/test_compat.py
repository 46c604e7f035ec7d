"""What `make compat` is made of: its table, and the stand-ins for CUDA's libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import compat
import pytest
import standins

# Of a library of CUDA, with a version as theirs have one, and of PyTorch, which asks for two functions of it.
CUDA = "int cudaFirst(void) { return 0; }\nint cudaSecond(void) { return 0; }\n"
PYTORCH = "int cudaFirst(void); int cudaSecond(void);\nint devices(void) { return cudaFirst() + cudaSecond(); }\n"


def _linked(source: str, target: Path, *options: str) -> None:
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-x", "none", "-o", str(target), *options]
    subprocess.run(command, input=source, text=True, check=True)


@pytest.mark.parametrize("version", ["libcufake.so.13", "NAMED", None])
def test_a_library_finds_stand_ins_for_what_is_missing(version: str | None, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "script").write_text(f"{version} {{ global: cuda*; }};")
    scripted = [f"-Wl,--version-script,{tmp_path / 'script'}"] if version else []
    _linked(CUDA, tmp_path / "libcufake.so.13", "-Wl,-soname,libcufake.so.13", *scripted)
    library = tmp_path / "torch" / "libtorch_cuda.so"
    # -z now: all functions are looked for at once, as when Python imports a module.
    _linked(PYTORCH, library, "-Wl,-z,now", str(tmp_path / "libcufake.so.13"))
    program = [sys.executable, "-c", f"import ctypes; print(ctypes.CDLL({str(library)!r}).devices())"]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path / "standins")}
    without = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert "libcufake.so.13" in without.stderr
    assert standins.make(library.parent, tmp_path / "standins") == ["libcufake.so.13"]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "200\n", done.stderr


def test_a_pair_replaces_what_was_seen_of_it(tmp_path: Path) -> None:
    table = tmp_path / "compat.json"

    def row(python: str, torch: str, result: str) -> dict[str, str]:
        return {"python": python, "torch": torch, "result": result}

    for new in (
        row("3.12.1", "2.14.1+cu130", "failed: no"),
        row("3.9.2", "2.10.0", "passed"),
        row("3.12.7", "2.14.0", "passed"),
        row("3.12.7", "2.9.0", "passed"),
    ):
        compat.kept(table, new)
    assert json.loads(table.read_text())["rows"] == [
        row("3.9.2", "2.10.0", "passed"), row("3.12.7", "2.9.0", "passed"), row("3.12.7", "2.14.0", "passed"),
    ]  # fmt: skip


def test_a_failure_is_the_last_line() -> None:
    with pytest.raises(compat.FailedError, match=r"^ValueError: nothing$"):
        compat.run(sys.executable, "-c", "raise ValueError('nothing')")
    with pytest.raises(compat.FailedError, match="not done after 1 s"):
        compat.run(sys.executable, "-c", "import time; time.sleep(60)", seconds=1)
