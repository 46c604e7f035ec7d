"""Bars of time per implementation and case on a logarithmic scale, and the time of copying where logits are read.

python -m kldiv_kernels.benchmarking.plot results.json times.png
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from kldiv_kernels.benchmarking import peers

COLOURS = {
    peers.OURS: "#1b7837", peers.IN_PLACE: "#a6dba0", peers.LOGPROB: "#7fbf7b", peers.GEMMS: "#c2a5cf",
    "compile": "#2166ac", "eager": "#888888", "trl": "#d6604d", peers.GATHER: "#888888",
}  # fmt: skip


def draw(record: dict[str, Any]) -> Figure:
    """`record` as `benchmarking.run` writes it into results.json."""
    cases, about = record["cases"], record["machine"]
    names = list(dict.fromkeys(one["name"] for case in cases for one in _timed(case)))
    # Figure without pyplot: no display, no global state.
    # Four digits and a comma are wider than a bar that has room for three.
    bar = 0.43 if any(one["seconds"] >= 1 for case in cases for one in _timed(case)) else 0.35
    figure = Figure(figsize=(max(8.0, (bar * len(names) + 0.3) * len(cases) + 1), 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for x, case in enumerate(cases):
        _bars(axes, x, case, names)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_ylabel("milliseconds for loss and gradient")
    axes.set_xticks(range(len(cases)), [case["case"].replace(" ", "\n") for case in cases], fontsize=9)
    hidden = next((case["hidden"] for case in cases if case.get("hidden")), None)
    width = "" if hidden is None else f", hidden size {hidden:,}"
    axes.set_title(
        f"{cases[0]['rows']:,} tokens × {cases[0]['vocab']:,} columns{width}   "
        f"{about['cpu']}, {about['threads']} threads, PyTorch {about['torch']}",
        fontsize=9,
    )
    axes.margins(y=0.12)
    # One entry a name, whichever cases have it; those of the bars in the order of the bars.
    entries = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        entries.values(), entries.keys(), fontsize=9, frameon=False, loc="outside upper center",
        ncols=legend_columns(len(entries), figure.get_figwidth()),
    )  # fmt: skip
    return figure


def save(record: dict[str, Any], path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    draw(record).savefig(partial, format="png")
    os.replace(partial, path)


def legend_columns(entries: int, width_inches: float) -> int:
    """How many entries a line of a legend takes, with lines of equal length: an entry needs up to 1.9 inches."""
    lines = -(-entries // max(1, int(width_inches / 1.9)))
    return -(-entries // lines)


def _timed(case: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in case["implementations"] if "error" not in one]


def _bars(axes: Axes, x: int, case: dict[str, Any], names: list[str]) -> None:
    """Side by side around `x`, without gaps for implementations that the case does not have."""
    width = 0.8 / len(names)
    timed = sorted(_timed(case), key=lambda one: names.index(one["name"]))
    for index, one in enumerate(timed):
        name, milliseconds = one["name"], one["seconds"] * 1e3
        bars = axes.bar(
            x + (index - (len(timed) - 1) / 2) * width, milliseconds, width * 0.95,
            label=peers.LABELS.get(name, name), color=COLOURS.get(name),
        )  # fmt: skip
        text = f"{milliseconds:.3g}" if milliseconds < 100 else f"{milliseconds:,.0f}"
        axes.bar_label(bars, labels=[text], fontsize=8, padding=1)
    if case["floor_seconds"] is None:
        return
    reach = max(1, len(timed)) * width / 2 + 0.03
    axes.hlines(
        case["floor_seconds"] * 1e3, x - reach, x + reach,
        colors="black", linestyles="dashed", label="copying the same bytes",
    )  # fmt: skip


def main() -> None:
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    save(json.loads(source.read_text(encoding="utf-8")), target)


if __name__ == "__main__":
    main()
