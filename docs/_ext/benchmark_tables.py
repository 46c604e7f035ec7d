"""The directive `benchmark-table`: the results of `kldiv bench` in benchmarks/results, by the name of their file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from docutils import nodes
from package_tables import Cell, code, table
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

_RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
_OURS = "kldiv_kernels"
_PEERS = {"gemms": "the multiplications alone", "compile": "torch.compile", "eager": "eager", "trl": "TRL 1.16"}


def _milliseconds(one: dict[str, Any] | None) -> str:
    if one is None:
        return ""
    times = f"{1e3 * one['seconds']:.0f} ms"
    return times if one["name"] == _OURS else f"{times} ({one['ours_is_faster_by']:.1f}×)"


def _units(one: dict[str, Any] | None) -> str:
    units = None if one is None else one.get("peak_extra_units")
    return "" if units is None else f"{units:.1f}"


def cells(runs: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Cell]]]:
    """Header and rows: a case a row, of the runs in results.json."""
    cases = [case for run in runs for case in run["cases"]]
    columns = [_OURS, *(peer for peer in _PEERS if any(peer in _by_name(case) for case in cases))]
    header = ["case", *(_PEERS.get(name, name) for name in columns), "× copy", "extra memory, in the same order"]
    return header, [_row(case, columns) for case in cases]


def _row(case: dict[str, Any], columns: Sequence[str]) -> list[Cell]:
    done = _by_name(case)
    memory = ", ".join(_units(done[name]) or "–" for name in columns if name in done)
    size = " × ".join(f"{case[name]:,}" for name in ("rows", "vocab", "hidden") if case.get(name) is not None)
    times_copy = done[_OURS]["times_copy"]
    return [
        [code(case["kind"]), nodes.Text(f" {case['dtype']}, {size}")],
        *(_milliseconds(done.get(column)) for column in columns),
        "" if times_copy is None else f"{times_copy:.1f}",
        memory if any(_units(done[name]) for name in columns if name in done) else "not measured",
    ]


def _by_name(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in case["implementations"] if "error" not in one}


class BenchmarkTable(SphinxDirective):
    """Argument: names of files without their ending, separated by spaces."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        found = []
        for name in self.arguments[0].split():
            path = _RESULTS / f"{name}.json"
            self.env.note_dependency(str(path))
            found.append(json.loads(path.read_text()))
        return [table(*cells(found))]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("benchmark-table", BenchmarkTable)
    return {"parallel_read_safe": True}
