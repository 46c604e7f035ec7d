"""A whole run: every case timed, then its memory measured, results on disk after each case."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import kldiv_kernels as kk
from kldiv_kernels import machine
from kldiv_kernels.backends import native
from kldiv_kernels.benchmarking import parallel, peers
from kldiv_kernels.benchmarking.cases import Case, dtype_name
from kldiv_kernels.benchmarking.measure import CaseResult, Result, measure
from kldiv_kernels.benchmarking.memory import measure_in_subprocess

RESULTS, PLOT = "results.json", "times.png"


@dataclass(frozen=True)
class Settings:
    cases: list[Case]
    output: Path
    peers: tuple[str, ...] = peers.PEERS
    repeats: int = 7
    memory: bool = True

    @property
    def steps(self) -> int:
        """How many steps `run` announces."""
        total = 0
        for case in self.cases:
            names = len(peers.names_for(case, self.peers))
            total += names + self.repeats + (names if self.measures_memory(case) else 0)
        return total

    def measures_memory(self, case: Case) -> bool:
        """Of one process."""
        return self.memory and case.ranks == 1


def run(settings: Settings, step: Callable[[str], None]) -> list[CaseResult]:
    """All cases, into the folder `settings.output`; `step` hears what comes next.

    results.json is written after each case: a run that is stopped leaves the cases done.
    """
    about: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            **machine.describe(),
            "instruction_set": native.instruction_set() if native.load() is None else "none",
        },
        "repeats": settings.repeats,
        "time": "median seconds of forward + backward, implementations in turns, in each turn the second of two calls",
        "copy": "copy_ of a float32 tensor larger than the last-level cache into one allocated before, in the same "
        "turns; bytes read and bytes written both count",
    }
    done: list[CaseResult] = []
    for case in settings.cases:
        names = peers.names_for(case, settings.peers)
        measured = measure if case.ranks == 1 else parallel.measure
        result = measured(case, names, settings.repeats, step)
        if settings.measures_memory(case):
            for implementation in result.results:
                step(f"{case.name}: {implementation.name}, memory")
                if implementation.error is None:
                    implementation.memory = measure_in_subprocess(case, implementation.name, torch.get_num_threads())
        done.append(result)
        write_json(settings.output / RESULTS, {**about, "cases": [as_json(one) for one in done]})
    return done


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: a run that is stopped leaves the former file."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


def as_json(result: CaseResult) -> dict[str, Any]:
    case = result.case
    return {
        "case": case.name,
        "kind": case.kind,
        "dtype": dtype_name(case.dtype),
        "rows": case.rows,
        "vocab": case.vocab,
        "hidden": case.hidden if case.from_hidden else None,
        "processes": case.ranks,
        "floor": None if case.floor_units is None else f"{case.floor_units}u",
        "floor_bytes": case.floor_bytes,
        "copy_gb_per_second": result.copy_bytes_per_second / 1e9,
        "floor_seconds": result.floor_seconds,
        "plan": asdict(kk.plan(rows=case.rows, vocab=case.vocab // case.ranks, dtype=case.dtype, **case.planned)),
        "implementations": [_implementation(result, one) for one in result.results],
        "targets": [
            {"target": target.text(), "measured": value, "met": None if value is None else target.met(value)}
            for target, value in result.targets()
        ],
    }


def _implementation(result: CaseResult, one: Result) -> dict[str, Any]:
    if one.error is not None:
        return {"name": one.name, "error": one.error}
    extra = None if one.memory is None else one.memory.extra_bytes
    floor, times_copy = result.case.floor_bytes, result.times_copy(one)
    return {
        "name": one.name,
        "seconds": one.median,
        "all_seconds": one.seconds,
        "ns_per_column_and_core": result.nanoseconds(one),
        "first_call_seconds": one.first_call_seconds,
        "useful_gb_per_second": None if floor is None else floor / one.median / 1e9,
        "share_of_copy_bandwidth": None if times_copy is None else 1 / times_copy,
        "times_copy": times_copy,
        "ours_is_faster_by": result.speedup(one),
        "peak_extra_bytes": extra,
        "peak_extra_units": None if extra is None else extra / result.case.unit_bytes,
        "peak_extra_unknown": one.memory.reason or None if one.memory else "not asked for",
        "sent_bytes_per_row": one.sent_bytes_per_row,
        "loss": one.loss,
    }
