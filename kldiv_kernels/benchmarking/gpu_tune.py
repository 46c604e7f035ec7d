"""The one-read kernel's plans against each other: every cluster and number of stages that fits, in turns.

    python -m kldiv_kernels.benchmarking.gpu_tune --output tune.json --seconds 60

`csrc/plan.cpp` chooses by these numbers. The results so far are written after each case.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import kldiv_kernels as kk
from kldiv_kernels.benchmarking import gpu_peers
from kldiv_kernels.benchmarking.defaults import LOGPROB_ENTROPY
from kldiv_kernels.benchmarking.gpu import Device, measure, write_json
from kldiv_kernels.benchmarking.gpu_cases import LARGE_VOCAB, LARGE_VOCAB_ROWS, GpuCase

PLANS = (
    "two-sweep",
    *(f"cluster={cluster},stages={stages}" for cluster in (1, 2, 4, 8, 16) for stages in (1, 2, 3, 4)),
)


def cases() -> list[GpuCase]:
    """Large batches by vocabulary, then few rows, then rows short enough that two sweeps might be faster."""
    large = [
        GpuCase("forward_kl"), GpuCase("js"), GpuCase(LOGPROB_ENTROPY, known=True),
        GpuCase("forward_kl", LARGE_VOCAB_ROWS, LARGE_VOCAB), GpuCase("forward_kl", vocab=128_256),
        GpuCase("forward_kl", vocab=32_000), GpuCase(LOGPROB_ENTROPY, vocab=32_000, known=True),
    ]  # fmt: skip
    few = [GpuCase("forward_kl", rows) for rows in (1, 16, 64)]
    short = [GpuCase("forward_kl", 65_536, vocab) for vocab in (1024, 2048, 4096, 8192)]
    return [*large, *few, *short]


def quick_cases() -> list[GpuCase]:
    return [GpuCase("forward_kl", 3, 136)]


def run(chosen: list[GpuCase], device: Device, seconds: float, output: Path) -> dict[str, Any]:
    deadline = time.perf_counter() + seconds
    content: dict[str, Any] = {"plans": PLANS, "rows": [], "left_out": []}
    for case in chosen:
        title = f"{case.name}, {case.rows} × {case.vocab}"
        left = deadline - time.perf_counter()
        if left <= 0:
            content["left_out"].append(title)
            continue
        rows = measure(case, device, min(3.0, left), ["cuda", *(f"cuda {plan}" for plan in PLANS)])
        device.free()
        content["rows"] += rows
        write_json(output, content)
        timed = sorted((row["milliseconds"], row["implementation"]) for row in rows if row["milliseconds"])
        chosen_time = next((row["milliseconds"] for row in rows if row["implementation"] == "cuda"), None)
        best = ", ".join(f"{name} {milliseconds:.4g}" for milliseconds, name in timed[:4])
        print(f"{title}: chosen {chosen_time or float('nan'):.4g} ms; best: {best}", flush=True)
    write_json(output, content)
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the plans of the cuda backend; see the head of this file.")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=60, help="time for everything (default: 60)")
    parser.add_argument("--quick", action="store_true", help="one tiny case")
    options = parser.parse_args()
    if "cuda" not in gpu_peers.ours() or not torch.cuda.is_available():
        raise SystemExit(f"the cuda backend cannot be used here: {kk.backends().get('cuda')}")
    run(quick_cases() if options.quick else cases(), Device("cuda"), options.seconds, options.output)


if __name__ == "__main__":
    main()
