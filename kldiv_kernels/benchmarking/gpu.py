"""The benchmark on a GPU: the implementations of a case in turns, A B A B, with copying measured in the same turns.

    python -m kldiv_kernels.benchmarking.gpu --output benchmark.json --seconds 150

Needs PyTorch and Triton alone. The results so far are written after each case, and no case is begun that would end
after the deadline. `--device cpu` times tiny cases with a clock: a test of the benchmark, not of speed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kldiv_kernels.benchmarking import gpu_peers
from kldiv_kernels.benchmarking.cases import Inputs, dtype_name
from kldiv_kernels.benchmarking.gpu_cases import GpuCase, cases, first_cases, quick_cases, targets
from kldiv_kernels.benchmarking.measure import describe_error
from kldiv_kernels.benchmarking.peers import GEMMS

OUT_OF_MEMORY = "out of memory"
# Above this relative difference two implementations do not compute the same loss.
DISAGREES = 5e-3
# Turns: at least, at most.
ROUNDS, ROUNDS_ON_CPU = (5, 25), (2, 2)
# Up to so many rows the launches take longer than the kernels: the time of a call as Python sees it is told too.
FEW_ROWS = 64
# A case with torch.compile begins only if this many seconds are left; others need a few.
SECONDS_TO_COMPILE, SECONDS_A_CASE = 20, 8


class Device:
    """Times work and counts memory. On a GPU with events; work waits behind a spin of about a millisecond, so that
    all its launches are queued before the first of them runs, and the time is the GPU's, not Python's."""

    spin_cycles = 2_000_000

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.gpu = kind == "cuda"
        self.fewest_rounds, self.most_rounds = ROUNDS if self.gpu else ROUNDS_ON_CPU
        self.cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size if self.gpu else 0
        elements = (1 << 30 if self.gpu else 1 << 22) // 2
        self.source = torch.ones(elements, dtype=torch.bfloat16, device=kind)
        self.target = torch.zeros_like(self.source)

    def synchronize(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def timed(self, work: Callable[[], object]) -> Callable[[], float]:
        """Seconds, to be asked for after `synchronize`."""
        if not self.gpu:
            begin = time.perf_counter()
            work()
            took = time.perf_counter() - begin
            return lambda: took
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(self.spin_cycles)  # type: ignore[no-untyped-call]
        start.record()
        work()
        end.record()
        return lambda: float(start.elapsed_time(end)) / 1e3

    def call_seconds(self, work: Callable[[], object]) -> float:
        """From the call to the end of its work, as Python's clock sees it."""
        self.synchronize()
        begin = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - begin

    def extra_bytes(self, work: Callable[[], object]) -> int | None:
        """Most memory above what was allocated before."""
        if not self.gpu:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def copy_gb_per_second(self, seconds: float) -> float:
        """Bytes read and bytes written both count."""
        return 2 * self.source.numel() * 2 / seconds / 1e9

    def free(self) -> None:
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()


@dataclass
class Result:
    """What one implementation did on one case; `error` is set where it could not run."""

    name: str
    function: gpu_peers.Function | None = None
    times: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)
    first_call_seconds: float | None = None
    extra_bytes: int | None = None
    value: float | None = None
    error: str | None = None


