"""Rewards and advantages of samples: ensembles, calibration, tails, filters. All without gradient and without logits.

What these functions return goes to `kk.policy_loss`: advantages as `advantages`, a choice of samples into `mask`;
rewards go to a function of `kk.advantages` first.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from kldiv_kernels.recipes.checks import like_checked, of_rows_checked, of_sequences_checked, of_tokens_checked
from kldiv_kernels.recipes.recipe import Recipe
from kldiv_kernels.recipes.reductions import group_mean, masked, widened
from kldiv_kernels.recipes.selection import first_tokens

PAPERS = (
    Recipe(
        21, "RECAP",
        "Beyond Reasoning Gains: Mitigating General Capabilities Forgetting in Large Reasoning Models", 2025, (),
        "none", "code", link="github.com/VietHoang1512/recap",
        differs="kk.recipes.schedules.RecapWeights has the weights of its losses: a policy_loss for each reward, and "
        "cross-entropy on replayed text. Seen in the code's README. Its ½c + ½i is the paper's c + i with twice the "
        "temperature.",
    ),
    Recipe(
        39, "WCO, UWO", "Reward Model Ensembles Help Mitigate Overoptimization", 2023,
        ("ensemble_rewards", "kl_shaped_rewards"), "none", "code", link="github.com/tlc4418/llm_optimization",
        differs="The variance is the unbiased one of the code's PPO; its best-of-n divides by K. The code logs "
        "e^x − 1 − x of x = ℓ − ℓ_ref, which is not the usual estimate of KL(π‖π_ref): that has −x.",
    ),
    Recipe(
        41, "Online difficulty filtering", "Online Difficulty Filtering for Reasoning Oriented Reinforcement Learning",
        2025, ("difficulty_mask",), "none", "restated", link="arXiv 2504.03380",
        differs="The band 0.2 to 0.8 is the one commonly quoted. New prompts in place of the dropped ones are the "
        "trainer's affair.",
    ),
    Recipe(
        52, "InfAlign", "InfAlign: Inference-aware language model alignment", 2024,
        ("calibrated_rewards", "win_transform"), "none", "restated", link="arXiv 2412.19792",
        differs="No value of the exponent was seen: it has no default.",
    ),
    Recipe(
        108, "RiskPO", "RiskPO: Risk-based Policy Optimization via Verifiable Reward for LLM Post-Training", 2025,
        ("mvar_advantages", "bundle_advantages"), "none", "code", link="github.com/RTkenny/RiskPO",
        differs="The code adds 1e-6 to every denominator, so that a bundle whose papers have equal scores gets a "
        "million times its advantage; here that deviation counts as 1, as a question's does in the code. For DAPO-math "
        "the scripts have beta=0.8, credit='sum-mean' and keep_baseline=False.",
    ),
)  # fmt: skip


@torch.no_grad()
def ensemble_rewards(
    rewards: Tensor, *, how: Literal["mean", "min", "uwo"] = "mean", variance_coef: float = 0.1
) -> Tensor:
    r"""One reward of K reward models: their mean, their minimum (WCO), or mean − λ·variance (UWO); [K, B] -> [B].

    Source: paper 39 and its code. variance_coef: λ of "uwo". The variance is unbiased, and 0 for K = 1.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.ensemble_rewards(torch.tensor([[1.0], [3.0]]), how="uwo")
    tensor([1.8000])
    """
    if how not in ("mean", "min", "uwo"):
        raise ValueError(f"ensemble_rewards: how is {how!r}; expected mean, min or uwo")
    if rewards.dim() != 2 or rewards.shape[0] == 0:
        raise ValueError(f"ensemble_rewards: rewards has shape {list(rewards.shape)}; expected [K, B] of K ≥ 1 models")
    rewards = widened(rewards)
    if how == "min":
        return rewards.amin(0)
    mean = rewards.mean(0)
    return mean - variance_coef * _deviation(rewards, 0)[0].square() if how == "uwo" else mean


@torch.no_grad()
def kl_shaped_rewards(
    rewards: Tensor, logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor, *, kl_coef: float
) -> Tensor:
    r"""r_t = R·1[t is the last token] − β(ℓ − ℓ_ref): the reward of a sequence with its KL penalty, by token; [B, T].

    Source: papers 18 (SALSA, whose reference is a mean of two models; its equations were not seen) and 39. Its sums
    from a token on, `reductions.reverse_cumsum`, are that token's return.

    Args:
        rewards: [B], R. logprobs: [B, T], of the policy that sampled. reference_logprobs: [B, T]. mask: [B, T] bool.
        kl_coef: β; 0.1 in paper 39's configuration.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.kl_shaped_rewards(
    ...     torch.tensor([1.0]), torch.tensor([[-1.0, -1.0]]), torch.tensor([[-2.0, -1.5]]),
    ...     torch.tensor([[True, True]]), kl_coef=0.1)
    tensor([[-0.1000,  0.9500]])
    """
    of_tokens_checked(mask, logprobs=logprobs, reference_logprobs=reference_logprobs)
    of_sequences_checked(mask, rewards=rewards)
    valid = mask != 0
    penalty = masked(kl_coef * (widened(reference_logprobs) - widened(logprobs)), valid)
    return penalty + torch.where(first_tokens(valid.flip(-1), 1).flip(-1), rewards[:, None], 0.0)


@torch.no_grad()
def difficulty_mask(rewards: Tensor, groups: Tensor, *, low: float = 0.2, high: float = 0.8) -> Tensor:
    r"""Bool [B]: the samples of prompts whose pass rate, the mean of their rewards, is from `low` to `high`.

    Source: paper 41, as restated. With `mask & kept[:, None]` as its mask, `kk.policy_loss` divides by the kept tokens
    alone; by the kept sequences alone with count_empty_sequences=False. The band 0 to 1 keeps all.

    Args: rewards: [B], 0 to 1. groups: [B] integers, the prompt of each sample.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.difficulty_mask(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1]))
    tensor([ True,  True, False, False])
    """
    if low > high:
        raise ValueError(f"difficulty_mask: low is {low}, high {high}; expected low ≤ high")
    like_checked("rewards", rewards, groups=groups)
    rate = group_mean(rewards.double(), groups)
    return (rate >= low) & (rate <= high)


@torch.no_grad()
def calibrated_rewards(rewards: Tensor, reference_rewards: Tensor, *, ties: Literal["half", "all"] = "half") -> Tensor:
    r"""C = the share of the reference's samples of the prompt that a sample beats, 0 to 1: [B], [B, K] -> [B].

    An equal reward counts ½ ("half": C's mean is then ½ under the reference) or 1 ("all"). No increasing function of
    the rewards changes C. Source: paper 52 (InfAlign), as restated.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.calibrated_rewards(torch.tensor([2.0]), torch.tensor([[1.0, 2.0, 3.0, 0.0]]))
    tensor([0.6250])
    """
    if ties not in ("half", "all"):
        raise ValueError(f"calibrated_rewards: ties is {ties!r}; expected half or all")
    if reference_rewards.dim() != 2 or reference_rewards.shape[1] == 0:
        raise ValueError(
            f"calibrated_rewards: reference_rewards has shape {list(reference_rewards.shape)}; expected [B, K], K ≥ 1"
        )
    of_rows_checked("calibrated_rewards", reference_rewards, rewards=rewards)
    apart = (rewards[:, None] > reference_rewards).to(rewards.dtype)
    return (apart + (0.5 if ties == "half" else 1.0) * (rewards[:, None] == reference_rewards)).mean(-1)


@torch.no_grad()
def win_transform(win_rates: Tensor, *, exponent: float | None = None) -> Tensor:
    r"""Φ(u) of calibrated rewards u: e^{tu} for t > 0 (best of N), −e^{tu} for t < 0 (worst of N), u for None.

    Source: paper 52 (InfAlign), as restated; t, `exponent`, was not seen. The rewards of a KL-regularised method:
    its optimum is π ∝ π_ref·e^{Φ(u)/β}.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.win_transform(torch.tensor([0.0, 1.0]), exponent=-1.0)
    tensor([-1.0000, -0.3679])
    """
    if exponent is None:
        return win_rates.detach()
    if exponent == 0:
        raise ValueError("win_transform: exponent is 0; expected a number above or below 0, or None for the identity")
    return math.copysign(1.0, exponent) * (exponent * win_rates).exp()


@torch.no_grad()
def mvar_advantages(
    scores: Tensor,
    low: float | Tensor,
    high: float | Tensor,
    *,
    alpha: float = 0.2,
    beta: float = 0.9,
    weight: float = 1.5,
    keep_baseline: bool = True,
) -> Tensor:
    r"""A = (w·CVaR + RVaR)/(w + 1), CVaR = −(a − x)₊/α and RVaR = (clip(x, a, b) − b)/(β − α); like `scores`, ≤ 0.

    The mixed value at risk of paper 108 (RiskPO) and its code: scores below the α-quantile count most, those above the
    β-quantile not at all.

    Args:
        scores: x, any shape. low, high: a and b, the quantiles α and β of the scores, numbers or tensors that go with
            `scores`; `schedules.QuantileTracker` follows them. weight: w. keep_baseline: False leaves out RVaR's
            (a − b)/(β − α), which makes it ≥ 0.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.mvar_advantages(torch.tensor([0.0, 2.0, 5.0]), 1.0, 4.0)
    tensor([-4.7143, -1.1429,  0.0000])
    """
    if not 0 < alpha < beta <= 1 or weight < 0:
        raise ValueError(
            f"mvar_advantages: alpha is {alpha}, beta {beta}, weight {weight}; expected 0 < alpha < beta ≤ 1 and "
            "weight ≥ 0"
        )
    scores = widened(scores)
    below_low, below_high = (scores - low).clamp_max(0), (scores - high).clamp_max(0)
    middle = below_high - below_low if keep_baseline else below_high - below_low + (high - low)
    return (weight * below_low / alpha + middle / (beta - alpha)) / (weight + 1)


@torch.no_grad()
def bundle_advantages(
    rewards: Tensor,
    low: float | Tensor,
    high: float | Tensor,
    *,
    credit: Literal["std", "sum-mean", "uniform", "score"] = "std",
    alpha: float = 0.2,
    beta: float = 0.9,
    weight: float = 1.5,
    keep_baseline: bool = True,
) -> Tensor:
    r"""RiskPO's advantages: [bundles, questions, n] rewards of n answers each -> the same shape; paper 108, its code.

    The j-th answers to a bundle's questions are a paper, its score their sum. Its `mvar_advantages`, divided by the
    deviation of the bundle's scores, go to its answers: "uniform" as they are; "std" divided by the deviation of the
    question's rewards; "sum-mean" in proportion to r − mean of the question, in equal parts where these sum to 0;
    "score" times 0.5 where r > 0, else 1.5. Deviations are unbiased; one up to 1e-3 counts as 1.

    Args: low, high: numbers, or [bundles, 1]. alpha, beta, weight, keep_baseline: see `mvar_advantages`.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.bundle_advantages(torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]), 0.5, 1.5, credit="uniform")
    tensor([[[ 0.0000, -1.4647],
             [ 0.0000, -1.4647]]])
    """
    if credit not in ("std", "sum-mean", "uniform", "score"):
        raise ValueError(f"bundle_advantages: credit is {credit!r}; expected std, sum-mean, uniform or score")
    if rewards.dim() != 3:
        raise ValueError(
            f"bundle_advantages: rewards has shape {list(rewards.shape)}; expected [bundles, questions, n]"
        )
    for name, x in (("low", low), ("high", high)):
        if isinstance(x, Tensor) and x.dim() > 0 and x.shape != (rewards.shape[0], 1):
            raise ValueError(
                f"bundle_advantages: {name} has shape {list(x.shape)}; expected a number, or [{rewards.shape[0]}, 1]"
            )
    rewards = widened(rewards)
    scores = rewards.sum(1)
    paper = mvar_advantages(
        scores, low, high, alpha=alpha, beta=beta, weight=weight, keep_baseline=keep_baseline
    ) / _at_least(_deviation(scores, -1))  # fmt: skip
    paper = paper[:, None].expand_as(rewards)
    if credit == "std":
        return paper / _at_least(_deviation(rewards, -1))
    if credit == "sum-mean":
        better = rewards - rewards.mean(-1, keepdim=True)
        total = better.sum(1, keepdim=True)
        level = total.abs() <= 1e-6
        return paper * torch.where(level, 1 / max(rewards.shape[1], 1), better / torch.where(level, 1.0, total))
    return paper * torch.where(rewards > 0, 0.5, 1.5) if credit == "score" else paper.clone()


def _deviation(x: Tensor, dim: int) -> Tensor:
    """Unbiased, of size 1 along `dim`; 0 of a single number."""
    return x.std(dim, correction=min(1, x.shape[dim] - 1), keepdim=True)


def _at_least(deviation: Tensor) -> Tensor:
    return torch.where(deviation > 1e-3, deviation, 1.0)
