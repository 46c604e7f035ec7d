"""The student samples, the teacher scores: log-ratios of the sampled tokens as advantages.

A weight without gradient is an advantage: −sg[w]·log q is `policy_loss(loss_type="reinforce", advantages=w)`, and
−ρ·sg[w] with the ratio ρ its `loss_type="grpo", clip_low=1, clip_high=inf`. Value and gradient then come out of one
read of the logits. ℓ, ℓ_old, ℓ_T, ℓ_b: log-probabilities of the sampled token under the student, the policy that
sampled, the teacher and a base model; q and p the student's and the teacher's softmax.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from kldiv_kernels.choices import Backend
from kldiv_kernels.losses import reverse_kl
from kldiv_kernels.policy import PolicyLoss, policy_loss
from kldiv_kernels.recipes.checks import like_checked, of_tokens_checked
from kldiv_kernels.recipes.recipe import Recipe
from kldiv_kernels.recipes.reductions import defaults, masked, valid_tokens, widened
from kldiv_kernels.recipes.selection import turn_window
from kldiv_kernels.stats import token_stats
from kldiv_kernels.top_k import topk_divergence_from_logits

PAPERS = (
    Recipe(
        3, "vOPD", "KL for a KL: On-Policy Distillation with Control Variate Baseline", 2024,
        ("vopd_advantages", "vopd_loss"), "R0+f", "code", link="github.com/holi-lab/vOPD",
        differs="Rewards are clipped only without a baseline. The temperature of the advantage is one of its own "
        "(kd_temperature); the loss has its own, as in the code. The code's gkd_rkl is kk.reverse_kl, its opd_top_k is "
        "kk.topk_divergence_from_logits(…, 'reverse_kl', k=…, support='student', tail='renormalize').",
    ),
    Recipe(
        14, "TCOD", "TCOD: Exploring Temporal Curriculum in On-Policy Distillation for Multi-turn Autonomous Agents",
        2026, ("tcod_loss",), "R0", "code", link="github.com/kokolerk/TCOD",
        differs="The text writes KL(teacher‖student); the code, and this function, pull with the gradient of "
        "KL(student‖teacher) on the student's samples. For the text's direction use kk.forward_kl with the window as "
        "its mask.",
    ),
    Recipe(
        46, "G-OPD / ExOPD", "Learning beyond Teacher: Generalized On-Policy Distillation with Reward Extrapolation",
        2025, ("gopd_advantages", "gopd_loss"), "R0", "code", link="arXiv 2602.12125",
        differs="Equation 14 prints the advantage as a cost, without its minus.",
    ),
)  # fmt: skip


@torch.no_grad()
def vopd_advantages(
    logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor,
    *,
    baseline: Literal["full", "top_k", "none"] = "full",
    k: int = 100,
    reward_clip: float | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""A = ℓ_T − ℓ + b, the advantage of on-policy distillation with a control variate; [B, T], without gradient.

    With the baseline "full", b = KL(q‖p), whose mean over the student's samples makes A's mean 0; "top_k": KL(q‖p) on
    the student's k likeliest tokens, both renormalised on them; "none": b = 0, plain on-policy distillation. Every
    baseline leaves the gradient's mean as it is, that of KL(q‖p). Source: paper 3 (vOPD) and its code.

    Args:
        logits, teacher_logits: [B, T, V]. token_ids: [B, T], sampled from the student; one equal to `ignore_index` is
            masked, and its advantage 0.
        baseline, k: see above. reward_clip: λ between 0 and 1 raises ℓ_T − ℓ to at least log(λ)/(1 − λ); only without a
            baseline. Default off.
        temperature: of both softmaxes. mask, vocab_size, backend: see `kk.token_stats`.

    >>> import torch, kldiv_kernels as kk
    >>> s, t = torch.tensor([[[2.0, 0.5, -1.0, 0.0]]]), torch.tensor([[[1.0, 1.5, -0.5, 0.0]]])
    >>> round(kk.recipes.vopd_advantages(s, t, torch.tensor([[1]])).item(), 4)
    1.534
    """
    if baseline not in ("full", "top_k", "none"):
        raise ValueError(f"vopd_advantages: baseline is {baseline!r}; expected full, top_k or none")
    if reward_clip is not None and (baseline != "none" or not 0 < reward_clip < 1):
        raise ValueError(
            f"vopd_advantages: reward_clip is {reward_clip} with baseline {baseline!r}; expected a number between 0 "
            "and 1, with baseline 'none'"
        )
    valid = valid_tokens(token_ids, mask, ignore_index)
    shared: dict[str, Any] = {"temperature": temperature, "mask": valid, "vocab_size": vocab_size, "backend": backend}
    names = ("logprob", "reference_logprob") + (("reverse_kl",) if baseline == "full" else ())
    stats = token_stats(logits, teacher_logits, torch.where(valid, token_ids, 0), stats=names, **shared)
    advantages = stats.reference_logprob - stats.logprob
    if reward_clip is not None:
        advantages = advantages.clamp_min(math.log(reward_clip) / (1 - reward_clip))
    if baseline == "full":
        advantages = advantages + stats.reverse_kl
    if baseline == "top_k":
        advantages = advantages + topk_divergence_from_logits(
            logits, teacher_logits, "reverse_kl", k=k, support="student", tail="renormalize", reduction="none", **shared
        )
    return masked(advantages, valid)


