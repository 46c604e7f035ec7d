"""Paper 67: extrapolating past a model that was trained by rewards goes on improving it, at no cost of training.

Answers are sampled from (1 − w)·before + w·after, the logits of the sums model after its warm-up, and after 100 more
steps of GRPO: `guided_logits`. w = 0 and 1 are the models themselves. The paper guides diffusion and flow models, by
scores and velocities; here the idea meets a language model.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from claim import Claim, finish, options, over_seeds, say, spread
from matplotlib.figure import Figure
from sums import SUMS, logits_of, rewarded, sample, warm
from torch import Tensor
from transformers import PreTrainedModel

import kldiv_kernels as kk

WEIGHTS = (0.0, 0.5, 1.0, 1.25, 1.5, 2.0, 3.0)
ANSWERS = 60


def guided(before: PreTrainedModel, after: PreTrainedModel, weight: float) -> Callable[[Tensor, Tensor], Tensor]:
    def logits(inputs: Tensor, attention: Tensor) -> Tensor:
        first, second = (logits_of(model, inputs, attention) for model in (before, after))
        return kk.recipes.guided_logits(first, second, weight=weight)

    return logits


def accuracies(seed: int) -> list[float]:
    after, before = rewarded(seed), warm(seed)
    found = []
    for weight in WEIGHTS:
        # The same random numbers for every weight: what differs is the weight.
        generator = torch.Generator().manual_seed(seed)
        by = guided(before, after, weight)
        right = [sample(by, SUMS.held_out, generator).correct.float().mean().item() for _ in range(ANSWERS)]
        found.append(100 * statistics.mean(right))
    say("  " + ", ".join(f"w = {w:g}: {x:.1f} %" for w, x in zip(WEIGHTS, found, strict=True)))
    return found


def main() -> None:
    given = options(__doc__ or "", "guided_sums", seeds=3, example="--seeds 1")
    runs = [accuracies(seed) for seed in over_seeds(given.seeds)]
    claim = Claim(
        "guided_sums",
        "67: Inference-Time Alignment Control for Diffusion Models with Reinforcement Learning Guidance",
        "a weight above 1 improves on the tuned model, which weight 1 is; far above 1 it is too much",
    )  # fmt: skip
    by_weight = dict(zip(WEIGHTS, (list(x) for x in zip(*runs, strict=True)), strict=True))
    for weight, values in by_weight.items():
        claim.rows.append((f"sampled answers right at w = {weight:g}", f"{spread(values, 1)} %"))
    gains = {w: [x - y for x, y in zip(by_weight[w], by_weight[1.0], strict=True)] for w in WEIGHTS if w > 1}
    best = max(gains, key=lambda w: statistics.mean(gains[w]))
    error = 100 * (2 * 0.25 / (ANSWERS * len(SUMS.held_out))) ** 0.5
    claim.rows.append((f"gain of w = {best:g} over w = 1", f"{spread(gains[best], 1)} points"))
    # Two standard errors of a seed's difference, and of the mean's.
    above = max(min(of_weight) for of_weight in gains.values()) > 2 * error
    on_average = statistics.mean(gains[best]) > 2 * error / len(runs) ** 0.5
    claim.shown = "yes" if above else "in part" if on_average else "no"
    by_seed = ", ".join(f"{gain:+.1f}" for gain in gains[best])
    claim.verdict = (
        f"the best weight is {best:g}, by {by_seed} points in the seeds, where {2 * error:.1f} is chance in one; "
        f"w = {WEIGHTS[-1]:g} is {statistics.mean(gains[WEIGHTS[-1]]):+.1f}"
    )
    claim.numbers = {
        "weights": WEIGHTS, "accuracy_percent": runs, "answers_per_weight": ANSWERS * len(SUMS.held_out),
        "standard_error_of_a_difference_in_points": error,
    }  # fmt: skip
    finish(claim, given, plot(runs))


def plot(runs: list[list[float]]) -> Figure:
    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axis = figure.subplots()
    for seed, values in enumerate(runs):
        axis.plot(WEIGHTS, values, marker="o", markersize=3, alpha=0.6, label=f"seed {seed}")
    axis.plot(WEIGHTS, torch.tensor(runs).mean(0), color="black", linewidth=2, label="mean")
    axis.axvline(1, color="grey", linewidth=0.8, linestyle="--")
    axis.set(xlabel="w (0: before rewards, 1: after)", ylabel="sampled answers right, %")
    axis.set_title("Guidance past the tuned model")
    axis.legend()
    return figure


if __name__ == "__main__":
    main()
