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
from torch.nn.functional import leaky_relu

from kldiv_kernels.choices import Aggregation, Backend
from kldiv_kernels.policy import PolicyLoss, kl_estimate, policy_loss
from kldiv_kernels.recipes.clipped_kl import clipped_divergence_rows
from kldiv_kernels.recipes.composed import apart, clipped_term, composed_loss, given, of_tokens, sampled_tokens
from kldiv_kernels.recipes.recipe import Recipe
from kldiv_kernels.recipes.reductions import defaults, group_sum, masked, valid_tokens
from kldiv_kernels.stats import token_stats

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
        29, "TRACE", "TRACE: Distilling Where It Matters via Token-Routed Self On-Policy Alignment", 2026,
        ("trace_loss", "clipped_divergence_rows"), "R1", "restated",
        differs="Seen in a detailed note. That the clip of vocabulary entries is one-sided is derived; off by default. "
        "That the policy terms are averaged over the answer, as the KL terms are, is derived. "
        "kk.recipes.schedules.hold_then_linear has the coefficient's schedule.",
    ),
    Recipe(
        33, "Skill-SD", "Skill-SD: Skill-Conditioned Self-Distillation for Multi-turn LLM Agents", 2026,
        ("skill_sd_loss",), "R0", "restated", link="github.com/skill-sd/skill-sd.github.io",
        differs="Seen as equations quoted by others. No clip of the KL term's ratio is reported.",
    ),
    Recipe(
        51, "CalibRL", "Controllable Exploration in Hybrid-Policy RLVR for Multi-Modal Reasoning", 2026,
        ("calibrl_loss", "leaky_hinge"), "R1", "code", link="github.com/zhh6425/CalibRL",
        differs="The text compares the log-probabilities of two answers; the code, and this function, those of their "
        "tokens, position by position.",
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
    shared: dict[str, Any] = {"temperature": temperature, "vocab_size": vocab_size, "backend": backend}
    if teacher_clamp == math.inf:
        anchor = alpha * old_logprobs + (1 - alpha) * teacher_logprobs
        return policy_loss(
            logits, token_ids, advantages, loss_type="grpo", old_logprobs=old_logprobs, anchor_logprobs=anchor,
            clip_low=clip_low, clip_high=clip_high, reference_logprobs=reference_logprobs, kl_coef=kl_coef, mask=mask,
            aggregation=aggregation, normalizer=normalizer, ignore_index=ignore_index, **shared,
        )  # fmt: skip
    if kl_coef != 0 and reference_logprobs is None:
        raise ValueError(f"trrd_loss: reference_logprobs is None; kl_coef = {kl_coef} needs them")
    stats, valid = sampled_tokens(logits, token_ids, mask, ignore_index, **shared)
    to_old, to_teacher = (apart(stats.logprob, x, valid) for x in (old_logprobs, teacher_logprobs))
    log_ratio = alpha * to_old + (1 - alpha) * to_teacher.clamp(-teacher_clamp, teacher_clamp)
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
    valid = valid_tokens(token_ids, mask, ignore_index)
    kept = valid if keep_mask is None else valid & (keep_mask != 0)
    weights = kept.double()
    if not as_policy_term:
        # policy_loss divides by the number of tokens, or by the normalizer.
        count = kept.sum().clamp_min(1) if isinstance(kd_normalizer, str) else kd_normalizer
        weights = weights * ((valid.sum() if normalizer is None else normalizer) / count)
    return policy_loss(
        logits, token_ids, advantages, old_logprobs=old_logprobs, reference_logprobs=teacher_logprobs,
        kl_coef=kd_coef, kl_weights=weights if kd_coef != 0 else None, mask=valid, normalizer=normalizer,
        ignore_index=ignore_index, **chosen,
    )  # fmt: skip


def trace_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    spans: Tensor,
    *,
    old_logprobs: Tensor,
    kl_coef: float,
    initial_coef: float = 0.5,
    entry_clip: float | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    mask: Tensor | None = None,
    aggregation: Aggregation = "seq-mean-token-mean",
    normalizer: float | Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> PolicyLoss:
    r"""GRPO, and on spans λ·KL(p‖q) or λ·KL(q‖p) with GRPO's weight 1 − λ/λ₀; paper 29 (TRACE), restated by a note.

    Per answer, λ·(|S|/|y|)·mean_S KL + mean_y w·GRPO with S its span tokens. The teacher is read on S alone.

    Args:
        logits, teacher_logits: [B, T, V]; the teacher is the policy with a hint in its prompt, without gradient.
            token_ids, old_logprobs: [B, T]. advantages: [B] or [B, T].
        spans: [B, T] integers. 1: a key span of a right answer, KL(p‖q). 2: an error span of a wrong one, KL(q‖p).
            Else: neither.
        kl_coef: λ of this step, 0 to λ₀, from `schedules.hold_then_linear`. initial_coef: λ₀.
        entry_clip: bounds the KL's terms from above, 0.05 in the note; see `clipped_divergence_rows`, which then runs
            in place of `backend`'s kernels. Default off.
        clip_low, …, backend: see `kk.policy_loss`. The note does not give the average of the policy terms: derived.

    Returns: `kk.PolicyLoss`; the metric kl is the mean over all tokens, 0 off spans.

    >>> import torch, kldiv_kernels as kk
    >>> s, t = torch.tensor([[[2.0, 0.5, -1.0, 0.0]]]), torch.tensor([[[1.0, 1.5, -0.5, 0.0]]])
    >>> out = kk.recipes.trace_loss(
    ...     s, t, torch.tensor([[1]]), torch.tensor([1.0]), torch.tensor([[1]]), kl_coef=0.5,
    ...     old_logprobs=torch.tensor([[-1.8]]))
    >>> round(out.loss.item(), 4)
    0.2008
    """
    if not 0 <= kl_coef <= initial_coef or initial_coef == 0:
        raise ValueError(
            f"trace_loss: kl_coef is {kl_coef} with initial_coef {initial_coef}; expected 0 to initial_coef, above 0"
        )
    shared: dict[str, Any] = {"temperature": temperature, "vocab_size": vocab_size}
    stats, valid = sampled_tokens(logits, token_ids, mask, ignore_index, backend=backend, **shared)
    key, error = valid & (spans == 1), valid & (spans == 2)
    log_ratio = apart(stats.logprob, old_logprobs, valid)
    term = clipped_term(log_ratio, advantages, valid, clip_low=clip_low, clip_high=clip_high)
    per_token, kl = term.per_token, torch.zeros_like(stats.logprob)
    if kl_coef != 0:
        if entry_clip is None:
            kls = token_stats(
                logits, teacher_logits.detach(), stats=("forward_kl", "reverse_kl"), mask=key | error, backend=backend,
                **shared,
            )  # fmt: skip
            kl = torch.where(key, kls.forward_kl, kls.reverse_kl)
        else:
            clipped: dict[str, Any] = {"clip": entry_clip, **shared}
            kl = clipped_divergence_rows(logits, teacher_logits, kind="forward_kl", mask=key, **clipped)
            kl = kl + clipped_divergence_rows(logits, teacher_logits, kind="reverse_kl", mask=error, **clipped)
        per_token = torch.where(key | error, (1 - kl_coef / initial_coef) * per_token, per_token) + kl_coef * kl
    return composed_loss(per_token, stats, valid, term, {"kl": kl, "spans": key | error}, aggregation, normalizer)


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


def leaky_hinge(log_ratio: Tensor, advantages: Tensor, correct: Tensor, *, slope: float = 0.5) -> Tensor:
    r"""|A|·LeakyReLU_a(−s·Δ) per token, s = 1 for a right answer and −1 for a wrong one; paper 51 (CalibRL).

    Pulls right answers' tokens above the expert's log-probabilities and wrong ones' below; with less force beyond them.

    Args: log_ratio: [B, T], Δ, with gradient. advantages, correct: [B] or [B, T]. slope: a, 0 or more.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.leaky_hinge(torch.tensor([[-0.7, 0.7]]), torch.tensor([0.8]), torch.tensor([True]))
    tensor([[ 0.5600, -0.2800]])
    """
    if not slope >= 0:
        raise ValueError(f"leaky_hinge: slope is {slope}; expected 0 or more")
    right = correct if correct.dim() == log_ratio.dim() else correct[:, None]
    return of_tokens(advantages, log_ratio).abs() * leaky_relu(torch.where(right, -log_ratio, log_ratio), slope)


def calibrl_loss(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor,
    expert_logprobs: Tensor,
    correct: Tensor,
    hinge_coef: float = 0.1,
    slope: float = 0.5,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
    mask: Tensor | None = None,
    aggregation: Aggregation = "token-mean",
    normalizer: float | Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> PolicyLoss:
    r"""Dual-clip PPO + λ·`leaky_hinge` of ℓ − ℓ_E, the mean over tokens; paper 51 (CalibRL) and its code.

    Args:
        logits: [B, T, V] of the policy's own answers: the expert's answer is in neither term. token_ids, old_logprobs:
            [B, T]. advantages: [B] or [B, T]; in the code reward − mean over the policy's answers, not divided by a
            deviation. expert_logprobs: [B, T], of the expert's token at the same position under the old policy; 0
            behind its end, as in the code. correct: [B] or [B, T] bool.
        hinge_coef: λ. slope: see `leaky_hinge`. clip_low, …, backend: see `kk.policy_loss`.

    Returns: `kk.PolicyLoss`; the metric hinge is without λ.

    >>> import torch, kldiv_kernels as kk
    >>> out = kk.recipes.calibrl_loss(
    ...     torch.zeros(1, 1, 4), torch.tensor([[0]]), torch.tensor([0.8]), old_logprobs=torch.full((1, 1), 0.25).log(),
    ...     expert_logprobs=torch.full((1, 1), 0.5).log(), correct=torch.tensor([True]))
    >>> round(out.loss.item(), 4)
    -0.7445
    """
    shared: dict[str, Any] = {"temperature": temperature, "vocab_size": vocab_size, "backend": backend}
    stats, valid = sampled_tokens(logits, token_ids, mask, ignore_index, **shared)
    log_ratio, to_expert = (apart(stats.logprob, x, valid) for x in (old_logprobs, expert_logprobs))
    term = clipped_term(log_ratio, advantages, valid, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    hinge = leaky_hinge(to_expert, masked(of_tokens(advantages, to_expert), valid), correct, slope=slope)
    per_token = term.per_token + hinge_coef * hinge
    return composed_loss(per_token, stats, valid, term, {"hinge": hinge}, aggregation, normalizer)
