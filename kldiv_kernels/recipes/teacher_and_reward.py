"""A reward and a teacher, or an expert, in one loss of the sampled tokens.

ℓ, ℓ_old, ℓ_T, ℓ_E: log-probabilities of the sampled token under the policy, the policy that sampled, the teacher and
the expert; ρ = exp(ℓ − ℓ_old); A the advantage; q and p the policy's and the teacher's softmax. "GRPO" is PPO's clipped
surrogate of ρ and A. Where a loss is put together here, its log-ratio is clamped to ±20, as `kk.policy_loss` has it.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from kldiv_kernels.choices import Aggregation, Backend
from kldiv_kernels.policy import PolicyLoss, kl_estimate, policy_loss
from kldiv_kernels.recipes.checks import of_sequences_checked, of_tokens_checked
from kldiv_kernels.recipes.composed import apart, clipped_term, composed_loss, given, options_checked, sampled_tokens
from kldiv_kernels.recipes.recipe import Recipe
from kldiv_kernels.recipes.reductions import defaults, group_sum, valid_tokens, widened

PAPERS = (
    Recipe(
        13, "RLAD / TRRD", "Reinforcement-aware Knowledge Distillation for LLM Reasoning", 2026, ("trrd_loss",), "R1",
        "paper", link="arXiv 2602.22495",
        differs="The text says that α = 0 is GRPO; by equation 3, and here, α = 1 is. That the clamp has no gradient "
        "beyond its bounds is derived. teacher_clamp=inf is one read (R0).",
    ),
    Recipe(
        16, "KDRL", "KDRL: Post-Training Reasoning LLMs via Unified Knowledge Distillation and Reinforcement Learning",
        2025, ("kdrl_loss", "kdrl_mask"), "R0", "restated",
        differs="The paper was not seen: its equations in others' words and code. The denominator of masked "
        "distillation and the clip are not known: kd_normalizer, clip_low and clip_high. kk.recipes.schedules."
        "linear_decay has the coefficient's schedule.",
    ),
    Recipe(
        33, "Skill-SD", "Skill-SD: Skill-Conditioned Self-Distillation for Multi-turn LLM Agents", 2026,
        ("skill_sd_loss",), "R0", "restated", link="github.com/skill-sd/skill-sd.github.io",
        differs="Seen as equations quoted by others. No clip of the KL term's ratio is reported.",
    ),
)  # fmt: skip


def trrd_loss(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor,
    teacher_logprobs: Tensor,
    alpha: float = 0.5,
    teacher_clamp: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    reference_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    mask: Tensor | None = None,
    aggregation: Aggregation = "seq-mean-token-mean",
    normalizer: float | Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> PolicyLoss:
    r"""GRPO on the ratio r to a mixture of the old policy and the teacher; paper 13 (RLAD, its TRRD), eq. 3.

    −min(r·A, clip(r)·A) + kl_coef·k3(ℓ, ℓ_ref), log r = α(ℓ − ℓ_old) + (1 − α)·clamp(ℓ − ℓ_T, −c, c). α = 1 is GRPO.
    Beyond the clamp the teacher's part has no gradient (derived).

    Args:
        logits: [B, T, V]. token_ids, old_logprobs, teacher_logprobs, reference_logprobs: [B, T]. advantages: [B] or
            [B, T]. alpha: 0 to 1. teacher_clamp: c; `math.inf` turns it off, and value and gradient then come out of
            one read. reference_logprobs, kl_coef: the KL to a third policy; 0 is none, and the
            paper's number was not seen.
        clip_low, clip_high, mask, …, backend: see `kk.policy_loss`.

    Returns: `kk.PolicyLoss`.

    >>> import torch, kldiv_kernels as kk
    >>> out = kk.recipes.trrd_loss(
    ...     torch.zeros(1, 1, 4), torch.tensor([[0]]), torch.tensor([1.0]), old_logprobs=torch.full((1, 1), 0.25).log(),
    ...     teacher_logprobs=torch.full((1, 1), 0.5).log())
    >>> round(out.loss.item(), 4)
    -0.7071
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"trrd_loss: alpha is {alpha}; expected 0 to 1")
    if not teacher_clamp > 0:
        raise ValueError(f"trrd_loss: teacher_clamp is {teacher_clamp}; expected a number above 0, or inf for none")
    options_checked(
        "trrd_loss", logits, clip_low=clip_low, clip_high=clip_high, kl_coef=kl_coef, aggregation=aggregation
    )
    of_tokens_checked(
        token_ids, old_logprobs=old_logprobs, teacher_logprobs=teacher_logprobs, reference_logprobs=reference_logprobs
    )
    if kl_coef != 0 and reference_logprobs is None:
        raise ValueError(f"trrd_loss: reference_logprobs is None; kl_coef = {kl_coef} needs them")
    shared: dict[str, Any] = {"temperature": temperature, "vocab_size": vocab_size, "backend": backend}
    if teacher_clamp == math.inf:
        anchor = _mixture(alpha, widened(old_logprobs), widened(teacher_logprobs))
        return policy_loss(
            logits, token_ids, advantages, loss_type="grpo", old_logprobs=old_logprobs, anchor_logprobs=anchor,
            clip_low=clip_low, clip_high=clip_high, reference_logprobs=reference_logprobs, kl_coef=kl_coef, mask=mask,
            aggregation=aggregation, normalizer=normalizer, ignore_index=ignore_index, **shared,
        )  # fmt: skip
    stats, valid = sampled_tokens(logits, token_ids, mask, ignore_index, **shared)
    to_old, to_teacher = (apart(stats.logprob, x, valid) for x in (old_logprobs, teacher_logprobs))
    log_ratio = _mixture(alpha, to_old, to_teacher.clamp(-teacher_clamp, teacher_clamp))
    term = clipped_term(log_ratio, advantages, valid, clip_low=clip_low, clip_high=clip_high)
    per_token, metrics = term.per_token, {"teacher_clamped": to_teacher.abs() > teacher_clamp}
    if reference_logprobs is not None:
        metrics["kl"] = kl_estimate(stats.logprob, given(reference_logprobs, stats.logprob, valid), "k3")
    if kl_coef != 0:
        per_token = per_token + kl_coef * metrics["kl"]
    return composed_loss(per_token, stats, valid, term, metrics, aggregation, normalizer)