def vopd_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor,
    *,
    baseline: Literal["full", "top_k", "none"] = "full",
    k: int = 100,
    reward_clip: float | None = None,
    kd_temperature: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: Backend = "auto",
    **options: Any,
) -> PolicyLoss:
    r"""−mean A·ℓ over the tokens, A from `vopd_advantages` at `kd_temperature`.

    A read without gradient for the advantages, then value and gradient in one. Source: paper 3 (vOPD) and its code.

    Args:
        logits, …, reward_clip, mask: see `vopd_advantages`. kd_temperature: of the advantage's softmaxes. options: of
            `kk.policy_loss`; `loss_type="grpo"` with old_logprobs clips the ratio, as the code does.

    Returns: `kk.PolicyLoss`, in nats.

    >>> import torch, kldiv_kernels as kk
    >>> s, t = torch.tensor([[[2.0, 0.5, -1.0, 0.0]]]), torch.tensor([[[1.0, 1.5, -0.5, 0.0]]])
    >>> round(kk.recipes.vopd_loss(s, t, torch.tensor([[1]])).loss.item(), 4)
    2.8261
    """
    shared: dict[str, Any] = {
        "mask": mask, "ignore_index": ignore_index, "vocab_size": vocab_size, "backend": backend
    }  # fmt: skip
    advantages = vopd_advantages(
        logits, teacher_logits, token_ids, baseline=baseline, k=k, reward_clip=reward_clip, temperature=kd_temperature,
        **shared,
    )  # fmt: skip
    return policy_loss(logits, token_ids, advantages, **shared, **defaults(options, loss_type="reinforce"))


