"""The CPU code on a processor without AVX: compiled for 64-bit ARM, run by an emulator, and compared with this one."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# for_each.cpp is PyTorch's threads.
SOURCES = [
    *(path for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")) if path.name != "for_each.cpp"),
    ROOT / "csrc" / "plan.cpp",
    HERE / "cpu_values.cpp",
]
FLAGS = ["-std=c++17", "-ffp-contract=off", "-w"]
ROUNDING = {"float32": 2**-23, "bfloat16": 2**-7, "float16": 2**-10}


def arm_compiler() -> list[str] | None:
    if shutil.which("aarch64-linux-gnu-g++"):
        return ["aarch64-linux-gnu-g++"]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl"]
    return None


def built(compiler: list[str], folder: Path, *options: str) -> Path:
    folder.mkdir()

    def compiled(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        subprocess.run([*compiler, *FLAGS, *options, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, SOURCES))
    program = folder / "values"
    subprocess.run([*compiler, *objects, *options, "-o", str(program)], check=True)
    return program


def said(*command: str | Path) -> dict[str, torch.Tensor]:
    """(statistic, dtype, columns, what) → numbers."""
    environment = {**os.environ, "KLDIV_CPU_ISA": "baseline"}
    text = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True, env=environment)
    isa, *lines = text.stdout.splitlines()
    assert isa == "isa baseline"
    found = {}
    for line in lines:
        words = line.split()
        found[" ".join(words[:4])] = torch.tensor([float(word) for word in words[4:]], dtype=torch.float64)
    return found


def test_64_bit_arm_has_the_values_of_this_processor(tmp_path: Path) -> None:
    compiler = arm_compiler()
    if compiler is None:
        pytest.skip("needs a C++ compiler for 64-bit ARM")
    program = built(compiler, tmp_path / "arm", "-O2", "-static")
    emulator = shutil.which("qemu-aarch64")
    if platform.machine() != "x86_64" or emulator is None:
        pytest.skip("compiled; needs an emulator of 64-bit ARM to run")
    expected = said(built([os.environ.get("CXX", "g++")], tmp_path / "here", "-O1"))
    got = said(emulator, program)
    assert got.keys() == expected.keys()
    gradients = 0
    for name, here in expected.items():
        _, dtype, _, what = name.split()
        assert here.isfinite().all(), name
        assert here.abs().max() > 0, name
        # There, products are fused into sums. Gradients are rounded to their dtype, and may fall to either side.
        bound = 1e-5 * here.abs().clamp_min(1)
        if what == "gradient":
            bound = 1e-5 * here.abs().max() + ROUNDING[dtype] * here.abs()
        assert ((got[name] - here).abs() <= bound).all(), name
        gradients += what == "gradient"
    assert gradients > 3 * 20
    assert any(not torch.equal(got[name], here) for name, here in expected.items()), "no product was fused"
