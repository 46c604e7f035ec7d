"""Paper 3: a baseline of the teacher's KL lowers the variance of on-policy distillation's gradient, and not its mean.

The student is the sums model after its warm-up, the teacher the same model after 100 steps of GRPO. 300 times over, the
student answers 16 fixed sums, and the gradient of `vopd_loss`, summed over tokens, is taken: without a baseline, with
that of the student's 3 likeliest of 14 tokens, and with that of all tokens. All three have the same answers.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from claim import Claim, finish, options, over_seeds, say, spread
from matplotlib.figure import Figure
from sums import SUMS, Answers, answer_logits, by, rewarded, sample, warm
from torch import Tensor

import kldiv_kernels as kk

PROMPTS, BATCHES = 16, 300
BASELINES: dict[str, dict[str, Any]] = {
    "none": {"baseline": "none"}, "top-k, k = 3": {"baseline": "top_k", "k": 3}, "full": {"baseline": "full"},
}  # fmt: skip


class Moments:
    """Mean and trace of the covariance of vectors that come one by one."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, torch.zeros(()), 0.0

    def add(self, x: Tensor) -> None:
        self.count += 1
        apart = x - self.mean
        self.mean = self.mean + apart / self.count
        self.squares += float(apart @ (x - self.mean))

    @property
    def trace(self) -> float:
        return self.squares / (self.count - 1)


def gradient(student: torch.nn.Module, teacher: torch.nn.Module, answers: Answers, how: dict[str, Any]) -> Tensor:
    student.zero_grad()
    with torch.no_grad():
        target = answer_logits(teacher, answers)
    logits = answer_logits(student, answers)
    out = kk.recipes.vopd_loss(logits, target, answers.ids, mask=answers.mask, aggregation="token-sum", **how)
    out.loss.backward()
    return torch.cat([p.grad.flatten() for p in student.parameters()]).double()


def measured(seed: int) -> dict[str, Moments]:
    teacher, student = rewarded(seed), warm(seed)
    sums = SUMS.held_out[PROMPTS * seed :][:PROMPTS]
    generator = torch.Generator().manual_seed(seed)
    found = {name: Moments() for name in BASELINES}
    for batch in range(BATCHES):
        answers = sample(by(student), sums, generator)
        for name, how in BASELINES.items():
            found[name].add(gradient(student, teacher, answers, how))
        if (batch + 1) % 100 == 0:
            say(f"  {batch + 1} batches: " + ", ".join(f"{name} {x.trace:.3g}" for name, x in found.items()))
    return found


def main() -> None:
    given = options(__doc__ or "", "vopd_variance", seeds=3, example="--seeds 1")
    traces: dict[str, list[float]] = {name: [] for name in BASELINES}
    norms: dict[str, list[float]] = {name: [] for name in BASELINES}
    apart: dict[str, list[float]] = {name: [] for name in BASELINES}
    for seed in over_seeds(given.seeds):
        found = measured(seed)
        for name, moments in found.items():
            traces[name].append(moments.trace)
            norms[name].append(moments.mean.norm().item())
            # What two means of so many batches differ by, in units of what chance makes of the plain one.
            chance = (found["none"].trace / BATCHES) ** 0.5
            apart[name].append((moments.mean - found["none"].mean).norm().item() / chance)
    claim = Claim(
        "vopd_variance", "3: KL for a KL: On-Policy Distillation with Control Variate Baseline",
        "the baseline lowers the gradient's variance and leaves its mean; the top k do as well as all tokens",
    )  # fmt: skip
    relative = {name: [x / y for x, y in zip(traces[name], traces["none"], strict=True)] for name in BASELINES}
    for name in BASELINES:
        claim.rows.append(
            (f"trace of the covariance, {name}",
             f"{statistics.mean(traces[name]):.3g}, {spread([100 * x for x in relative[name]], 0)} % of that without")
        )  # fmt: skip
    for name in list(BASELINES)[1:]:
        claim.rows.append(
            (f"its mean less that without, {name}", f"{spread(apart[name])} of the standard error of the one without")
        )
    with_baseline = [*relative["full"], *relative["top-k, k = 3"]]
    shown = max(with_baseline) < 1 and max(max(apart[name]) for name in BASELINES) < 2
    claim.shown = "yes" if shown else "no"
    claim.verdict = (
        f"the variance is {100 * (1 - statistics.mean(relative['full'])):.0f} % less with all tokens, "
        f"{100 * (1 - statistics.mean(relative['top-k, k = 3'])):.0f} % with 3, and the means agree within their noise"
        if shown
        else "the variance is not lower in every seed, or the means differ"
    )
    claim.numbers = {"trace": traces, "norm_of_mean": norms, "difference_of_means_in_standard_errors": apart,
                     "batches": BATCHES, "prompts": PROMPTS}  # fmt: skip
    finish(claim, given, plot(relative))


def plot(relative: dict[str, list[float]]) -> Figure:
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axis = figure.subplots()
    axis.bar(list(relative), [statistics.mean(x) for x in relative.values()], color="#93c5fd")
    for at, values in enumerate(relative.values()):
        axis.plot([at] * len(values), values, "o", color="#1d4ed8", markersize=4)
    axis.set(xlabel="baseline", title="Variance of the gradient\n(of that without; points: seeds)")
    return figure


if __name__ == "__main__":
    main()