def measure(case: GpuCase, device: Device, seconds: float, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Rows of results, of all implementations or those of these names. `seconds` are spent on the turns, after the
    first calls."""
    sets = _input_sets(case, device)
    turn = iter(range(1 << 62))

    def work(result: Result) -> tuple[Tensor, ...]:
        inputs = sets[next(turn) % len(sets)]
        assert result.function is not None
        outputs = gpu_peers.run(case, result.function, inputs)
        inputs.forget_gradients()
        return outputs

    results = [Result(name) for name in (gpu_peers.names_for(case) if names is None else names)]
    for result in results:
        # Before its first call: an implementation that hangs leaves its name.
        print(f"{result.name} {case.name} {case.rows} × {case.vocab} ...", flush=True)
        _guarded(result, device, partial(_first_calls, result, case, device, sets[0], work))
    running = [result for result in results if result.error is None]
    copies: list[Callable[[], float]] = []
    begin, rounds = time.perf_counter(), 0
    while running and rounds < device.most_rounds:
        if rounds >= device.fewest_rounds and time.perf_counter() - begin > seconds:
            break
        rounds += 1
        for result in running:
            _guarded(result, device, partial(_one_turn, result, device, work))
        running = [result for result in running if result.error is None]
        copies.append(device.timed(lambda: device.target.copy_(device.source)))
        device.synchronize()
    copy = device.copy_gb_per_second(statistics.median(read() for read in copies)) if copies else None
    if case.rows <= FEW_ROWS:
        for result in running:
            call = partial(work, result)
            result.calls = [device.call_seconds(call) for _ in range(device.fewest_rounds)]
    expected = next((result.value for result in results if result.name in gpu_peers.ours()), None)
    return [_row(case, result, copy, expected) for result in results]


def _input_sets(case: GpuCase, device: Device) -> list[Inputs]:
    """Enough inputs that none of them is still in the L2 cache when its turn comes again."""
    set_bytes = case.unit_bytes * (1 + case.two_tensors)
    count = min(512, max(1, -(-3 * device.cache_bytes // set_bytes)))
    return [case.inputs(device.kind, seed) for seed in range(count)]


def _guarded(result: Result, device: Device, step: Callable[[], None]) -> None:
    """Whatever a peer raises is its result: it is reported, and the others go on."""
    try:
        step()
        return
    except Exception as error:
        result.error = OUT_OF_MEMORY if _is_out_of_memory(error) else describe_error(error)
    # Here and not above: the exception holds the frames that hold the tensors.
    result.function = None
    device.free()


def _is_out_of_memory(error: Exception) -> bool:
    # Compiled code wraps it in an exception of its own.
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def _first_calls(
    result: Result, case: GpuCase, device: Device, inputs: Inputs, work: Callable[[Result], tuple[Tensor, ...]]
) -> None:
    begin = time.perf_counter()
    result.function = gpu_peers.build(result.name, case)
    # The value is that of the first set of inputs, the same for all.
    outputs = gpu_peers.run(case, result.function, inputs)
    inputs.forget_gradients()
    result.value = gpu_peers.value(case, outputs)
    del outputs
    device.synchronize()
    result.first_call_seconds = time.perf_counter() - begin
    result.extra_bytes = device.extra_bytes(lambda: work(result))


def _one_turn(result: Result, device: Device, work: Callable[[Result], object]) -> None:
    read = device.timed(lambda: work(result))
    device.synchronize()
    result.times.append(read())


def _row(case: GpuCase, result: Result, copy: float | None, expected: float | None) -> dict[str, Any]:
    seconds = statistics.median(result.times) if result.times and result.error is None else None
    # Nothing has to be moved from hidden states: no bandwidth is told.
    useful = None if seconds is None or not case.floor_bytes else case.floor_bytes / seconds / 1e9
    # Of copying as many bytes as the case has to move.
    floor = None if copy is None or not case.floor_bytes else case.floor_bytes / copy / 1e6
    agrees = None
    if result.value is not None and expected is not None and result.name not in (*gpu_peers.NOTES, GEMMS):
        agrees = abs(result.value - expected) <= DISAGREES * max(abs(expected), 1e-3)
    return {
        "case": case.name, "kind": case.kind, "gradient": case.gradient, "dtype": dtype_name(case.dtype),
        "rows": case.rows, "vocab": case.vocab, "implementation": result.name,
        "milliseconds": None if seconds is None else seconds * 1e3,
        "fastest_milliseconds": min(result.times) * 1e3 if seconds is not None else None,
        "call_milliseconds": statistics.median(result.calls) * 1e3 if result.calls else None,
        "rounds": len(result.times), "first_call_seconds": result.first_call_seconds,
        "floor": f"{case.floor_units}u", "floor_milliseconds": floor,
        "useful_gb_per_second": useful, "copy_gb_per_second": copy,
        "share_of_copy": None if useful is None or copy is None else useful / copy,
        "extra_bytes": result.extra_bytes,
        "gradient_bytes": case.unit_bytes if case.gradient and case.floor_bytes else 0,
        "extra_units": None if result.extra_bytes is None else result.extra_bytes / case.unit_bytes,
        "value": result.value, "agrees": agrees, "error": result.error, "note": gpu_peers.NOTES.get(result.name),
    }  # fmt: skip


def run(chosen: list[GpuCase], kind: str, seconds: float, output: Path) -> dict[str, Any]:
    """All cases that fit into `seconds`; `output` holds the results so far after each of them."""
    deadline = time.perf_counter() + seconds
    device = Device(kind)
    name = torch.cuda.get_device_name(0) if device.gpu else kind
    content: dict[str, Any] = {
        "device": name,
        "time": "median of turns, implementations in turns; events on a GPU; loss and backward, or what the case says",
        "missing_packages": gpu_peers.missing(), "ours": gpu_peers.ours(), "left_out": [], "rows": [], "targets": [],
    }  # fmt: skip
    for case in chosen:
        left = deadline - time.perf_counter()
        title = f"{case.name}, {case.rows} × {case.vocab}"
        if left < (SECONDS_TO_COMPILE if case.compiled and device.gpu else SECONDS_A_CASE if device.gpu else 0):
            content["left_out"].append(title)
            continue
        try:
            rows = measure(case, device, seconds=min(3.0, left / 4))
        except torch.OutOfMemoryError:
            content["left_out"].append(f"{title}: {OUT_OF_MEMORY} for the inputs")
            rows = []
        device.free()
        content["rows"] += rows
        content["targets"] = targets(content["rows"], content["ours"], name)
        write_json(output, content)
        print(f"{title}: " + ", ".join(_brief(row) for row in rows), flush=True)
    write_json(output, content)
    return content


def _brief(row: dict[str, Any]) -> str:
    time = row["milliseconds"]
    return f"{row['implementation']} {row['error'] if time is None else f'{time:.3g} ms'}"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: a run that is stopped leaves the former file."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark on a GPU; see the head of this file.")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=150, help="time for everything (default: 150)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--first", action="store_true", help="the six cases that say most, without torch.compile")
    which.add_argument("--quick", action="store_true", help="tiny cases")
    arguments = parser.parse_args()
    chosen = quick_cases() if arguments.quick else first_cases() if arguments.first else cases()
    run(chosen, arguments.device, arguments.seconds, arguments.output)


if __name__ == "__main__":
    main()