def tcod_loss(
    logits: Tensor,
    token_ids: Tensor,
    *,
    old_logprobs: Tensor,
    teacher_logprobs: Tensor,
    turns: Tensor,
    window: int,
    dual_clip: float = 3.0,
    mask: Tensor | None = None,
    **options: Any,
) -> PolicyLoss:
    r"""On-policy distillation on the first `window` turns: dual-clip PPO with A = (ℓ_T − ℓ_old)·1[turn < window].

    Source: paper 14 (TCOD) and its code. `schedules.growing_window` gives the window of a step.

    Args:
        logits: [B, T, V]. token_ids, old_logprobs, teacher_logprobs: [B, T]. turns: [B, T] integers, the turn of each
            token from 0; −1 where the student did not write it, which masks it. window: the number of turns that count;
            the other turns' tokens stay in the denominator.
        dual_clip: 3. mask, options: see `kk.policy_loss`.

    Returns: `kk.PolicyLoss`, the mean over tokens; 0 for an empty window.

    >>> import torch, kldiv_kernels as kk
    >>> out = kk.recipes.tcod_loss(
    ...     torch.zeros(1, 2, 4), torch.tensor([[0, 1]]), old_logprobs=torch.full((1, 2), -1.5),
    ...     teacher_logprobs=torch.full((1, 2), -1.0), turns=torch.tensor([[0, 1]]), window=1)
    >>> round(out.loss.item(), 4)
    -0.2801
    """
    of_tokens_checked(token_ids, old_logprobs=old_logprobs, teacher_logprobs=teacher_logprobs, turns=turns, mask=mask)
    written = turns >= 0
    inside = turn_window(turns, window)
    advantages = masked(widened(teacher_logprobs) - widened(old_logprobs), inside)
    chosen = defaults(options, loss_type="grpo", aggregation="token-mean", dual_clip=dual_clip)
    valid = written if mask is None else written & (mask != 0)
    return policy_loss(logits, token_ids, advantages, old_logprobs=old_logprobs, mask=valid, **chosen)


def gopd_advantages(
    old_logprobs: Tensor, teacher_logprobs: Tensor, base_logprobs: Tensor, *, extrapolation: float = 1.25
) -> Tensor:
    r"""A = λ(ℓ_T − ℓ_b) − (ℓ_old − ℓ_b), without gradient; paper 46 (G-OPD, ExOPD for λ > 1), eqs. 11–14.

    With λ = 1 it is on-policy distillation for any base; the optimum is softmax(λ·t + (1 − λ)·b). For
    `kk.policy_loss(preset="verl", …)`, with off_policy_max=5 where sampling_logprobs are given.

    Args: all three of one shape; base: the student before training, or the teacher before its own. extrapolation: λ.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.gopd_advantages(torch.tensor([-2.0]), torch.tensor([-1.0]), torch.tensor([-3.0]))
    tensor([1.5000])
    """
    like_checked("old_logprobs", old_logprobs, teacher_logprobs=teacher_logprobs, base_logprobs=base_logprobs)
    old, teacher, base = (widened(x.detach()) for x in (old_logprobs, teacher_logprobs, base_logprobs))
    if extrapolation == 1:
        return teacher - old
    return extrapolation * (teacher - base) - (old - base)


def gopd_loss(
    logits: Tensor, teacher_logits: Tensor, base_logits: Tensor, *, extrapolation: float = 1.25, **options: Any
) -> Tensor:
    r"""λ·KL(q‖p) + (1 − λ)·KL(q‖b) over the vocabulary: G-OPD (paper 46) without sampling a token.

    Its gradient is that of KL(q ‖ softmax(λt + (1 − λ)b)), of which no logits are made; its value differs by log Z. Two
    reads, each with its gradient.

    Args:
        logits, teacher_logits, base_logits: [*, V]; the latter two get no gradient. A column that both of them leave
            out (−inf), and the student does not, makes it NaN: ∞ − ∞.
        extrapolation: λ. options: of `kk.divergence_loss` (mask, labels, normalizer, reduction, temperature, …) but
            `weight`.

    >>> import torch, kldiv_kernels as kk
    >>> s, t, b = [2.0, 0.5, -1.0, 0.0], [1.0, 1.5, -0.5, 0.0], [0.5, 0.0, 0.0, -0.5]
    >>> round(kk.recipes.gopd_loss(*(torch.tensor([x]) for x in (s, t, b))).item(), 4)
    0.3932
    """
    shape, total = logits.shape[:-1], None
    for reference, share in ((teacher_logits, extrapolation), (base_logits, 1 - extrapolation)):
        if share != 0 or total is None:
            weight = torch.full(shape, share, dtype=torch.float32, device=logits.device)
            part = reverse_kl(logits, reference.detach(), weight=weight, **options)
            total = part if total is None else total + part
    assert total is not None
    return total
