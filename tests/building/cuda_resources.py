"""What each CUDA kernel takes of each target: registers, spilled bytes, stack, shared memory, blocks a processor.

`python tests/building/cuda_resources.py` compiles what a build of the library would compile (minutes for all targets,
nothing where it has been built) and writes benchmarks/cuda_resources.json from what ptxas said. `--log FILE` reads
only that.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks" / "cuda_resources.json"
LOG = ROOT / "build" / "cuda" / "ptxas.txt"
SOURCES = ROOT / "csrc" / "cuda"
TARGETS = (80, 86, 89, 90, 100, 120)
# As csrc/plan.h has them: a block of each kind of kernel, and what it asks of shared memory when it is launched.
ONE_READ_THREADS, SWEEP_THREADS, SWEEP_SHARED = 576, 256, 1024
TOPK = 64
# A bit a column of a slice, and what stands in front of them.
LABEL_BYTES = 16 + 16_384 // 8
# The one-read kernel's shared memory is its plan's, here for the vocabulary of Qwen.
ROWS, VOCAB = 8192, 151_936
ELEMENTS = {0: ("float32", 4), 1: ("bfloat16", 2), 2: ("float16", 2)}
CELLS = [
    "registers a thread", "spill stores", "spill loads", "stack", "static shared bytes",
    "dynamic shared bytes (0: the plan there is two-sweep)", "blocks a processor", "limited by",
]  # fmt: skip


@dataclass(frozen=True)
class Processor:
    """CUDA C++ Programming Guide, technical specifications by compute capability."""

    threads: int
    blocks: int
    shared: int


PROCESSORS = {
    80: Processor(2048, 32, 164 * 1024),
    86: Processor(1536, 16, 100 * 1024),
    89: Processor(1536, 24, 100 * 1024),
    90: Processor(2048, 32, 228 * 1024),
    100: Processor(2048, 32, 228 * 1024),
    120: Processor(1536, 24, 100 * 1024),
}
REGISTERS = 65_536


@dataclass(frozen=True)
class Used:
    """Bytes but for the registers."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int


def ptxas_said(text: str) -> dict[tuple[str, int], Used]:
    """(mangled name, target) → what `ptxas -v` says of it."""
    found = {}
    entries = re.split(r"^ptxas info\s*: Compiling entry function '", text, flags=re.MULTILINE)[1:]
    for entry in entries:
        head = re.match(r"(\w+)' for 'sm_(\d+)\w*'", entry)
        numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        if not head or not numbers or not registers:
            raise ValueError(f"ptxas says of a kernel something else than expected: {entry[:500]}")
        shared = re.search(r"(\d+) bytes smem", entry)
        stack, stores, loads = (int(number) for number in numbers.groups())
        found[head[1], int(head[2])] = Used(
            int(registers[1]), stores, loads, stack, int(shared[1]) if shared else 0
        )  # fmt: skip
    return found


def readable(mangled: Iterable[str]) -> dict[str, str]:
    """Mangled name → such as "one_read forward_kl bfloat16"; kernels of others are left out."""
    names = sorted(set(mangled))
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    out = {}
    for name, plain in zip(names, done.stdout.splitlines(), strict=True):
        match = re.fullmatch(r"(?:void )?kldiv::gpu::(\w+)(?:<(.*)>)?\(kldiv::gpu::\w+\)", plain)
        if match:
            arguments = (match[2] or "").replace("kldiv::gpu::", "").replace(" ", "")
            out[name] = " ".join([match[1], *_words(match[1], arguments.split(",") if arguments else [])])
    return out


def _words(kernel: str, arguments: list[str]) -> list[str]:
    if kernel == "sweep":
        return _taken(int(arguments[0]))
    aliases = dict(_found(r"^using (\w+) = ([\w<>]+);"))
    structs = {aliases.get(struct, struct): name for name, struct in divergences()}
    words = [structs.get(one) or _element(one) or one for one in arguments]
    return [re.sub(r"(?<!^)(?=[A-Z])", "_", word).lower() for word in words]


def _element(argument: str) -> str | None:
    return ELEMENTS[int(argument)][0] if argument.isdigit() else None


def divergences() -> list[tuple[str, str]]:
    """(name, struct) of csrc/divergences/."""
    found = _found(r"^    X\((\w+), ([\w<>]+)\)")
    assert found, "csrc/divergences/ has no lists of divergences that this file understands"
    return found


def _found(pattern: str) -> list[tuple[str, str]]:
    texts = [path.read_text() for path in sorted((ROOT / "csrc" / "divergences").glob("*.h"))]
    return re.findall(pattern, "\n".join(texts), re.MULTILINE)


def _taken(first: int) -> list[str]:
    """What a first sweep takes beside the student's sums: csrc/cuda/row/state.cuh."""
    bits = re.findall(r"^\s*k(\w+) = (\d+),", (SOURCES / "row" / "state.cuh").read_text(), re.MULTILINE)
    words = [re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower() for name, bit in bits if first & int(bit)]
    beside = [word for word in words if word in ("tail", "untempered")]
    if len(words) - len(beside) == len(bits) - 2:
        return ["everything", *beside]
    return [word for word in words if word != "teacher" or len(words) - len(beside) == 1]


def runs_on(kernel: str, target: int) -> bool:
    """Below sm_90 a one-read kernel is compiled to nothing."""
    return target >= 90 or not kernel.startswith("one_read")


def threads_of(kernel: str) -> int:
    return ONE_READ_THREADS if kernel.startswith("one_read") else SWEEP_THREADS


