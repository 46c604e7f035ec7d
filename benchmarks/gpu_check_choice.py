"""What `gpu_check.py` does in which order, how long each step may take, and which backends it is about.

The most informative steps come first: whoever has a card for minutes has them when it is taken away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gpu_check_steps import Step

# Seconds of each step, in the order in which they run. With START they add up to seven minutes.
LIMITS = {
    "build": 120, "library": 35, "cuda": 80, "clusters": 15, "benchmark": 70, "dram": 30, "graphs": 30, "large": 20,
    "triton": 40, "barriers": 30, "memory errors": 30, "races": 60, "full benchmark": 300, "tune": 120,
}  # fmt: skip
START = 40
ON_REQUEST = ("races", "full benchmark", "tune")
DEFAULT_STEPS = tuple(step for step in LIMITS if step not in ON_REQUEST)
MINUTES = 7.0
# Importing PyTorch for the first time on a machine reads gigabytes.
DESCRIPTION = 180
# A step that would have less is not begun, which is a failure.
WORTH_BEGINNING = 5
# Steps about one backend; the others are about all of them.
ABOUT = {
    "library": "cuda", "cuda": "cuda", "clusters": "cuda", "dram": "cuda", "barriers": "cuda", "races": "cuda",
    "tune": "cuda", "triton": "triton",
}  # fmt: skip
# Where its backend is missing, one of these fails; the others have nothing to add.
DECISIVE = ("library", "cuda", "triton")
NO_KERNELS = ("cpu", "reference")


@dataclass
class Choice:
    """Steps and backends that were asked for, with what the library says of its backends (`states`)."""

    steps: Sequence[str]
    backends: Sequence[str] | None = None
    device: str = "cuda"
    states: Mapping[str, str] = field(default_factory=dict)
    nvidia: bool = True
    broken: str | None = None  # what the cuda backend did, once it hung or crashed

    def limit(self, step: str, left: float) -> float:
        """Seconds for the step: its own, and up to as much again where the steps before it left some."""
        later = sum(LIMITS[name] for name in self.steps[self.steps.index(step) + 1 :])
        own = LIMITS[step] if step in self.steps else 0
        return min(left - 5, max(own, min(2 * own, left - 5 - later)))

    @property
    def available(self) -> list[str]:
        return [name for name, state in self.states.items() if state == "available" and name not in NO_KERNELS]

    @property
    def wanted(self) -> list[str]:
        """Backends that the run is about: those asked for, or all that this device should have and any that it has."""
        if self.device != "cuda":
            return ["triton"]
        expected = ["cuda", "triton"] if self.nvidia else ["triton"]
        return list(self.backends) if self.backends else list(dict.fromkeys([*expected, *self.available]))

    @property
    def usable(self) -> list[str]:
        """Those of them whose kernels may still be launched."""
        return [name for name in self.wanted if name in self.available and not (name == "cuda" and self.broken)]

    def of(self, step: str) -> list[str]:
        """Backends that tests of this step must pass on."""
        return [name for name in self.usable if ABOUT.get(step, name) == name]

    def instead(self, step: str) -> Step | None:
        """The step's result where it need not, or cannot, be made."""
        one = ABOUT.get(step)
        if self.device != "cuda":
            # In the interpreter there are no programs of NVIDIA's.
            return Step(step, "skip", 0.0, "needs a GPU") if one == "cuda" else None
        if one is not None and one not in self.wanted:
            why = "--backends leaves it out" if self.backends else "this is no NVIDIA device"
            return Step(step, "skip", 0.0, f"about the {one} backend: {why}")
        # Counting clusters runs none of the backend's kernels.
        if one == "cuda" and self.broken and step != "clusters":
            return Step(step, "skip", 0.0, f"left out: the cuda backend {self.broken}")
        if one is not None and one not in self.available:
            state = self.states.get(one, "there is none of this name")
            told = f"the {one} backend: {state} (--backends leaves it out)"
            return Step(step, "fail" if step in DECISIVE else "skip", 0.0, told)
        if one is None and not self.usable:
            states = {name: self.states.get(name, "there is none of this name") for name in self.wanted}
            if self.broken:
                states["cuda"] = self.broken
            told = "; ".join(f"{name}: {state}" for name, state in states.items())
            return Step(step, "skip" if self.broken else "fail", 0.0, f"no backend is left: {told}")
        return None

    def untested(self, passed: Mapping[str, int]) -> list[str]:
        """Backends of which no test passed, although the run was to test all."""
        if self.device != "cuda" or not {"cuda", "triton"} <= set(self.steps):
            return []
        return [name for name in self.wanted if not passed.get(name)]
