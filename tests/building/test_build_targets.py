"""Which GPUs the CUDA part is compiled for: all targets for a wheel, the GPUs that are there for `make`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import cuda_resources as resources
import pytest

NVCC = """#!/bin/sh
case $1 in
--version) echo "release 13.0, V13.0.88" ;;
--list-gpu-arch) for arch in 75 80 86 87 89 90 100 103 110 120 121; do echo "compute_$arch"; done ;;
esac
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of setup.py, on a machine with nvcc."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text(NVCC)
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("KLDIV_CUDA", raising=False)
    monkeypatch.delenv("KLDIV_CUDA_ARCHS", raising=False)
    return resources.build_script()


def _with_gpus(script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, gpus: list[int]) -> None:
    monkeypatch.setitem(script["description"].__globals__, "gpus", lambda: gpus)


@pytest.mark.parametrize(
    ("asked", "gpus", "targets"),
    [
        (None, [], (80, 86, 89, 90, 100, 120)),
        ("100;90", [], (90, 100)),
        ("native", [90, 90], (90,)),
        ("native", [121, 80], (80, 120)),
        # Their own binaries do not exist; these run there, or their PTX does.
        ("native", [87], (86,)),
        ("native", [110], (100,)),
        ("native", [], None),
        ("native", [75], None),
    ],
)
def test_targets(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, asked: str | None, gpus: list[int],
    targets: tuple[int, ...] | None,
) -> None:  # fmt: skip
    _with_gpus(script, monkeypatch, gpus)
    if asked is not None:
        monkeypatch.setenv("KLDIV_CUDA_ARCHS", asked)
    nvcc = script["Nvcc"].find()
    assert (nvcc and nvcc.archs) == targets


def test_what_is_refused(script: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _with_gpus(script, monkeypatch, [])
    monkeypatch.setenv("KLDIV_CUDA_ARCHS", "natives")
    with pytest.raises(SystemExit, match='expected native, or numbers such as "90"'):
        script["Nvcc"].find()
    monkeypatch.setenv("KLDIV_CUDA_ARCHS", "native")
    monkeypatch.setenv("KLDIV_CUDA", "1")
    with pytest.raises(SystemExit, match="PyTorch sees no GPU"):
        script["Nvcc"].find()


@pytest.mark.parametrize(
    ("asked", "targets"),
    [
        ({}, "native"),
        ({"KLDIV_CUDA_ARCHS": "90"}, "90"),
        ({"KLDIV_CUDA_ARCHS": ""}, ""),
        ({"KLDIV_CUDA": "1"}, ""),
        ({"KLDIV_CUDA": "0"}, ""),
    ],
)
def test_make_asks_for_the_gpus_that_are_there(asked: dict[str, str], targets: str, tmp_path: Path) -> None:
    """The Makefile as it is, but for what it does to make the environment."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    (tmp_path / "shown.mk").write_text('$(VENV)/.installed:\n\t@echo "targets: $$KLDIV_CUDA_ARCHS"\n')
    unset = ("KLDIV_CUDA", "KLDIV_CUDA_ARCHS", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        ["make", "-f", "Makefile", "-f", tmp_path / "shown.mk", f"VENV={tmp_path}", f"{tmp_path}/.installed"],
        cwd=resources.ROOT, env=environment | asked, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"targets: {targets}\n"
