"""Papers 39, 41, 52, 108: definitions, one number after the other."""

from __future__ import annotations

import math

import torch
from recipe_case import Case, batch, pick
from torch import Tensor

BATCH = batch(sequences=6, seed=6)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def ensemble(rewards: Tensor, how: str = "mean", variance_coef: float = 0.1) -> Tensor:
    mean = sum(rewards) / len(rewards)
    if how == "min":
        return torch.stack([min(column) for column in rewards.T])
    if how == "uwo" and len(rewards) > 1:
        return mean - variance_coef * sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)
    return mean


def kl_shaped(rewards: Tensor, logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    out = torch.where(mask, -kl_coef * (logprobs - reference_logprobs), 0.0)
    for row, kept in enumerate(mask):
        out[row, kept.nonzero()[-1]] += rewards[row]
    return out


def difficulty(rewards: Tensor, groups: Tensor, low: float = 0.2, high: float = 0.8) -> Tensor:
    rates = [rewards[groups == g].mean().item() for g in groups]
    return torch.tensor([low <= rate <= high for rate in rates]).double()


def calibrated(rewards: Tensor, reference_rewards: Tensor, ties: str = "half") -> Tensor:
    equal = 0.5 if ties == "half" else 1.0
    rows = [
        sum(1.0 if x < r else equal if x == r else 0.0 for x in row.tolist()) / len(row)
        for r, row in zip(rewards.tolist(), reference_rewards, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def mvar(scores: Tensor, low: Tensor | float, high: Tensor | float, alpha: float = 0.2, beta: float = 0.9,
         weight: float = 1.5, keep_baseline: bool = True) -> Tensor:  # fmt: skip
    low, high = (torch.as_tensor(x, dtype=torch.float64) for x in (low, high))
    middle = torch.minimum(torch.maximum(scores, low), high) - (high if keep_baseline else low)
    tail = -(low - scores).clamp(min=0)
    return (weight * tail / alpha + middle / (beta - alpha)) / (weight + 1)


def bundle(rewards: Tensor, low: Tensor | float, high: Tensor | float, credit: str = "std", alpha: float = 0.2,
           beta: float = 0.9, weight: float = 1.5, keep_baseline: bool = True) -> Tensor:  # fmt: skip
    def deviation(x: Tensor) -> float:
        found = math.sqrt(((x - x.mean()) ** 2).sum() / (len(x) - 1)) if len(x) > 1 else 0.0
        return found if found > 1e-3 else 1.0

    out = torch.zeros_like(rewards)
    advantages = mvar(rewards.sum(1), low, high, alpha, beta, weight, keep_baseline)
    for b, of_bundle in enumerate(rewards):
        for j in range(rewards.shape[2]):
            paper = advantages[b, j] / deviation(of_bundle.sum(0))
            better = [(answers[j] - answers.mean()).item() for answers in of_bundle]
            for question, answers in enumerate(of_bundle):
                share = {
                    "uniform": 1.0,
                    "std": 1 / deviation(answers),
                    "score": 0.5 if answers[j] > 0 else 1.5,
                    "sum-mean": better[question] / sum(better) if abs(sum(better)) > 1e-6 else 1 / len(better),
                }[credit]
                out[b, question, j] = paper * share
    return out


# Two bundles of three questions with four answers: one question is always right, and in the second bundle the sum of
# r − mean is 0 for the first answers.
REWARDS = torch.tensor([
    [[1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 1]], [[1, 0, 1, 0], [0, 1, 0, 0], [0.5, 0.25, 0, 0.25]],
], dtype=torch.float64)  # fmt: skip
EQUAL = torch.tensor([[[1, 0], [0, 1]]], dtype=torch.float64)
QUANTILES = {name: torch.tensor([[a], [b]], dtype=torch.float64)
             for name, a, b in (("low", 1.5, 0.4), ("high", 2.5, 1.2))}  # fmt: skip
RATES = {
    "rewards": torch.tensor([1, 0, 0, 0, 0, 1, 1, 1, 0, 1], dtype=torch.float64),
    "groups": torch.tensor([4, 4, 4, 4, 4, 2, 2, 2, 2, 9]),
}
SHAPED = pick(BATCH, "rewards", "mask") | {
    "logprobs": BATCH["old_logprobs"], "reference_logprobs": BATCH["base_logprobs"],
}  # fmt: skip
# Rewards with many ties.
CALIBRATED = {"rewards": randn(8).round(), "reference_rewards": randn(8, 5).round()}
UNIT = {"win_rates": torch.linspace(0, 1, 5, dtype=torch.float64)}

CASES = [
    *(Case("ensemble_rewards", {"rewards": randn(k, 4)}, {"how": how} | options, expected=ensemble, trained=(),
           name=f"{how}-{k}")
      for k in (1, 5) for how, options in (("mean", {}), ("min", {}), ("uwo", {"variance_coef": 0.7}))),
    Case("kl_shaped_rewards", SHAPED, {"kl_coef": 0.3}, expected=kl_shaped, trained=(),
         roles=("logprobs", "reference_logprobs")),
    Case("difficulty_mask", RATES, expected=difficulty, trained=()),
    Case("difficulty_mask", RATES, {"low": 0.3, "high": 1.0}, expected=difficulty, trained=(), name="other-band"),
    *(Case("calibrated_rewards", CALIBRATED, {"ties": ties}, expected=calibrated, trained=(), name=ties)
      for ties in ("half", "all")),
    *(Case("win_transform", UNIT, {"exponent": t}, trained=(), name=str(t),
           expected=lambda win_rates, exponent: torch.tensor(
               [math.copysign(math.exp(exponent * u), exponent) for u in win_rates.tolist()], dtype=torch.float64))
      for t in (5.0, -5.0)),
    Case("mvar_advantages", {"scores": randn(6, 3)}, {"low": -0.5, "high": 0.8}, expected=mvar, trained=()),
    Case("mvar_advantages", {"scores": randn(2, 9)} | QUANTILES,
         {"alpha": 0.1, "beta": 0.8, "weight": 0.5, "keep_baseline": False}, expected=mvar, trained=(),
         name="no-baseline", roles=("low", "high")),
    *(Case("bundle_advantages", {"rewards": REWARDS} | QUANTILES, {"credit": credit}, expected=bundle, trained=(),
           name=credit, roles=("low", "high"))
      for credit in ("std", "sum-mean", "uniform", "score")),
    Case("bundle_advantages", {"rewards": REWARDS}, {"low": 1.0, "high": 2.0, "credit": "sum-mean", "beta": 0.8,
         "keep_baseline": False}, expected=bundle, trained=(), name="dapo-math"),
    Case("bundle_advantages", {"rewards": EQUAL}, {"low": 1.5, "high": 2.0}, expected=bundle, trained=(), name="equal"),
    Case("bundle_advantages", {"rewards": EQUAL[..., :1]}, {"low": 1.5, "high": 2.0}, expected=bundle, trained=(),
         name="one-paper"),
]  # fmt: skip
