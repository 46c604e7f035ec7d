"""Numbers that change with the step: coefficients, windows, running quantiles, resets.

Plain Python on the host, from the step or from what was measured; the recipes take what comes out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


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


def accuracy_conditioned_coef(accuracy: float, *, coef: float = 0.02) -> float:
    """coef·½(tanh(accuracy) + 1), from coef/2 up: what `fg_expo_loss` weighs its KL with; paper 28 (FG-ExPO).

    >>> [round(accuracy_conditioned_coef(x, coef=1.0), 4) for x in (0.0, 0.5, 1.0)]
    [0.5, 0.7311, 0.8808]
    """
    return coef * (math.tanh(accuracy) + 1) / 2


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


class RecapWeights:
    """Weights of K losses that grow where a loss has stopped falling, or swings: paper 21 (RECAP).

    λ = K·softmax((c + i)/T) with mean 1: the loss is (1/K)·Σ_k λ_k·L_k. c = μ/μ̃ is the mean of a loss over its last
    `window` values, over that of the window before; i = σ/(μ + μ̃), σ the deviation of the last window. Until both
    windows are full, all weights are 1. A ratio whose denominator is 0 counts as of a loss that does not change. The
    code's ½c + ½i is this with twice the temperature.

    Args: count: K. window, temperature: the paper's 10 and 5. σ is the population's, which was not seen.

    Raises ValueError where one of them is not above 0.

    >>> weights = RecapWeights(2, window=1, temperature=1.0)
    >>> weights.update([1.0, 1.0])
    (1.0, 1.0)
    >>> [round(x, 4) for x in weights.update([1.0, 0.5])]
    [1.2449, 0.7551]
    """

    def __init__(self, count: int, *, window: int = 10, temperature: float = 5.0) -> None:
        for name, value in (("count", count), ("window", window), ("temperature", temperature)):
            if not value > 0:
                raise ValueError(f"RecapWeights: {name} is {value}; expected a number above 0")
        self.count, self.window, self.temperature = count, window, temperature
        self._losses: list[list[float]] = []

    def update(self, losses: Iterable[float]) -> tuple[float, ...]:
        """Takes the K losses of a step, and returns `weights()`. Raises ValueError for another number of them."""
        found = [float(x) for x in losses]
        if len(found) != self.count:
            raise ValueError(f"RecapWeights: losses has {len(found)} numbers; expected {self.count}")
        self._losses = [*self._losses, found][-2 * self.window :]
        return self.weights()

    def weights(self) -> tuple[float, ...]:
        """λ of each loss, K numbers with mean 1."""
        if len(self._losses) < 2 * self.window:
            return (1.0,) * self.count
        scores = [self._score(of_one) / self.temperature for of_one in zip(*self._losses, strict=True)]
        powers = [math.exp(score - max(scores)) for score in scores]
        return tuple(self.count * power / sum(powers) for power in powers)

    def _score(self, losses: Sequence[float]) -> float:
        before, now = losses[: self.window], losses[self.window :]
        old, new = math.fsum(before) / self.window, math.fsum(now) / self.window
        deviation = math.sqrt(math.fsum((x - new) ** 2 for x in now) / self.window)
        return (new / old if old != 0 else 1.0) + (deviation / (new + old) if new + old != 0 else 0.0)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, of numbers and lists alone."""
        return {"losses": [list(of_step) for of_step in self._losses]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`. Raises ValueError where it is of another number of losses."""
        losses = [[float(x) for x in of_step] for of_step in state["losses"]]
        if any(len(of_step) != self.count for of_step in losses):
            raise ValueError(f"RecapWeights: the state has steps of {len(losses[0])} losses; expected {self.count}")
        self._losses = losses[-2 * self.window :]


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


class ReferenceReset:
    """When the reference becomes the policy: paper 2 (ProRL), restated by others.

    That is when the validation score has not been above its best for `patience` updates. After it the KL starts at 0,
    and with it the score to beat.

    Args: patience: in updates; derived, as the paper's rule is that the score stands still or falls. reset_optimizer:
        whether `apply` empties the optimizer's state; True in the paper, False in the later release, which resets every
        200 to 500 steps without looking at a score.

    Raises ValueError for a patience below 1.

    >>> reset = ReferenceReset(2)
    >>> [reset.update(score) for score in (0.1, 0.3, 0.2, 0.3, 0.1, 0.2)]
    [False, False, False, True, False, False]
    """

    def __init__(self, patience: int, *, reset_optimizer: bool = True) -> None:
        if patience < 1:
            raise ValueError(f"ReferenceReset: patience is {patience}; expected a number of updates of 1 or more")
        self.patience = patience
        self.reset_optimizer = reset_optimizer
        self.best: float | None = None
        self.waited = 0

    def update(self, score: float) -> bool:
        """Takes the score of a validation; True where it is time for `apply`."""
        if self.best is None or score > self.best:
            self.best, self.waited = score, 0
            return False
        self.waited += 1
        if self.waited < self.patience:
            return False
        self.best, self.waited = None, 0
        return True

    def apply(self, policy: nn.Module, reference: nn.Module, optimizer: Optimizer) -> None:
        """Copies the policy's weights into the reference and, with `reset_optimizer`, forgets the optimizer's state."""
        reference.load_state_dict(policy.state_dict())
        if self.reset_optimizer:
            optimizer.state.clear()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, of numbers alone."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`."""
        self.best, self.waited = state["best"], state["waited"]


class SafeController:
    """The KL's threshold and penalty of paper 1 (SAFE), as in its code.

    penalty = 0.1·max(k − limit, 0)²·max(0.5, floor/(H + 0.1)), with k = 0.9·(what was recorded) + 0.1·KL. The limit is
    (threshold + PID of the reward's velocity)·phase inside the bounds; the velocity is the step of the rewards' running
    mean, its target 0.001. The code's phase is 1.5 for 50 steps, then 1.2 while rewards climb, 0.8 on a plateau, and 1
    where they have converged.

    KL and entropy may be tensors, which stay on their device; `record` of a tensor keeps one. Of several ranks give the
    means over them.

    Args: defaults are the code's. threshold, momentum (0.9), penalty_coef (0.1), entropy_floor, bounds of the limit;
        kp, ki, kd: gains of the PID, whose integral is held between −1 and 1.

    >>> controller = SafeController(momentum=0.0)
    >>> round(controller.penalty(0.5, 1.0), 6), controller.penalty(0.2, 1.0)
    (0.007273, 0.0)
    """

    def __init__(
        self,
        *,
        threshold: float = 0.3,
        momentum: float = 0.9,
        penalty_coef: float = 0.1,
        entropy_floor: float = 2.0,
        bounds: tuple[float, float] = (0.1, 0.6),
        kp: float = 0.3,
        ki: float = 0.01,
        kd: float = 0.05,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"SafeController: momentum is {momentum}; expected 0 up to, but not, 1")
        if bounds[0] > bounds[1]:
            raise ValueError(f"SafeController: bounds is {bounds}; expected (low, high)")
        self.threshold, self.bounds = threshold, bounds
        self.momentum, self.penalty_coef, self.entropy_floor = momentum, penalty_coef, entropy_floor
        self.gains = (kp, ki, kd)
        self.limit = min(max(threshold, bounds[0]), bounds[1])
        self.kl: float | Tensor = 0.0
        self._reward: float | None = None
        self._integral = self._error = 0.0

    def update(self, reward: float, *, phase: float = 1.0) -> float:
        """Takes the mean reward of a step, before its loss, and returns the limit."""
        correction = 0.0
        if self._reward is not None:
            velocity = 0.05 * (reward - self._reward)
            error = velocity - 0.001
            self._integral = max(-1.0, min(1.0, self._integral + error))
            parts = (error, self._integral, error - self._error)
            correction = sum(gain * part for gain, part in zip(self.gains, parts, strict=True))
            self._error = error
        self._reward = reward if self._reward is None else 0.95 * self._reward + 0.05 * reward
        low, high = self.bounds
        self.limit = min(max((self.threshold + correction) * phase, low), high)
        return self.limit

    def penalty(self, kl: float | Tensor, entropy: float | Tensor) -> float | Tensor:
        """The penalty of a KL, with its gradient, and a mean entropy. Nothing is recorded."""
        beyond, factor = self._parts(kl, entropy)
        return self.penalty_coef * beyond**2 * factor

    def slope(self, kl: float | Tensor, entropy: float | Tensor) -> float | Tensor:
        """The derivative of `penalty` by the KL."""
        beyond, factor = self._parts(kl, entropy)
        return 2 * self.penalty_coef * (1 - self.momentum) * beyond * factor

    def record(self, kl: float | Tensor) -> None:
        """Moves the running KL, behind the loss."""
        kl = kl.detach() if isinstance(kl, Tensor) else kl
        self.kl = self.momentum * self.kl + (1 - self.momentum) * kl

    def _parts(self, kl: float | Tensor, entropy: float | Tensor) -> tuple[float | Tensor, float | Tensor]:
        moved = self.momentum * self.kl + (1 - self.momentum) * kl
        return _at_least(moved - self.limit, 0.0), _at_least(self.entropy_floor / (entropy + 0.1), 0.5)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, of numbers alone; waits for the device where the KL is a tensor."""
        return {
            "kl": float(self.kl), "limit": self.limit, "reward": self._reward, "integral": self._integral,
            "error": self._error,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`."""
        self.kl, self.limit, self._reward = state["kl"], state["limit"], state["reward"]
        self._integral, self._error = state["integral"], state["error"]


def _at_least(x: float | Tensor, bound: float) -> float | Tensor:
    return x.clamp_min(bound) if isinstance(x, Tensor) else max(x, bound)


def _quantile(ordered: Sequence[float], level: float) -> float:
    position = level * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
