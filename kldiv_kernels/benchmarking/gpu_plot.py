"""A panel a case: milliseconds of each implementation at each shape, and the time of copying the bytes it must move.

python -m kldiv_kernels.benchmarking.gpu_plot gpu-check.json gpu-check.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from kldiv_kernels.benchmarking import peers
from kldiv_kernels.benchmarking.plot import COLOURS, legend_columns

_COLOURS = {
    **COLOURS, "triton": "#1b7837", "cuda": "#00441b", "liger": "#9970ab", "liger-grpo": "#c2a5cf",
}  # fmt: skip
_LABELS = {
    **peers.LABELS,
    "triton": "kldiv_kernels, Triton",
    "cuda": "kldiv_kernels, CUDA",
    "liger": "Liger",
    "liger-grpo": "Liger, GRPO",
}


def draw(rows: list[dict[str, Any]], title: str) -> Figure:
    """Rows as `benchmarking.gpu` writes them."""
    timed = [row for row in rows if row["milliseconds"] is not None]
    if not timed:
        raise ValueError("no case was timed: there is nothing to plot")
    names = list(dict.fromkeys(row["implementation"] for row in timed))
    cases = list(dict.fromkeys(row["case"] for row in timed))
    columns = min(2, len(cases))
    lines = -(-len(cases) // columns)
    shapes = max(len(_shapes([row for row in timed if row["case"] == case])) for case in cases)
    # A bar takes 0.25 inches at least, so that the numbers above neighbours do not meet.
    width = columns * max(5.0, 1 + 0.25 * len(names) * 1.25 * shapes)
    figure = Figure(figsize=(width, 3.4 * lines + 1), dpi=130, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for index, case in enumerate(cases):
        _panel(axes[index // columns][index % columns], case, [row for row in timed if row["case"] == case], names)
    for index in range(len(cases), lines * columns):
        axes[index // columns][index % columns].set_axis_off()
    handles: list[Artist] = [Patch(color=_COLOURS.get(name), label=_LABELS.get(name, name)) for name in names]
    handles.append(Line2D([], [], color="black", linestyle="dashed", linewidth=0.8, label="copying the same bytes"))
    figure.legend(
        handles=handles, ncols=legend_columns(len(handles), width), loc="outside lower center", fontsize=9,
        frameon=False,
    )  # fmt: skip
    figure.suptitle(title, fontsize=10)
    return figure


def save(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    draw(rows, title).savefig(path, format="png")


def _shapes(rows: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return sorted({(row["rows"], row["vocab"]) for row in rows})


def _panel(axes: Axes, case: str, rows: list[dict[str, Any]], names: list[str]) -> None:
    shapes = _shapes(rows)
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        times = {(row["rows"], row["vocab"]): row["milliseconds"] for row in rows if row["implementation"] == name}
        at = [x + (index - (len(names) - 1) / 2) * width for x, shape in enumerate(shapes) if shape in times]
        values = [times[shape] for shape in shapes if shape in times]
        bars = axes.bar(at, values, width * 0.95, color=_COLOURS.get(name))
        axes.bar_label(
            bars, fmt=lambda value: f"{value:.2g}" if value < 100 else f"{value:,.0f}", fontsize=6, padding=1
        )
    floors = {
        (row["rows"], row["vocab"]): row["milliseconds"] * row["share_of_copy"] for row in rows if row["share_of_copy"]
    }
    known = [x for x, shape in enumerate(shapes) if shape in floors]
    axes.hlines(
        [floors[shapes[x]] for x in known], [x - 0.45 for x in known], [x + 0.45 for x in known],
        colors="black", linestyles="dashed", linewidth=0.8,
    )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_xticks(range(len(shapes)), [f"{n:,} tokens\n× {v:,}" for n, v in shapes], fontsize=7)
    axes.set_ylabel("milliseconds", fontsize=8)
    passes = rows[0]["floor"].removesuffix("u")
    moved = f"at least {passes} passes over the logits" if passes != "0" else "of logits that are not kept"
    axes.set_title(f"{case}, bf16: {moved}", fontsize=9)
    axes.margins(y=0.15)


def main() -> None:
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    content = json.loads(source.read_text())
    versions = content["versions"]
    title = f"{content['device']['name']}, PyTorch {versions['torch']}, Triton {versions['triton']}"
    save(content["benchmark"]["rows"], title, target)


if __name__ == "__main__":
    main()