def kdrl_mask(
    correct: Tensor, groups: Tensor, mask: Tensor, *, keep: Literal["response", "group"] = "response"
) -> Tensor:
    """Bool [B, T]: the tokens that KDRL distils where a reward guides it; paper 16 (restated).

    "response": those of wrong answers. "group": those of prompts without a right answer.

    Args: correct: [B] bool, by the answer, not by a shaped reward. groups: [B] integers, the prompt. mask: [B, T] bool.

    >>> import torch, kldiv_kernels as kk
    >>> correct, groups = torch.tensor([True, False, False]), torch.tensor([0, 0, 1])
    >>> kk.recipes.kdrl_mask(correct, groups, torch.ones(3, 1, dtype=torch.bool), keep="group").flatten()
    tensor([False, False,  True])
    """
    if keep not in ("response", "group"):
        raise ValueError(f"kdrl_mask: keep is {keep!r}; expected response or group")
    of_sequences_checked(mask, correct=correct, groups=groups)
    correct = correct != 0
    wrong = ~correct if keep == "response" else group_sum(correct.to(torch.float32), groups) == 0
    return (mask != 0) & wrong[:, None]


def kdrl_loss(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor,
    teacher_logprobs: Tensor,
    kd_coef: float = 5e-3,
    keep_mask: Tensor | None = None,
    kd_normalizer: Literal["kept", "tokens"] | float | Tensor = "kept",
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    **options: Any,
) -> PolicyLoss:
    r"""GRPO + β·mean ½(ℓ − ℓ_T)² over the kept tokens, k2 of KL(q‖p); paper 16 (KDRL), restated by others.

    On the policy's own samples k2 has the gradient of KL(q‖p); kl_estimator="k3" in its place has that of KL(p‖q).

    Args:
        logits: [B, T, V]. token_ids, old_logprobs, teacher_logprobs: [B, T]. advantages: [B] or [B, T].
        kd_coef: β; `schedules.linear_decay` has the annealed one. keep_mask: [B, T] bool, the tokens that are
            distilled, see `kdrl_mask`; default all.
        kd_normalizer: what the sum over kept tokens is divided by, which was not seen in the paper. "kept": their
            number in this call. "tokens": as the policy term. A number or scalar tensor: that, such as the number of
            kept tokens over all ranks and accumulation steps. All but "tokens" need the aggregation "token-mean".
        mask, normalizer, options: see `kk.policy_loss`.

    Returns: `kk.PolicyLoss`; the metric kl is k2 over all tokens.

    >>> import torch, kldiv_kernels as kk
    >>> out = kk.recipes.kdrl_loss(
    ...     torch.zeros(1, 1, 4), torch.tensor([[0]]), torch.tensor([0.0]), old_logprobs=torch.full((1, 1), 0.25).log(),
    ...     teacher_logprobs=torch.full((1, 1), 0.5).log(), kd_coef=1.0)
    >>> round(out.loss.item(), 4)
    0.2402
    """
    chosen = defaults(options, loss_type="grpo", aggregation="token-mean", kl_estimator="k2")
    named = isinstance(kd_normalizer, str)
    if named and kd_normalizer not in ("kept", "tokens"):
        raise ValueError(f"kdrl_loss: kd_normalizer is {kd_normalizer!r}; expected kept, tokens or a number")
    as_policy_term = named and kd_normalizer == "tokens"
    if not as_policy_term and chosen["aggregation"] != "token-mean":
        raise ValueError(
            f"kdrl_loss: kd_normalizer is {kd_normalizer!r} with aggregation {chosen['aggregation']!r}; expected "
            "kd_normalizer 'tokens', or aggregation 'token-mean'"
        )
    of_tokens_checked(token_ids, keep_mask=keep_mask)
    valid = valid_tokens(token_ids, mask, ignore_index)
    kept = valid if keep_mask is None else valid & (keep_mask != 0)
    weights = kept.double()
    if not as_policy_term:
        # policy_loss divides by the number of tokens, or by the normalizer.
        count = kept.sum().clamp_min(1).double() if isinstance(kd_normalizer, str) else kd_normalizer
        weights = weights * ((valid.sum().double() if normalizer is None else normalizer) / count)
    return policy_loss(
        logits, token_ids, advantages, old_logprobs=old_logprobs, reference_logprobs=teacher_logprobs,
        kl_coef=kd_coef, kl_weights=weights if kd_coef != 0 else None, mask=valid, normalizer=normalizer,
        ignore_index=ignore_index, **chosen,
    )  # fmt: skip


