"""Timing: the implementations of a case in turns, A B A B, with copying measured in the same turns.

A time is that of loss and backward together, from logits (or hidden states and a weight) without a gradient to those
with one. On a machine that slows down or is shared, turns give every implementation the same share of the bad moments.
In its turn each runs twice, and the second call counts: the first one takes back the memory that the one before it gave
to the system, which on a virtual machine can cost several times the call itself and is not a training loop's lot.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kldiv_kernels import machine
from kldiv_kernels.benchmarking import peers
from kldiv_kernels.benchmarking.cases import Against, Case, Inputs, Target
from kldiv_kernels.benchmarking.memory import PeakMemory

_LEAST_COPY_BYTES = 256 << 20


@dataclass
class Result:
    """What one implementation did on one case. `error` is set where it could not run, and then nothing else."""

    name: str
    seconds: list[float] = field(default_factory=list)
    first_call_seconds: float | None = None
    loss: float | None = None
    memory: PeakMemory | None = None
    # By one of several processes, for the values and the gradient.
    sent_bytes_per_row: float | None = None
    error: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class CaseResult:
    case: Case
    results: list[Result]
    copy_bytes_per_second: float

    def __getitem__(self, name: str) -> Result | None:
        return next((result for result in self.results if result.name == name and result.error is None), None)

    @property
    def floor_seconds(self) -> float | None:
        """The time of moving the case's 3u (2u) at the copy bandwidth measured beside it; None from hidden states."""
        floor = self.case.floor_bytes
        return None if floor is None else floor / self.copy_bytes_per_second

    def times_copy(self, result: Result) -> float | None:
        return None if self.floor_seconds is None else result.median / self.floor_seconds

    def nanoseconds(self, result: Result) -> float:
        """A column and core, where a thread has a core of its own."""
        return 1e9 * result.median * torch.get_num_threads() / (self.case.rows * self.case.vocab)

    def speedup(self, result: Result) -> float | None:
        """How many times faster ours is."""
        ours = self[peers.OURS]
        return None if ours is None else result.median / ours.median

    def measured(self, against: Against) -> float | None:
        """The value that a target bounds, or None where it was not measured."""
        ours = self[peers.OURS]
        if ours is None:
            return None
        if against == "copy":
            return self.times_copy(ours)
        if against == "memory":
            extra = None if ours.memory is None else ours.memory.extra_bytes
            return None if extra is None else extra / self.case.unit_bytes
        if against == "sent":
            return None if ours.sent_bytes_per_row is None else ours.sent_bytes_per_row / 4
        peer = self[against]
        if peer is None:
            return None
        return ours.median / peer.median if against in ("logprob", "gemms") else self.speedup(peer)

    def targets(self) -> list[tuple[Target, float | None]]:
        return [(target, self.measured(target.against)) for target in self.case.targets]


class Copy:
    """Copies a tensor that no cache holds into one allocated beforehand; its bytes count twice, read and written.

    Copies use PyTorch's threads, as the losses do. A processor that first reads the lines that it then writes
    moves more than is counted, in the copy and in the losses alike.
    """

    def __init__(self) -> None:
        elements = max(_LEAST_COPY_BYTES, 4 * machine.last_level_cache_bytes()) // 4
        self.source = torch.ones(elements)
        self.target = torch.zeros(elements)
        self.bytes = 2 * 4 * elements

    def seconds(self) -> float:
        start = time.perf_counter()
        self.target.copy_(self.source)
        return time.perf_counter() - start


def loss_and_gradient(loss: peers.Loss, inputs: Inputs) -> Tensor:
    value = loss(inputs)
    value.backward()  # type: ignore[no-untyped-call]
    return value


def once(loss: peers.Loss, inputs: Inputs) -> tuple[float, float]:
    """Seconds of one forward and backward on a gradient not yet there, and the loss."""
    inputs.forget_gradients()
    peers.prepare(loss, inputs)
    start = time.perf_counter()
    value = loss_and_gradient(loss, inputs)
    return time.perf_counter() - start, value.item()


def measure(case: Case, names: list[str], repeats: int, step: Callable[[str], None]) -> CaseResult:
    """One call of each to warm up, then `repeats` turns; `step` hears what comes next."""
    inputs, copy = case.inputs(), Copy()
    results = [Result(name) for name in names]
    losses: dict[str, peers.Loss] = {}
    for result in results:
        step(f"{case.name}: {result.name}, first call")
        # Whatever a peer raises is its result: it is reported, and the others go on.
        try:
            losses[result.name] = peers.build(result.name, case)
            result.first_call_seconds, result.loss = once(losses[result.name], inputs)
        except Exception as error:
            losses.pop(result.name, None)
            result.error = describe_error(error)
    copy.seconds()
    copies: list[float] = []
    for turn in range(repeats):
        step(f"{case.name}: turn {turn + 1} of {repeats}")
        for result in results:
            if result.name in losses:
                once(losses[result.name], inputs)
                seconds, _ = once(losses[result.name], inputs)
                result.seconds.append(seconds)
        copies.append(copy.seconds())
    inputs.forget_gradients()
    return CaseResult(case, results, copy.bytes / statistics.median(copies))


def describe_error(error: Exception) -> str:
    """One line for a table."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]
