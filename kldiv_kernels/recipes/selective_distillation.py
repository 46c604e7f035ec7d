"""Which answers and which tokens of the student are distilled, and how much.

ℓ_old, ℓ_T: log-probabilities of the sampled token under the policy that sampled and the teacher; q and p the student's
and the teacher's softmax.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kldiv_kernels.choices import Backend
from kldiv_kernels.groups import numbered
from kldiv_kernels.policy import PolicyLoss, policy_loss
from kldiv_kernels.recipes.checks import of_sequences_checked, of_tokens_checked
from kldiv_kernels.recipes.lists import plackett_luce
from kldiv_kernels.recipes.recipe import Recipe
from kldiv_kernels.recipes.reductions import (
    batch_mean,
    defaults,
    group_softmax,
    group_sum,
    masked,
    sequence_mean,
    times,
    valid_tokens,
    widened,
)
from kldiv_kernels.recipes.selection import highest, prefix_share
from kldiv_kernels.stats import token_stats
from kldiv_kernels.top_k import topk

PAPERS = (
    Recipe(
        34, "SCOPE", "SCOPE: Signal-Calibrated On-Policy Distillation Enhancement with Dual-Path Adaptive Weighting",
        2026, ("scope_advantages", "scope_loss"), "R0", "code", link="arXiv 2604.10688",
        differs="The code turns the sign of the student's perplexity (sign=1), multiplies the weights by the number of "
        "answers (scale_by_count=True), and has no ratio on correct answers. The log-ratio of wrong answers is to "
        "ℓ_old, where the paper writes ℓ.",
    ),
    Recipe(
        49, "TSD-KD", "Explain in Your Own Words: Improving Reasoning via Token-Selective Dual Knowledge Distillation",
        2026, ("tsd_kd_loss",), "R1", "code", link="github.com/kmswin1/TSD-KD",
        differs="The code ranks with the logsumexp of a prefix, which is the likelihood of the reversed order "
        "(prefix=True), and its 'top 10 %' of uncertain tokens are 90 % (entropy_fraction=0.9).",
    ),
)  # fmt: skip


@torch.no_grad()
def scope_advantages(
    old_logprobs: Tensor,
    teacher_logprobs: Tensor,
    correct: Tensor,
    groups: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    scale_by_count: bool = False,
    sign: float = -1.0,
) -> Tensor:
    r"""Weights of correct answers, and weighted log-ratios of wrong ones, as advantages; [B, T], without gradient.

    With PPL = exp(−mean ℓ) of an answer: a correct one has A = PPL_S^{1/τ} over its sum in the group's correct ones; a
    wrong one A_t = PPL_T^{−1/τ} over its sum in the wrong ones, times ℓ_T − ℓ_old. Source: paper 34 (SCOPE), eqs. 2–6.

    Args:
        old_logprobs, teacher_logprobs: [B, T]. correct: [B] bool. groups: [B] integers, the prompt of each answer.
        mask: [B, T] bool. temperature: τ. scale_by_count: multiplies the weights by the number of answers that they are
            shared out to. sign: 1 makes it PPL_S^{−1/τ}; both as in the code.

    >>> import torch, kldiv_kernels as kk
    >>> ppl = torch.tensor([[1.2], [2.6], [3.8]])
    >>> a = kk.recipes.scope_advantages(
    ...     -ppl.log(), -ppl.log(), torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.int64),
    ...     torch.ones(3, 1, dtype=torch.bool))
    >>> a.flatten().round(decimals=3)
    tensor([0.1580, 0.3420, 0.5000])
    """
    of_tokens_checked(mask, old_logprobs=old_logprobs, teacher_logprobs=teacher_logprobs)
    of_sequences_checked(mask, correct=correct, groups=groups)
    correct = correct != 0
    old_logprobs, teacher_logprobs = (masked(widened(x), mask) for x in (old_logprobs, teacher_logprobs))
    # An answer without a token would take a share of the weight.
    written = (mask != 0).any(-1)
    student = group_softmax(sign * sequence_mean(old_logprobs, mask) / temperature, groups, correct & written)
    teacher = group_softmax(sequence_mean(teacher_logprobs, mask) / temperature, groups, ~correct & written)
    if scale_by_count:
        student = student * group_sum((correct & written).to(student.dtype), groups)
        teacher = teacher * group_sum((~correct & written).to(teacher.dtype), groups)
    wrong = times(teacher[:, None], teacher_logprobs - old_logprobs)
    return masked(torch.where(correct[:, None], student[:, None], wrong), mask)


def scope_loss(
    logits: Tensor,
    token_ids: Tensor,
    correct: Tensor,
    groups: Tensor,
    *,
    old_logprobs: Tensor,
    teacher_logprobs: Tensor,
    weight_temperature: float = 1.0,
    scale_by_count: bool = False,
    sign: float = -1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    **options: Any,
) -> PolicyLoss:
    r"""Σ_{correct} −w·ρ + Σ_{wrong} w·ρ·sg[ℓ_old − ℓ_T], over the number of prompts; paper 34 (SCOPE), eq. 6.

    Args:
        logits: [B, T, V]. token_ids, old_logprobs, teacher_logprobs: [B, T]. weight_temperature: τ. correct, groups, …:
            see `scope_advantages`. mask, options: see `kk.policy_loss`.

    Returns: `kk.PolicyLoss`.

    >>> import torch, kldiv_kernels as kk
    >>> out = kk.recipes.scope_loss(
    ...     torch.zeros(2, 1, 4), torch.tensor([[0], [1]]), torch.tensor([True, False]), torch.tensor([0, 0]),
    ...     old_logprobs=torch.full((2, 1), 0.25).log(), teacher_logprobs=torch.full((2, 1), 0.5).log())
    >>> round(out.loss.item(), 4)
    -1.6931
    """
    valid = valid_tokens(token_ids, mask, ignore_index)
    advantages = scope_advantages(
        old_logprobs, teacher_logprobs, correct, groups, valid, temperature=weight_temperature,
        scale_by_count=scale_by_count, sign=sign,
    )  # fmt: skip
    prompts = (numbered(groups).amax() + 1).to(torch.float32) if groups.numel() else 1.0
    chosen = defaults(
        options, loss_type="grpo", clip_low=1.0, clip_high=math.inf, aggregation="token-sum", normalizer=prompts
    )
    return policy_loss(logits, token_ids, advantages, old_logprobs=old_logprobs, mask=valid, **chosen)


def tsd_kd_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor,
    *,
    k: int = 10,
    opener: float = 0.1,
    beta: float = 0.9,
    gate_temperature: float = 1.0,
    indirect_coef: float = 0.1,
    entropy_fraction: float = 0.1,
    entropy_coef: float = 1.0,
    prefix: bool = False,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""α·PL + mean sg[σ((H(q) − H(p))/τ_g)]·JS_β + γ·mean H(q) of the most uncertain tokens; paper 49 (TSD-KD), nats.

    PL: the Plackett–Luce loss of the teacher's order of the student's k likeliest tokens, over the opener: the first
    tokens of each answer, until `opener` of its entropy is spent.

    Args:
        logits, teacher_logits: [B, T, V], of answers of the student; the teacher gets no gradient. mask: [B, T] bool.
        k, opener: see above. beta: the teacher's weight in JS. gate_temperature: τ_g. indirect_coef: α.
        entropy_fraction: of the batch's tokens, those with the highest entropy. entropy_coef: γ, the paper's 1, which
            sharpens a student beyond a flat teacher.
        prefix: True ranks by the logsumexp of the prefix, as the released code does (the reversed order).
        temperature, vocab_size, backend: see `kk.token_stats`.

    Returns: a scalar. One read without gradient for the ids, one for the values, one for the gradient.

    >>> import torch, kldiv_kernels as kk
    >>> s, t = torch.tensor([[[2.0, 0.5, -1.0, 0.0]]]), torch.tensor([[[1.0, 1.5, -0.5, 0.0]]])
    >>> round(kk.recipes.tsd_kd_loss(s, t, torch.tensor([[True]]), k=3).item(), 4)
    1.0859
    """
    mask = mask != 0
    shared: dict[str, Any] = {"temperature": temperature, "mask": mask, "vocab_size": vocab_size, "backend": backend}
    ids = topk(logits.detach(), k, **shared).ids
    stats = token_stats(
        logits, teacher_logits.detach(), ids,
        stats=("logprob", "reference_logprob", "entropy", "reference_entropy", "js"), beta=beta, **shared,
    )  # fmt: skip
    order = stats.reference_logprob.argsort(dim=-1, descending=True, stable=True)
    ranked = stats.logprob.gather(-1, order)
    ranked = ranked.flip(-1) if prefix else ranked
    # A student that allows fewer than k tokens has no others to rank.
    ranking = plackett_luce(ranked, (ranked > -torch.inf).to(ranked.dtype))
    indirect = batch_mean(ranking, prefix_share(stats.entropy, mask, opener))
    gate = torch.sigmoid((stats.entropy - stats.reference_entropy).detach() / gate_temperature)
    uncertain = highest(stats.entropy, mask, entropy_fraction)
    return (
        indirect_coef * indirect
        + batch_mean(gate * stats.js, mask)
        + entropy_coef * batch_mean(stats.entropy, uncertain)
    )