def dynamic_shared(kernel: str, target: int) -> int:
    """Bytes that a block asks for when it is launched; 0 for a one-read kernel that no plan there chooses."""
    if not kernel.startswith("one_read"):
        return SWEEP_SHARED + (LABEL_BYTES if " tail" in kernel else 0)
    from kldiv_kernels import _C  # type: ignore[attr-defined]

    family, *names, dtype = kernel.split()
    size = {dtype: size for dtype, size in ELEMENTS.values()}[dtype]
    if family == "one_read_topk":
        asked = {"stats": ["logprob", "tail_logprob"], "labels_per_row": TOPK, "topk_outcomes": TOPK + 1}
    else:
        name = "alpha" if names == ["alpha_below_half"] else names[0]
        asked = {"stats": [name], "teacher_bytes": 0 if name in ("entropy", "collision") else size}
    plan = _C.plan_cuda(
        capability=target, rows=ROWS, columns=VOCAB, student_bytes=size, student_gradient=True,
        known_coefficients=True, **asked,
    )  # fmt: skip
    return int(plan.shared_bytes) if plan.kernel == "one-read" else 0


def blocks_resident(registers: int, threads: int, shared: int, target: int) -> tuple[int, str]:
    """How many blocks a processor holds at a time, and what there is no more of then."""
    processor, warps = PROCESSORS[target], -(-threads // 32)
    # A warp's registers come in units of 256, its block's from four files; a block's shared memory in units of 128
    # bytes, of which the driver keeps 1024.
    of_registers = REGISTERS // 4 // (-(-registers * 32 // 256) * 256) * 4 // warps
    limits = {
        "registers": of_registers,
        "shared memory": processor.shared // (-(-(shared + 1024) // 128) * 128),
        "threads": processor.threads // (32 * warps),
        "blocks": processor.blocks,
    }
    least = min(limits.values())
    return least, ", ".join(name for name, limit in limits.items() if limit == least)


def cell(kernel: str, target: int, used: Used) -> list[Any]:
    dynamic = dynamic_shared(kernel, target)
    resident, limit = blocks_resident(used.registers, threads_of(kernel), used.shared + dynamic, target)
    spilled = [used.spill_stores, used.spill_loads, used.stack]
    return [used.registers, *spilled, used.shared, dynamic, resident, limit]


def rows(said: dict[tuple[str, int], Used]) -> list[dict[str, Any]]:
    names = readable(mangled for mangled, _ in said)
    table: dict[str, dict[str, Any]] = {}
    for (mangled, target), used in said.items():
        kernel = names.get(mangled)
        if kernel and runs_on(kernel, target):
            row = table.setdefault(kernel, {"kernel": kernel, "threads": threads_of(kernel)})
            row[f"sm_{target}"] = cell(kernel, target, used)
    return [_in_order(table[kernel]) for kernel in sorted(table)]


def _in_order(row: dict[str, Any]) -> dict[str, Any]:
    targets = sorted((key for key in row if key.startswith("sm_")), key=lambda key: int(key[3:]))
    return {"kernel": row["kernel"], "threads": row["threads"], **{key: row[key] for key in targets}}


def nvcc_version() -> str | None:
    if shutil.which("nvcc") is None:
        return None
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d[\d.]*)", said)
    return found[1] if found else said.splitlines()[-1]


@functools.cache
def build_script() -> dict[str, Any]:
    """The names of setup.py, which builds when it is run: here it prints the project's name instead."""
    environment, arguments = dict(os.environ), sys.argv
    os.environ["KLDIV_BUILD"], sys.argv = "0", ["setup.py", "--name"]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return runpy.run_path(str(ROOT / "setup.py"))
    finally:
        sys.argv = arguments
        os.environ.clear()
        os.environ.update(environment)


def text_of(table: list[dict[str, Any]], nvcc: str | None) -> str:
    """JSON, a kernel a line."""
    head = {"nvcc": nvcc, "plans at": [ROWS, VOCAB], "cells": CELLS}
    lines = ",\n".join("    " + json.dumps(row) for row in table)
    return json.dumps(head, indent=2)[:-2] + f',\n  "kernels": [\n{lines}\n  ]\n}}\n'


def spilling(table: list[dict[str, Any]]) -> list[str]:
    """Kernels that keep something in local memory, or do not fit into the registers of a processor."""
    return [
        f"{row['kernel']} {target}: {cell[0]} registers, {cell[1]} + {cell[2]} bytes spilled, {cell[3]} bytes of stack"
        for row in table
        for target, cell in row.items()
        if target.startswith("sm_") and (any(cell[1:4]) or cell[0] * row["threads"] > REGISTERS or not cell[6])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=TABLE, help="default: benchmarks/cuda_resources.json")
    parser.add_argument("--log", type=Path, help="what ptxas said; without it the library is built")
    options = parser.parse_args()
    if options.log is None:
        os.environ.pop("KLDIV_CUDA_ARCHS", None)
        nvcc = build_script()["Nvcc"].find()
        if nvcc is None:
            raise SystemExit("nvcc was found neither in CUDA_HOME nor in PATH")
        build_script()["compile_cuda"](nvcc)
    table = rows(ptxas_said((options.log or LOG).read_text()))
    options.output.write_text(text_of(table, nvcc_version()))
    over = spilling(table)
    print(f"{len(table)} kernels, {len(over)} over budget", *over, sep="\n")
    raise SystemExit(bool(over))


if __name__ == "__main__":
    main()
