"""Plots of runs, drawn without a display and without touching matplotlib's global state."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

History = Sequence[Mapping[str, Any]]
_KL = "held-out KL(teacher ∥ student)"


def curve(history: History, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the log entries that have `name`."""
    entries = [entry for entry in history if name in entry]
    return [entry["step"] for entry in entries], [entry[name] for entry in entries]


def plot_run(path: Path, history: History, *, title: str) -> None:
    """Training loss, held-out cross-entropy and, where there is a teacher, the held-out divergence from it."""
    panels = {
        "loss": "training loss",
        "eval_loss": "held-out cross-entropy",
        "eval_kl": _KL,
        "eval_topk_kl": "held-out top-k KL(teacher ∥ student)",
        "sampled_kl": "KL(student ∥ teacher) on its own text",
    }
    shown = [name for name in panels if any(name in entry for entry in history)]
    figure = Figure(figsize=(4.5 * len(shown), 3.6), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        axis.plot(*curve(history, name), marker="o" if name.startswith("eval") else "", markersize=3)
        _label(axis, panels[name])
    figure.suptitle(title)
    save(figure, path)


def plot_comparison(path: Path, histories: Mapping[str, History]) -> None:
    """Held-out curves of several runs side by side: cross-entropy, and KL to the teacher where it was measured."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = {"eval_loss": "held-out cross-entropy", "eval_kl": _KL}
    for axis, (quantity, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        curves = {name: curve(history, quantity) for name, history in histories.items()}
        for name, (steps, values) in curves.items():
            if steps:
                axis.plot(steps, values, marker="o", markersize=3, color=_colour(name, histories))
        _label(axis, title)
        _show_the_gap(axis, list(curves.values()))
    lines = [Line2D([], [], color=_colour(name, histories), marker="o", markersize=3, label=name) for name in histories]
    _legend_below(figure, lines)
    save(figure, path)


def plot_final(path: Path, values: Mapping[str, Mapping[str, float | None]]) -> None:
    """Bars: a panel a quantity, a bar a run in the colour of its curve; a run without the quantity has a dash."""
    quantities = list(next(iter(values.values())))
    figure = Figure(figsize=(9, 1.6 + 0.4 * len(values)), layout="constrained")
    for axis, quantity in zip(
        figure.subplots(1, len(quantities), squeeze=False, sharey=True)[0], quantities, strict=True
    ):
        known = {name: x for name, row in values.items() if (x := row[quantity]) is not None}
        start, end = _bar_axis(list(known.values()))
        colours = [_colour(name, values) for name in known]
        at = [list(values).index(name) for name in known]
        bars = axis.barh(at, [x - start for x in known.values()], left=start, color=colours)
        axis.bar_label(bars, labels=[f"{x:.3f}" for x in known.values()], padding=3)
        for number, name in enumerate(values):
            if name not in known:
                axis.text(start + 0.02 * (end - start), number, "—", va="center")
        axis.set_xlim(start, end)
        axis.set_yticks(range(len(values)), list(values))
        axis.set_title(quantity)
        axis.set_xlabel("nats per token, lower is better" + (f"\n(this axis starts at {start:.2f})" if start else ""))
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.spines[["top", "right"]].set_visible(False)
    # The first run on top, as in a table.
    figure.axes[0].invert_yaxis()
    save(figure, path)


def plot_reward(path: Path, history: History, *, title: str) -> None:
    """Reward of sampled completions beside the held-out accuracy of greedy ones; entropy and, with a reference, KL."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*curve(history, "reward"), label="reward of sampled answers")
    left.plot(*curve(history, "held_out_accuracy"), marker="o", markersize=3, label="held-out accuracy, greedy")
    _label(left, "fraction of sums right", "")
    left.set_ylim(0, 1)
    for name, label in (("entropy", "entropy of the policy"), ("kl", "KL from the start")):
        if any(name in entry for entry in history):
            right.plot(*curve(history, name), label=label)
    _label(right, "policy")
    for axis in (left, right):
        # Below the curves, which may be anywhere.
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=9, frameon=False)
    figure.suptitle(title)
    save(figure, path)


def plot_preferences(path: Path, history: History, *, title: str) -> None:
    """Loss, accuracy, reward margin and KL of preference pairs: in training, and of the held-out ones."""
    panels = {
        "loss": ("loss", "nats per pair"),
        "accuracy": ("chosen preferred", "fraction of pairs"),
        "reward_margin": ("reward margin", "nats"),
        "policy_kl": ("KL(policy ∥ reference)", "nats per token"),
    }
    figure = Figure(figsize=(4 * len(panels), 3.8), layout="constrained")
    for axis, (name, (label, unit)) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axis.plot(*curve(history, name))
        axis.plot(*curve(history, f"eval_{name}"), marker="o", markersize=3)
        _label(axis, label, unit)
    figure.axes[1].set_ylim(0, 1.05)
    named = {"training": "", "held out": "o"}
    lines = [
        Line2D([], [], color=f"C{number}", marker=marker, markersize=3, label=name)
        for number, (name, marker) in enumerate(named.items())
    ]
    _legend_below(figure, lines)
    figure.suptitle(title)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """PNG, written beside `path` and renamed."""
    beside = path.with_name(f".{path.name}.part")
    figure.set_dpi(150)
    FigureCanvasAgg(figure).print_png(str(beside))  # type: ignore[no-untyped-call]
    os.replace(beside, path)


def _label(axis: Any, title: str, unit: str = "nats per token") -> None:
    axis.set_title(title)
    axis.set_xlabel("step")
    axis.set_ylabel(unit)
    axis.grid(alpha=0.3)


def _colour(name: str, runs: Mapping[str, Any]) -> str:
    """The same for a run's curves and its bars."""
    return f"C{list(runs).index(name)}"


def _legend_below(figure: Figure, lines: Sequence[Line2D]) -> None:
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False)


def _show_the_gap(axis: Any, curves: Sequence[tuple[list[int], list[float]]]) -> None:
    """The height is for trained models: the loss before the first step is so far away that it is left off the axis."""
    trained = [y for steps, values in curves for x, y in zip(steps, values, strict=True) if x > 0 and math.isfinite(y)]
    if trained:
        margin = 0.06 * (max(trained) - min(trained)) or 0.1
        axis.set_ylim(min(trained) - margin, max(trained) + margin)


def _bar_axis(values: Sequence[float]) -> tuple[float, float]:
    """From 0, or from nearer where the bars are of so similar a length that 0 would hide the gap between them."""
    finite = [x for x in values if math.isfinite(x)] or [1.0]
    low, high = min(finite), max(finite)
    # The shortest bar is 0.7 times as long as the gap.
    start = 0.0 if low < 0.6 * high else low - (0.7 * (high - low) or 0.1 * high)
    # Room for the number beside the longest bar.
    return start, high + 0.25 * (high - start)
