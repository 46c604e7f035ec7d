"""Bars of time per implementation and case on a logarithmic scale, and the time of copying below each case."""

from __future__ import annotations

import os
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from kldiv_kernels import machine
from kldiv_kernels.benchmarking import peers
from kldiv_kernels.benchmarking.measure import CaseResult

_COLOURS = {peers.OURS: "#1b7837", "compile": "#2166ac", "eager": "#888888", "trl": "#d6604d"}
_LABELS = {
    "compile": "torch.compile",
    "eager": "PyTorch eager",
    "trl": "TRL",
    peers.LOGPROB: "our log-probability loss",
}


def save(results: list[CaseResult], path: Path) -> None:
    names = list(dict.fromkeys(one.name for result in results for one in result.results))
    width_inches = max(8.0, 1.3 * len(results) + 2)
    # Figure without pyplot: no display, no global state.
    figure = Figure(figsize=(width_inches, 5), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        offset = (index - (len(names) - 1) / 2) * width
        at = [(x, one.median * 1e3) for x, result in enumerate(results) if (one := result[name])]
        bars = axes.bar(
            [x + offset for x, _ in at], [time for _, time in at], width * 0.95,
            label=_LABELS.get(name, name), color=_COLOURS.get(name),
        )  # fmt: skip
        axes.bar_label(bars, fmt=lambda time: f"{time:.3g}" if time < 100 else f"{time:.0f}", fontsize=7, padding=1)
    floors = [result.floor_seconds * 1e3 for result in results]
    axes.hlines(
        floors, [x - 0.45 for x in range(len(results))], [x + 0.45 for x in range(len(results))],
        colors="black", linestyles="dashed", label="copying the same bytes",
    )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel("loss + dlogits [ms]")
    axes.set_xticks(range(len(results)), [result.case.name.replace(" ", "\n") for result in results], fontsize=8)
    case, about = results[0].case, machine.describe()
    axes.set_title(
        f"N = {case.rows:,}, V = {case.vocab:,}   {about['cpu']}, {about['threads']} threads, PyTorch {about['torch']}",
        fontsize=9,
    )
    axes.margins(y=0.15)
    figure.legend(fontsize=8, ncols=len(names) + 1, loc="outside upper center")
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=150, format="png")
    os.replace(partial, path)
