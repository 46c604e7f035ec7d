"""Plots of runs, drawn without a display and without touching matplotlib's global state."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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
    }
    shown = [name for name in panels if any(name in entry for entry in history)]
    figure = Figure(figsize=(4.5 * len(shown), 3.6), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        axis.plot(*curve(history, name), marker="" if name == "loss" else "o", markersize=3)
        _label(axis, panels[name])
    figure.suptitle(title)
    save(figure, path)


def plot_comparison(path: Path, histories: Mapping[str, History]) -> None:
    """Held-out curves of several runs side by side: cross-entropy, and KL to the teacher where it was measured."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = {"eval_loss": "held-out cross-entropy", "eval_kl": _KL}
    for axis, (quantity, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for number, (name, history) in enumerate(histories.items()):
            steps, values = curve(history, quantity)
            if steps:
                axis.plot(steps, values, marker="o", markersize=3, label=name, color=f"C{number}")
        _label(axis, title)
        axis.legend()
    save(figure, path)


def plot_final(path: Path, values: Mapping[str, Mapping[str, float | None]]) -> None:
    """Bars: one group a quantity, one bar a run; runs without the quantity are left out."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    quantities = list(next(iter(values.values())))
    for axis, quantity in zip(figure.subplots(1, len(quantities), squeeze=False)[0], quantities, strict=True):
        shown = {name: row[quantity] for name, row in values.items() if row[quantity] is not None}
        bars = axis.bar(list(shown), [value for value in shown.values() if value is not None])
        axis.bar_label(bars, fmt="%.3f")
        axis.set_title(quantity)
        axis.set_ylabel("nats per token")
    save(figure, path)


def plot_reward(path: Path, history: History, *, title: str) -> None:
    """Reward of sampled completions beside the held-out accuracy of greedy ones; entropy and, with a reference, KL."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*curve(history, "reward"), label="reward, sampled")
    left.plot(*curve(history, "held_out_accuracy"), marker="o", markersize=3, label="held-out accuracy, greedy")
    _label(left, "fraction right", "")
    left.set_ylim(0, 1)
    for name, label in (("entropy", "entropy"), ("kl", "KL to the start")):
        if any(name in entry for entry in history):
            right.plot(*curve(history, name), label=label)
    _label(right, "policy")
    for axis in (left, right):
        axis.legend()
    figure.suptitle(title)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """PNG, written beside `path` and renamed."""
    beside = path.with_name(f".{path.name}.part")
    FigureCanvasAgg(figure).print_png(str(beside))  # type: ignore[no-untyped-call]
    os.replace(beside, path)


def _label(axis: Any, title: str, unit: str = "nats per token") -> None:
    axis.set_title(title)
    axis.set_xlabel("step")
    axis.set_ylabel(unit)
    axis.grid(alpha=0.3)