def skill_sd_loss(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor,
    teacher_logprobs: Tensor,
    kd_coef: float = 1e-3,
    **options: Any,
) -> PolicyLoss:
    r"""GRPO + λ·mean ρ·(e^{ℓ_T − ℓ} − 1 − (ℓ_T − ℓ)); paper 33 (Skill-SD), eqs. 10–14, as others quote them.

    The KL term is k3 weighted by the ratio, with the gradient of both factors: on samples of the old policy its mean is
    KL(q‖p), and so is its gradient's. Without the ratio's gradient it would be that of KL(p‖q).

    Args:
        logits: [B, T, V]. token_ids, old_logprobs: [B, T]. advantages: [B] or [B, T]. teacher_logprobs: [B, T], of the
            same model with the skill in its prompt. kd_coef: λ.
        options: of `kk.policy_loss`. mask: leave out tokens that a tool or the environment wrote. log_ratio_clamp
            bounds the KL term's ratio too; the paper reports no other bound of it.

    Returns: `kk.PolicyLoss`, the mean over tokens.

    >>> import torch, kldiv_kernels as kk
    >>> out = kk.recipes.skill_sd_loss(
    ...     torch.zeros(1, 1, 4), torch.tensor([[0]]), torch.tensor([0.0]), old_logprobs=torch.full((1, 1), 0.25).log(),
    ...     teacher_logprobs=torch.full((1, 1), 0.5).log(), kd_coef=1.0)
    >>> round(out.loss.item(), 4)
    0.3069
    """
    chosen = defaults(options, loss_type="grpo", aggregation="token-mean", kl_estimator="k3", kl_bias_correction=True)
    return policy_loss(
        logits, token_ids, advantages, old_logprobs=old_logprobs, reference_logprobs=teacher_logprobs,
        kl_coef=kd_coef, **chosen,
    )  # fmt: skip


def _mixture(alpha: float, x: Tensor, y: Tensor) -> Tensor:
    """α·x + (1 − α)·y; of a share of 0 the tensor is not looked at, infinite or not."""
    if alpha in (0, 1):
        return x if alpha == 1 else y
    return alpha * x + (1 - alpha) * y
