"""A clipped policy loss and a KL to a reference, whose coefficient moves with the difficulty or whose reference moves.

ℓ, ℓ_old, ℓ_ref: log-probabilities of the sampled token under the policy, the policy that sampled and the reference;
ρ = exp(ℓ − ℓ_old); A the advantage; k2 = ½(ℓ − ℓ_ref)², k3 = e^{ℓ_ref − ℓ} − 1 − (ℓ_ref − ℓ). "GRPO" is PPO's clipped
surrogate of ρ and A. Each loss is one call of `kk.policy_loss`, in nats.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from kldiv_kernels.policy import PolicyLoss, policy_loss
from kldiv_kernels.recipes.checks import like_checked, of_sequences_checked, of_tokens_checked
from kldiv_kernels.recipes.recipe import Recipe
from kldiv_kernels.recipes.reductions import defaults, group_mean, group_sum, valid_tokens, widened

PAPERS = (
    Recipe(
        2, "ProRL", "ProRL: Prolonged Reinforcement Learning Expands Reasoning Boundaries in Large Language Models",
        2025, ("prorl_loss",), "R0", "restated", link="arXiv 2505.24864",
        differs="Seen in others' words and scripts. As they print it the estimator is u − 1 − log u of u = π/π_ref, "
        "which on the policy's own samples pulls with half the gradient of χ²; this is verl's k3, with which it was "
        "trained. version=2 is that of the later release. kk.recipes.schedules.ReferenceReset says when the reference "
        "becomes the policy.",
    ),
    Recipe(
        18, "SALSA", "SALSA: Soup-based Alignment Learning for Stronger Adaptation in RLHF", 2024, (), "none",
        "derived",
        differs="The equations were not seen. kk.recipes.mixtures.average_weights makes the reference of two "
        "fine-tuned models, kk.recipes.kl_shaped_rewards the rewards by token, and kk.policy_loss is the rest. The "
        "KL's coefficient was not found.",
    ),
    Recipe(
        20, "APO", "APO: Enhancing Reasoning Ability of MLLMs via Asymmetric Policy Optimization", 2025,
        ("apo_loss", "dads_weights", "stcr_advantages"), "R0", "code", link="github.com/Indolent-Kawhi/View-R1",
        differs="As released. The weight jumps from 1 to 0.934 where the first of many answers is wrong. The code has "
        "e^(−e·d) as another weight, commented out, which this leaves out.",
    ),
    Recipe(
        28, "FG-ExPO",
        "fg-expo: Frontier-guided exploration-prioritized policy optimization via adaptive kl and gaussian curriculum",
        2026, ("fg_expo_loss", "difficulty_sampling_weights"), "R0", "restated",
        differs="Seen as the paper's text in somebody else's hands. A repository of others has (1 − accuracy)² as the "
        "factor, which tightens the KL where the paper loosens it.",
    ),
)  # fmt: skip


def prorl_loss(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor,
    reference_logprobs: Tensor,
    version: Literal[1, 2] = 1,
    kl_coef: float = 1e-4,
    clip_low: float = 0.2,
    clip_high: float = 0.4,
    **options: Any,
) -> PolicyLoss:
    r"""GRPO with a wider upper clip + β·k3 to a reference that is reset now and then; paper 2 (ProRL), restated.

    Version 1: k3 with |ℓ_ref − ℓ| ≤ 20 and k3 ≤ 10, as in verl. Version 2: k2 with |ℓ_ref − ℓ| ≤ 10. Beyond a bound the
    KL has no gradient.

    Args:
        logits: [B, T, V]. token_ids, old_logprobs, reference_logprobs: [B, T]. advantages: [B] or [B, T]; those of
            version 2 are `kk.advantages.reinforce_plus_plus`. `schedules.ReferenceReset` has the resets.
        kl_coef: β. options: of `kk.policy_loss`; the rollouts of the paper have temperature=1.2.

    Returns: `kk.PolicyLoss`, the mean over tokens.

    >>> import torch, kldiv_kernels as kk
    >>> out = kk.recipes.prorl_loss(
    ...     torch.zeros(1, 1, 4), torch.tensor([[0]]), torch.tensor([0.0]), old_logprobs=torch.full((1, 1), 0.25).log(),
    ...     reference_logprobs=torch.full((1, 1), 0.5).log(), kl_coef=1.0)
    >>> round(out.loss.item(), 4)
    0.3069
    """
    if version not in (1, 2):
        raise ValueError(f"prorl_loss: version is {version!r}; expected 1 or 2")
    kl: dict[str, Any] = {"kl_estimator": "k3", "kl_log_ratio_clamp": 20.0, "kl_clamp": 10.0}
    if version == 2:
        kl = {"kl_estimator": "k2", "kl_log_ratio_clamp": 10.0}
    return policy_loss(
        logits, token_ids, advantages, old_logprobs=old_logprobs, reference_logprobs=reference_logprobs,
        kl_coef=kl_coef, clip_low=clip_low, clip_high=clip_high, **defaults(options, loss_type="dapo", **kl),
    )  # fmt: skip


def apo_loss(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    accuracy: Tensor,
    *,
    old_logprobs: Tensor,
    reference_logprobs: Tensor,
    kl_coef: float = 1e-3,
    clip: float = 0.2,
    sharpness: float = math.e,
    sequence_count: float | Tensor | None = None,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    **options: Any,
) -> PolicyLoss:
    r"""GRPO, the mean over tokens, + β·mean_i[w_i·mean_t k3], w = `dads_weights`; paper 20 (APO, its DADS), its code.

    Args:
        logits: [B, T, V]. token_ids, old_logprobs, reference_logprobs: [B, T]. advantages: [B], for the second part of
            the method those of `stcr_advantages`. accuracy: [B], the share of correct answers to the prompt.
        kl_coef: β. clip: of the ratio, on both sides. sharpness: of the weights.
        sequence_count: by what the sum over answers of the KL is divided, such as their number over all ranks and
            accumulation steps. Default: those of this call that have tokens. normalizer: the same for tokens.
        mask, options: of `kk.policy_loss`. The k3 has no bound.

    Returns: `kk.PolicyLoss`; its metric kl is k3 without weights.

    >>> import torch, kldiv_kernels as kk
    >>> out = kk.recipes.apo_loss(
    ...     torch.zeros(1, 1, 4), torch.tensor([[0]]), torch.tensor([1.0]), torch.tensor([0.5]),
    ...     old_logprobs=torch.full((1, 1), 0.25).log(), reference_logprobs=torch.full((1, 1), 0.5).log(), kl_coef=1.0)
    >>> round(out.loss.item(), 4)
    -0.772
    """
    of_sequences_checked(token_ids, advantages=advantages, accuracy=accuracy)
    valid = valid_tokens(token_ids, mask, ignore_index)
    lengths = valid.sum(-1).double()
    answers = (lengths > 0).sum().clamp_min(1) if sequence_count is None else sequence_count
    # policy_loss divides by the number of tokens, or by the normalizer.
    tokens = lengths.sum().clamp_min(1) if normalizer is None else normalizer
    share = tokens / answers / lengths.clamp_min(1)
    weights = dads_weights(advantages, accuracy, sharpness=sharpness).double() * share
    return policy_loss(
        logits, token_ids, advantages, loss_type="grpo", aggregation="token-mean", old_logprobs=old_logprobs,
        reference_logprobs=reference_logprobs, kl_coef=kl_coef, kl_estimator="k3", clip_low=clip, clip_high=clip,
        kl_weights=weights[:, None].expand(token_ids.shape) if kl_coef != 0 else None, mask=valid,
        normalizer=normalizer, ignore_index=ignore_index, **options,
    )  # fmt: skip


@torch.no_grad()
def dads_weights(advantages: Tensor, accuracy: Tensor, *, sharpness: float = math.e) -> Tensor:
    r"""1 − exp(−e·accuracy) where A > 0 and 0 < accuracy < 1, else 1: the KL's weight of each answer; [B].

    The harder a prompt, the looser is the KL of its correct answers. Source: paper 20 (APO) and its code.

    Args: advantages, accuracy: [B], accuracy the share of correct answers to the prompt. sharpness: e, Euler's number.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.dads_weights(torch.tensor([1.0, 1.0, 1.0, -1.0]), torch.tensor([0.25, 0.75, 1.0, 0.25]))
    tensor([0.4932, 0.8698, 1.0000, 1.0000])
    """
    like_checked("advantages", advantages, accuracy=accuracy)
    loosened = (advantages > 0) & (accuracy > 0) & (accuracy < 1)
    return torch.where(loosened, -torch.expm1(-sharpness * widened(accuracy)), 1.0)


@torch.no_grad()
def stcr_advantages(
    advantages: Tensor, lengths: Tensor, correct: Tensor, groups: Tensor, *, base: float = 1.00001
) -> Tensor:
    r"""A·(2 − base^−(L − L̄)) of wrong answers longer than L̄, the mean length of the prompt's correct ones; else A; [B].

    The factor is from 1 to 2. Source: paper 20 (APO, its STCR) and its code.

    Args: advantages, lengths, correct, groups: [B]; lengths in tokens, correct by the answer, groups the prompt.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.stcr_advantages(
    ...     torch.tensor([1.0, -1.0, -1.0]), torch.tensor([10, 8, 13]), torch.tensor([True, False, False]),
    ...     torch.tensor([0, 0, 0]), base=2.0)
    tensor([ 1.0000, -1.0000, -1.8750])
    """
    if not base > 1:
        raise ValueError(f"stcr_advantages: base is {base}; expected a number above 1")
    like_checked("advantages", advantages, lengths=lengths, correct=correct, groups=groups)
    right, advantages = correct != 0, widened(advantages)
    beyond = lengths.double() - group_mean(lengths.double(), groups, right)
    longer = ~right & (group_sum(right.double(), groups) > 0) & (beyond > 0)
    factor = 1 - torch.expm1(-math.log(base) * beyond)
    return torch.where(longer, advantages * factor.to(advantages.dtype), advantages)


def fg_expo_loss(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    accuracy: Tensor | float,
    *,
    old_logprobs: Tensor,
    reference_logprobs: Tensor,
    kl_coef: float = 0.02,
    **options: Any,
) -> PolicyLoss:
    r"""GRPO + β·½(tanh(a) + 1)·k3, a the batch's mean accuracy; paper 28 (FG-ExPO), as its text is quoted.

    The KL is halved where no answer is right, and loosens less the more are.

    Args:
        logits: [B, T, V]. token_ids, old_logprobs, reference_logprobs: [B, T]. advantages: [B] or [B, T].
        accuracy: [B], whether each answer is correct, or their mean: a number, or a tensor of one, over all ranks.
        kl_coef: β. options: of `kk.policy_loss`.

    Returns: `kk.PolicyLoss`; its metric kl is k3 without the factor.

    >>> import torch, kldiv_kernels as kk
    >>> out = kk.recipes.fg_expo_loss(
    ...     torch.zeros(1, 1, 4), torch.tensor([[0]]), torch.tensor([0.0]), 0.5,
    ...     old_logprobs=torch.full((1, 1), 0.25).log(), reference_logprobs=torch.full((1, 1), 0.5).log(), kl_coef=1.0)
    >>> round(out.loss.item(), 4)
    0.2243
    """
    if isinstance(accuracy, Tensor) and accuracy.dim() > 0:
        of_sequences_checked(token_ids, accuracy=accuracy)
    of_tokens_checked(token_ids, reference_logprobs=reference_logprobs)
    if not isinstance(accuracy, Tensor):
        # A tensor made of a number on the host would wait for the device.
        accuracy = token_ids.new_full((), accuracy, dtype=torch.float64)
    factor = (accuracy.detach().double().mean().tanh() + 1) / 2
    return policy_loss(
        logits, token_ids, advantages, old_logprobs=old_logprobs, reference_logprobs=reference_logprobs,
        kl_coef=kl_coef, kl_weights=factor.expand(token_ids.shape) if kl_coef != 0 else None,
        **defaults(options, loss_type="grpo", kl_estimator="k3"),
    )  # fmt: skip


@torch.no_grad()
def difficulty_sampling_weights(
    pass_rates: Tensor,
    averages: Tensor | None = None,
    *,
    centre: float = 0.5,
    width: float = 0.35,
    momentum: float = 0.9,
) -> tuple[Tensor, Tensor]:
    r"""(exp(−(p̄ − centre)²/(2·width²)), p̄): how often each prompt is drawn, and its running pass rate; paper 28.

    p̄ ← momentum·p̄ + (1 − momentum)·p. For `torch.multinomial`.

    Args: pass_rates: [prompts], the share of correct answers, p; NaN for a prompt that was not tried, whose average
        stays. averages: [prompts], p̄ of the call before; default 0.5 for each.

    >>> import torch, kldiv_kernels as kk
    >>> weights, averages = kk.recipes.difficulty_sampling_weights(torch.tensor([0.5, 0.0, torch.nan]))
    >>> weights, averages
    (tensor([1.0000, 0.9898, 1.0000]), tensor([0.5000, 0.4500, 0.5000]))
    """
    if not width > 0 or not 0 <= momentum < 1:
        raise ValueError(
            f"difficulty_sampling_weights: width is {width}, momentum {momentum}; expected width > 0, 0 ≤ momentum < 1"
        )
    pass_rates = widened(pass_rates)
    before = torch.full_like(pass_rates, 0.5) if averages is None else widened(averages)
    like_checked("pass_rates", pass_rates, averages=before)
    now = torch.where(pass_rates.isnan(), before, momentum * before + (1 - momentum) * pass_rates)
    return torch.exp(-((now - centre) ** 2) / (2 * width**2)), now
