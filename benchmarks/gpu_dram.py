"""One call of each kind between the marks that `ncu` profiles, for the bytes that it moves through main memory.

    ncu --profile-from-start off ... python3 benchmarks/gpu_dram.py calls.json

benchmarks/gpu_check.py runs it and reads what ncu says. A kernel of PyTorch that only spins stands before each call, so
that the kernels of one can be told from those of the next.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import kldiv_kernels as kk
from kldiv_kernels.benchmarking import gpu_peers
from kldiv_kernels.benchmarking.cases import LOGPROB_ENTROPY
from kldiv_kernels.benchmarking.gpu_cases import GpuCase

CASES = [
    GpuCase("forward_kl"),
    GpuCase("js"),
    GpuCase(LOGPROB_ENTROPY, known=True),
    GpuCase("forward_kl", gradient=False),
    GpuCase(LOGPROB_ENTROPY),
]


def planned_bytes(case: GpuCase) -> int | str:
    """What `kldiv_kernels.plan` expects of the cuda backend, or why it cannot say."""
    # It has no name for statistics with known coefficients: theirs is the floor.
    if case.known:
        return case.floor_bytes
    what: dict[str, Any] = {"kind": case.kind} if case.gradient else {"stats": [case.kind]}
    if case.kind == LOGPROB_ENTROPY:
        what = {"stats": ["logprob", "entropy"]}
    try:
        return kk.plan(rows=case.rows, vocab=case.vocab, device="cuda", gradient=case.gradient, **what).bytes
    except ImportError:
        return "kldiv_kernels.plan needs _C, which is not built for this Python"


def main() -> None:
    calls = []
    for case in CASES:
        inputs = case.inputs("cuda", 0)
        for backend in gpu_peers.ours():
            function = gpu_peers.build(backend, case)
            gpu_peers.run(case, function, inputs)
            inputs.logits.grad = None
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStart()
            torch.cuda._sleep(1)
            gpu_peers.run(case, function, inputs)
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStop()
            inputs.logits.grad = None
            calls.append(
                {
                    "case": case.name, "rows": case.rows, "vocab": case.vocab, "backend": backend,
                    "floor_bytes": case.floor_bytes, "planned": planned_bytes(case) if backend == "cuda" else None,
                }
            )  # fmt: skip
        del inputs
    Path(sys.argv[1]).write_text(json.dumps(calls))


if __name__ == "__main__":
    main()
