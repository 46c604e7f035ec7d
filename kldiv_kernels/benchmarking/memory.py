"""Peak memory of one loss and backward beyond its inputs, measured in a process of its own.

The process makes the inputs, runs once (libraries load, compilers compile), frees the gradient, has the kernel
forget its highest resident size, and runs again: the new high-water mark minus the resident size before is what
the call needed, gradients included.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from kldiv_kernels.benchmarking import peers
from kldiv_kernels.benchmarking.cases import Case, dtype, dtype_name

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class PeakMemory:
    """extra_bytes, or why it could not be measured."""

    extra_bytes: int | None
    reason: str = ""


def measure_in_subprocess(case: Case, name: str, threads: int) -> PeakMemory:
    if not _CLEAR_REFS.exists():
        return PeakMemory(None, "needs Linux: /proc/self/clear_refs")
    arguments = [name, case.kind, dtype_name(case.dtype), *map(str, (case.rows, case.vocab, case.hidden, threads))]
    done = subprocess.run(
        [sys.executable, "-m", __name__, *arguments], capture_output=True, text=True, check=False
    )  # fmt: skip
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return PeakMemory(None, lines[-1] if lines else f"exit code {done.returncode}")
    return PeakMemory(json.loads(done.stdout.splitlines()[-1]))


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")


def extra_bytes(case: Case, name: str) -> int:
    """The measurement itself, in this process; see the head of this file."""
    inputs = case.inputs()
    loss = peers.build(name, case)

    def run() -> None:
        loss(inputs).backward()  # type: ignore[no-untyped-call]

    peers.prepare(loss, inputs)
    run()
    inputs.forget_gradients()
    peers.prepare(loss, inputs)
    gc.collect()
    # What the allocator kept of freed memory would hide what the next run needs.
    ctypes.CDLL(None).malloc_trim(0)
    before = _status_bytes("VmRSS")
    _CLEAR_REFS.write_text("5")
    run()
    return _status_bytes("VmHWM") - before


def _main() -> None:
    name, kind, dtype_text, *numbers = sys.argv[1:]
    rows, vocab, hidden, threads = map(int, numbers)
    torch.set_num_threads(threads)
    print(json.dumps(extra_bytes(Case(kind, dtype(dtype_text), rows, vocab, hidden), name)))


if __name__ == "__main__":
    _main()
