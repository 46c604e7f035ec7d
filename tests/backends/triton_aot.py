"""The Triton kernels compiled ahead of time, for GPUs that need not be there: registers, shared memory, spilled bytes.

`python tests/backends/triton_aot.py` writes benchmarks/triton_resources.json. What is compiled is what `launch.py`
launches (triton_launches.py).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_launches import DTYPES, SETS, launches, source_of
from triton_processors import PROCESSORS, programs_resident

from kldiv_kernels.backends.triton import launch

TABLE = Path(__file__).resolve().parents[2] / "benchmarks" / "triton_resources.json"
# Bytes a thread. What is spilled today is a few values of a row, put aside while a loop over its columns runs: no such
# loop touches them (SASS). A budget of 0 would fail on the register allocation of the day.
MOST_SPILLED = 32


def cells(table: dict[str, Any]) -> list[list[int]]:
    """Every (registers, shared bytes, spilled bytes, programs) of the table."""
    columns = [column for row in table["kernels"] for column in row.values() if isinstance(column, dict)]
    return [cell for column in columns for cell in column.values()]


@dataclass(frozen=True)
class Job:
    """One kernel of a set of statistics. `everything`: masks, excluded columns, parameters per token, both gradients,
    rows that are neither aligned nor whole vectors."""

    stats: tuple[str, ...]
    kernel: str
    dtype: str
    target: str
    everything: bool = False


@dataclass(frozen=True)
class Compiled:
    job: Job
    registers: int
    shared: int
    spilled: int
    programs: int
    ttir: str

    @property
    def within_budget(self) -> bool:
        """Next to nothing spilled, and a second program to run while one waits for memory."""
        return self.spilled <= MOST_SPILLED and self.programs >= 2


def compile_for(target: GPUTarget, source: ASTSource, warps: int, **options: Any) -> tuple[Any, str]:
    """The compiled kernel, and what ptxas says about it. `options` are Triton's, beyond those of a launch."""
    options = {"num_warps": warps, **launch._options(False), **options}
    log = io.StringIO()
    with contextlib.redirect_stdout(log), triton.knobs.nvidia.scope(), triton.knobs.compilation.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        compiled = triton.compile(source, target=target, options=options)
    return compiled, log.getvalue()


def compiled(job: Job, **options: Any) -> Compiled:
    processor = PROCESSORS[job.target]
    nvidia = processor.target.backend == "cuda"
    kernel, arguments, warps = launches(job.stats, job.dtype, job.everything, nvidia)[job.kernel]
    binary, log = compile_for(processor.target, source_of(kernel, arguments), warps, **options)
    if nvidia:
        registers = _number(r"Used (\d+) registers", log)
        spilled = max(_number(rf"(\d+) bytes {what}", log) for what in ("stack frame", "spill stores", "spill loads"))
    else:
        assembly = binary.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s*(\d+)", assembly)
        # Scalars kept in lanes of a vector register are spills by name (sgpr_spill_count), but no memory.
        spilled = _number(r"\.private_segment_fixed_size:\s*(\d+)", assembly)
        spilled = max(spilled, 4 * _number(r"\.vgpr_spill_count:\s*(\d+)", assembly))
    shared = binary.metadata.shared
    programs = programs_resident(registers, shared, warps, processor)
    return Compiled(job, registers, shared, spilled, programs, without_places(binary.asm["ttir"]))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"no {pattern!r} in: {text[-2000:]}"
    return int(found[1])


def without_places(ir: str) -> str:
    """IR without the file names and line numbers of its operations."""
    lines = (re.sub(r"\s*loc\((?:#\w+|unknown|\"[^\"]*\"\(#\w+\))\)", "", line) for line in ir.splitlines())
    return "\n".join(line for line in lines if not line.startswith("#loc"))


def jobs(targets: Iterable[str], dtypes: Iterable[str], everything: bool = False) -> Iterator[Job]:
    """Every kernel of every set. Sweeps that take the same are one kernel."""
    for target in targets:
        nvidia = PROCESSORS[target].target.backend == "cuda"
        for dtype in dtypes:
            seen: set[tuple[Any, ...]] = set()
            for stats in SETS:
                for kernel in launches(stats, dtype, everything, nvidia):
                    key = identity(stats, kernel)
                    if key not in seen:
                        seen.add(key)
                        yield Job(stats, kernel, dtype, target, everything)


def identity(stats: tuple[str, ...], kernel: str) -> tuple[Any, ...]:
    """Equal for kernels that are the same."""
    if kernel == "scale_kernel":
        return (kernel,)
    if kernel == "mark_kernel":
        return kernel, launch.bound_for(stats, False).tail
    return (kernel, launch.bound_for(stats, False).first) if kernel == "sweep_kernel" else (kernel, stats)


def compile_all(wanted: list[Job]) -> Iterator[Compiled]:
    """In a process a core, with a cache of their own. In the order of `wanted`."""
    with tempfile.TemporaryDirectory() as cache:
        pool = ProcessPoolExecutor(
            min(8, len(os.sched_getaffinity(0))), multiprocessing.get_context("spawn"), _start, (cache,)
        )
        with pool:
            yield from pool.map(compiled, wanted, chunksize=4)


def _start(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache
    torch.set_num_threads(1)


def all_jobs() -> list[Job]:
    """Every kernel for every target and dtype, and with everything on for one target of each maker."""
    return [*jobs(PROCESSORS, DTYPES), *jobs(["sm_90", "gfx942"], ["bf16"], everything=True)]


def table(done: Iterable[Compiled]) -> str:
    """JSON, a kernel a line. `statistics` are the sets that share it, each with + between its names."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for one in done:
        job = one.job
        row = rows.setdefault(
            identity(job.stats, job.kernel), {"kernel": job.kernel, "statistics": _sharing(job.stats, job.kernel)}
        )
        variant = "everything on, " * job.everything + job.dtype
        row.setdefault(variant, {})[job.target] = [one.registers, one.shared, one.spilled, one.programs]
    head = {
        "triton": triton.__version__,
        "cells": ["registers a thread", "shared bytes a program", "spilled bytes", "programs a processor holds"],
    }
    lines = ",\n".join("    " + json.dumps(row) for row in rows.values())
    return json.dumps(head, indent=2)[:-2] + f',\n  "kernels": [\n{lines}\n  ]\n}}\n'


def _sharing(stats: tuple[str, ...], kernel: str) -> list[str]:
    sets = [other for other in SETS if identity(other, kernel) == identity(stats, kernel)]
    return ["+".join(other) for other in sets]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every Triton kernel and write the table of what it takes.")
    parser.add_argument("--output", type=Path, default=TABLE, help="default: benchmarks/triton_resources.json")
    options = parser.parse_args()
    from rich.progress import track

    wanted = all_jobs()
    done = list(track(compile_all(wanted), "compiling", len(wanted)))
    options.output.write_text(table(done))
    over = [one for one in done if not one.within_budget]
    for one in over:
        print(f"over budget: {one.job}: {one.spilled} bytes spilled, {one.programs} programs")
    raise SystemExit(bool(over))


if __name__ == "__main__":
    main()
