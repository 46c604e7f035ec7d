"""Numbers that change with the step: coefficients, windows, running quantiles.

Plain Python on the host, from the step or from what was measured; the recipes take what comes out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def linear_decay(step: int, *, start: float = 5e-3, end: float = 1e-3, rate: float = 5e-5) -> float:
    """max(start − rate·step, end): the `kd_coef` of paper 16 (KDRL), with its numbers as defaults.

    >>> round(linear_decay(40), 6), linear_decay(200)
    (0.003, 0.001)
    """
    return max(start - rate * step, end)


def hold_then_linear(step: int, *, value: float = 0.5, hold: int = 10, decay: int = 30) -> float:
    """`value` for `hold` steps, then linear to 0 over `decay` more: the `kl_coef` of paper 29 (TRACE).

    The defaults are the paper's numbers. Raises ValueError for a decay that is not above 0.

    >>> [hold_then_linear(step) for step in (0, 10, 25, 40)]
    [0.5, 0.5, 0.25, 0.0]
    """
    if not decay > 0:
        raise ValueError(f"hold_then_linear: decay is {decay}; expected a number of steps above 0")
    return value * min(1.0, max(0.0, 1 - (step - hold) / decay))


def growing_window(step: int, *, start: int = 1, every: int = 5, limit: int | None = None) -> int:
    """start + ⌊step/every⌋ turns, at most `limit`: the `window` of paper 14 (TCOD), whose first turns are trained on.

    `every` is the code's 5; the paper has 2. Raises ValueError where it is below 1.

    >>> [growing_window(step, limit=3) for step in (0, 4, 5, 100)]
    [1, 1, 2, 3]
    """
    _at_least_one("growing_window", every)
    window = start + step // every
    return window if limit is None else min(window, limit)


def prefix_window(step: int, turns: int, *, every: int = 5) -> int:
    """max(0, turns − 1 − ⌊step/every⌋): how many first turns the teacher writes, paper 14 (TCOD), back to front.

    Those turns have no gradient: they are −1 in the `turns` of `tcod_loss`. turns: the episode's length. every: as for
    `growing_window`.

    >>> [prefix_window(step, 4) for step in (0, 5, 100)]
    [3, 2, 0]
    """
    _at_least_one("prefix_window", every)
    return max(0, turns - 1 - step // every)


def _at_least_one(where: str, every: int) -> None:
    if every < 1:
        raise ValueError(f"{where}: every is {every}; expected a number of steps of 1 or more")


class QuantileTracker:
    """Running quantiles of scores, as paper 108 (RiskPO) and its code follow them.

    The first update takes the quantiles of its scores, with linear interpolation. Each later one moves them by
    rate·(level − share of scores below). Quantiles are followed one by one, so that close ones may cross for a while.

    Args: levels: each between 0 and 1. rate: 0.1 in the code.

    Raises ValueError for other levels and for a rate that is not above 0.

    >>> tracker = QuantileTracker([0.2, 0.9])
    >>> tracker.update([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    (1.0, 4.5)
    >>> [round(x, 4) for x in tracker.update([0.0, 0.0, 2.0, 2.0])]
    [0.97, 4.49]
    """

    def __init__(self, levels: Sequence[float], *, rate: float = 0.1) -> None:
        self.levels = tuple(float(level) for level in levels)
        if not self.levels or not all(0 < level < 1 for level in self.levels):
            raise ValueError(f"QuantileTracker: levels is {list(levels)}; expected numbers between 0 and 1")
        if not rate > 0:
            raise ValueError(f"QuantileTracker: rate is {rate}; expected a number above 0")
        self.rate = rate
        self._q: tuple[float, ...] | None = None

    @property
    def q(self) -> tuple[float, ...]:
        """The quantiles, one a level. Raises RuntimeError before there was a score."""
        if self._q is None:
            raise RuntimeError("QuantileTracker: q is asked for before the first update; it starts with its scores")
        return self._q

    def update(self, scores: Iterable[float]) -> tuple[float, ...]:
        """Takes the scores of a step, and returns `q`. Without a score nothing moves."""
        ordered = sorted(float(x) for x in scores)
        if ordered and self._q is None:
            self._q = tuple(_quantile(ordered, level) for level in self.levels)
        elif ordered:
            self._q = tuple(
                q + self.rate * (level - sum(x < q for x in ordered) / len(ordered))
                for q, level in zip(self.q, self.levels, strict=True)
            )
        return self.q

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, of numbers and lists alone."""
        return {"levels": list(self.levels), "q": None if self._q is None else list(self._q)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`. Raises ValueError where it is of other levels."""
        if tuple(state["levels"]) != self.levels:
            raise ValueError(f"QuantileTracker: the state's levels are {state['levels']}; expected {list(self.levels)}")
        self._q = None if state["q"] is None else tuple(state["q"])


def _quantile(ordered: Sequence[float], level: float) -> float:
    position = level * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
