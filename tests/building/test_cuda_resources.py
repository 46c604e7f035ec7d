"""What the CUDA kernels take of each target: the table has all of them, none spills, and its numbers are today's."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kldiv_kernels._C", reason="the compiled part was not built")
if shutil.which("c++filt") is None:
    pytest.skip("needs c++filt", allow_module_level=True)

import cuda_resources as resources
from cuda_instructions import cuobjdump

LIBRARY = resources.ROOT / "kldiv_kernels" / "libkldiv_kernels.so"
# The file that is compiled anew: the kernels that most calls run.
CHECKED = "bfloat16.cu"
SAID = """\
ptxas info    : Compiling entry function '_ZN5kldiv3gpu5sweepILi9EEEvNS0_14SweepArgumentsE' for 'sm_90'
ptxas info    : Function properties for _ZN5kldiv3gpu5sweepILi9EEEvNS0_14SweepArgumentsE
    8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 87 registers, used 1 barriers, 32 bytes smem
ptxas info    : Compiling entry function '_Z5otherv' for 'sm_120a'
ptxas info    : Function properties for _Z5otherv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
"""


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(resources.TABLE.read_text())
    return content


def test_what_ptxas_says_is_understood() -> None:
    said = resources.ptxas_said(SAID)
    assert set(said.values()) == {resources.Used(87, 16, 24, 8, 32), resources.Used(12, 0, 0, 0, 0)}
    (row,) = resources.rows(said)
    assert row == {
        "kernel": "sweep forward_kl", "threads": 256, "sm_90": [87, 16, 24, 8, 32, 1024, 2, "registers"]
    }  # fmt: skip
    assert resources.spilling([row]) == [
        "sweep forward_kl sm_90: 87 registers, 16 + 24 bytes spilled, 8 bytes of stack"
    ]
    with pytest.raises(ValueError, match="something else"):
        resources.ptxas_said(SAID.replace("Used", "Took"))


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "target", "blocks"),
    [
        (96, 576, 231_680, 90, (1, "registers, shared memory")),
        (56, 576, 100_000, 90, (2, "registers, shared memory")),
        (128, 256, 1024, 86, (2, "registers")),
        (20, 256, 1024, 86, (6, "threads")),
        (20, 32, 0, 86, (16, "blocks")),
        (20, 256, 40_000, 120, (2, "shared memory")),
    ],
)
def test_blocks_resident(registers: int, threads: int, shared: int, target: int, blocks: tuple[int, str]) -> None:
    assert resources.blocks_resident(registers, threads, shared, target) == blocks


def test_every_kernel_is_there_for_every_target(table: dict[str, Any]) -> None:
    recorded = {row["kernel"]: {int(key[3:]) for key in row if key.startswith("sm_")} for row in table["kernels"]}
    for kernel, targets in recorded.items():
        wanted = {target for target in resources.TARGETS if resources.runs_on(kernel, target)}
        assert targets == wanted, f"{kernel}; run: python tests/building/cuda_resources.py"
    text = "\n".join(path.read_text() for path in resources.SOURCES.rglob("*.cuh"))
    written = set(re.findall(r"^KLDIV_KERNEL\([^)]*\)\s+(\w+)\(", text, re.MULTILINE))
    assert {"one_read", "sweep", "gradient"} <= written
    assert {kernel.split()[0] for kernel in recorded} == written
    one_read = {
        f"one_read {name} {dtype}"
        for name, _ in resources.divergences()
        for dtype, _ in resources.ELEMENTS.values()
        if name != "reference_entropy"
    }
    assert one_read <= recorded.keys()


def test_nothing_spills_and_a_block_has_room(table: dict[str, Any]) -> None:
    assert resources.spilling(table["kernels"]) == []


def _of(table: dict[str, Any], target: str) -> dict[str, list[Any]]:
    return {row["kernel"]: row[target] for row in table["kernels"] if target in row}


def _same_compiler(table: dict[str, Any]) -> None:
    if resources.nvcc_version() is None:
        pytest.skip("needs nvcc")
    if resources.nvcc_version() != table["nvcc"]:
        pytest.skip(f"the table was made with nvcc {table['nvcc']}, here is {resources.nvcc_version()}")


def test_the_numbers_are_those_of_the_kernels_here(table: dict[str, Any], tmp_path: Path) -> None:
    _same_compiler(table)
    flags = resources.build_script()["NVCC_FLAGS"]
    command = ["nvcc", *flags, "-gencode", "arch=compute_90,code=sm_90", "-cubin"]
    done = subprocess.run(
        [*command, str(resources.SOURCES / "one_read" / CHECKED), "-o", str(tmp_path / "checked.cubin")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    compiled = _of({"kernels": resources.rows(resources.ptxas_said(done.stdout + done.stderr))}, "sm_90")
    assert compiled
    recorded = _of(table, "sm_90")
    assert compiled == {name: recorded.get(name) for name in compiled}, "run: python tests/building/cuda_resources.py"


def test_the_numbers_are_those_of_the_library(table: dict[str, Any]) -> None:
    """Every kernel and target of the library that stands here."""
    from kldiv_kernels.backends import cuda

    _same_compiler(table)
    tool = cuobjdump()
    if tool is None:
        pytest.skip("needs cuobjdump")
    if not cuda.architectures():
        pytest.skip("the library has no CUDA part; make builds one for the GPU here, or for KLDIV_CUDA_ARCHS")
    done = subprocess.run([tool, "--dump-resource-usage", str(LIBRARY)], capture_output=True, text=True, check=True)
    found: dict[tuple[str, int], tuple[int, int]] = {}
    for part in done.stdout.split("Fatbin elf code:")[1:]:
        arch = re.search(r"^arch = sm_(\d+)", part, re.MULTILINE)
        assert arch
        for name, registers, stack in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", part):
            found[name, int(arch[1])] = int(registers), int(stack)
    names = resources.readable(name for name, _ in found)
    built = {
        (names[name], target): used
        for (name, target), used in found.items()
        if name in names and resources.runs_on(names[name], target)
    }
    targets = {target for _, target in built}
    assert targets
    recorded = {
        (row["kernel"], int(key[3:])): (cell[0], cell[3])
        for row in table["kernels"]
        for key, cell in row.items()
        if key.startswith("sm_") and int(key[3:]) in targets
    }
    assert built == recorded, "run: python tests/building/cuda_resources.py"
