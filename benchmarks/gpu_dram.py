"""One call of each kind between the marks that `ncu` profiles, for the bytes that it moves through main memory.

    ncu --profile-from-start off ... python3 benchmarks/gpu_dram.py calls.json

benchmarks/gpu_check.py runs it and reads what ncu says. A kernel of PyTorch that only spins stands before each call, so
that the kernels of one can be told from those of the next.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import kldiv_kernels as kk
from kldiv_kernels.benchmarking import gpu_peers
from kldiv_kernels.benchmarking.gpu_cases import GpuCase, first_cases


def planned_bytes(case: GpuCase, target: str) -> int:
    """What `kldiv_kernels.plan` expects of the cuda backend."""
    # It has no name for statistics with known coefficients: theirs is the floor.
    if case.known:
        return case.floor_bytes
    what = case.on_cpu.planned if case.gradient or not case.two_tensors else {"stats": [case.kind]}
    return kk.plan(rows=case.rows, vocab=case.vocab, device=target, gradient=case.gradient, **what).bytes


def profiled(work: Callable[[], object]) -> None:
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    torch.cuda._sleep(1)
    work()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def run(cases: list[GpuCase], device: str, target: str) -> list[dict[str, Any]]:
    """The calls that were made, in their order."""
    calls = []
    for case in cases:
        inputs = case.inputs(device, 0)
        for backend in gpu_peers.ours():
            print(f"{backend} {case.name} ...", flush=True)
            work = partial(gpu_peers.run, case, gpu_peers.build(backend, case), inputs)
            # The first call compiles and loads.
            work()
            inputs.forget_gradients()
            profiled(work)
            inputs.forget_gradients()
            planned = planned_bytes(case, target) if backend == "cuda" else None
            calls.append(
                {
                    "case": case.name, "rows": case.rows, "vocab": case.vocab, "backend": backend,
                    "floor_bytes": case.floor_bytes, "planned": planned,
                }
            )  # fmt: skip
    return calls


def main() -> None:
    Path(sys.argv[1]).write_text(json.dumps(run(first_cases(), "cuda", "cuda")))


if __name__ == "__main__":
    main()
