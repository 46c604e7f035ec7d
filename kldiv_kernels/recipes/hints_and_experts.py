"""Rewards beside a teacher that has a hint, or beside an expert's answer: on some tokens, or on one side of them.

ℓ, ℓ_old, ℓ_E: log-probabilities of the sampled token under the policy, the policy that sampled, and the expert; A the
advantage; q and p the policy's and the teacher's softmax. "GRPO" is PPO's clipped surrogate, its log-ratio clamped to
±20, as `kk.policy_loss` has it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

from kldiv_kernels.choices import Aggregation, Backend
from kldiv_kernels.policy import PolicyLoss
from kldiv_kernels.recipes.checks import of_sequences_checked, of_tokens_checked
from kldiv_kernels.recipes.clipped_kl import clipped_divergence_rows
from kldiv_kernels.recipes.composed import (
    apart,
    clipped_term,
    composed_loss,
    of_tokens,
    options_checked,
    sampled_tokens,
)
from kldiv_kernels.recipes.recipe import Recipe
from kldiv_kernels.recipes.reductions import masked
from kldiv_kernels.stats import token_stats

PAPERS = (
    Recipe(
        29, "TRACE", "TRACE: Distilling Where It Matters via Token-Routed Self On-Policy Alignment", 2026,
        ("trace_loss", "clipped_divergence_rows"), "R1", "restated",
        differs="Seen in a detailed note. That the clip of vocabulary entries is one-sided is derived; off by default. "
        "That the policy terms are averaged over the answer, as the KL terms are, is derived. "
        "kk.recipes.schedules.hold_then_linear has the coefficient's schedule.",
    ),
    Recipe(
        51, "CalibRL", "Controllable Exploration in Hybrid-Policy RLVR for Multi-Modal Reasoning", 2026,
        ("calibrl_loss", "leaky_hinge"), "R1", "code", link="github.com/zhh6425/CalibRL",
        differs="The text compares the log-probabilities of two answers; the code, and this function, those of their "
        "tokens, position by position.",
    ),
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
    options_checked("trace_loss", logits, clip_low=clip_low, clip_high=clip_high, aggregation=aggregation)
    of_tokens_checked(token_ids, spans=spans, old_logprobs=old_logprobs)
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
    if correct.dim() == log_ratio.dim():
        of_tokens_checked(log_ratio, correct=correct)
    else:
        of_sequences_checked(log_ratio, correct=correct)
    right = (correct if correct.dim() == log_ratio.dim() else correct[:, None]) != 0
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
    options_checked(
        "calibrl_loss", logits, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, aggregation=aggregation
    )
    of_tokens_checked(token_ids, old_logprobs=old_logprobs, expert_logprobs=expert_logprobs)
    shared: dict[str, Any] = {"temperature": temperature, "vocab_size": vocab_size, "backend": backend}
    stats, valid = sampled_tokens(logits, token_ids, mask, ignore_index, **shared)
    log_ratio, to_expert = (apart(stats.logprob, x, valid) for x in (old_logprobs, expert_logprobs))
    term = clipped_term(log_ratio, advantages, valid, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    hinge = leaky_hinge(to_expert, masked(of_tokens(advantages, to_expert), valid), correct, slope=slope)
    # It is infinite where the expert gives no probability.
    per_token = term.per_token if hinge_coef == 0 else term.per_token + hinge_coef * hinge
    return composed_loss(per_token, stats, valid, term, {"hinge": hinge}, aggregation, normalizer)
