"""Losses in which the answers of a prompt stand together.

ℓ, ℓ_old: log-probabilities of the sampled token under the policy and the policy that sampled; ρ = exp(ℓ − ℓ_old). All
answers of a prompt are in one call. Nats, unless said.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kldiv_kernels.choices import Backend
from kldiv_kernels.groups import numbered
from kldiv_kernels.policy import PolicyLoss, surrogate
from kldiv_kernels.recipes.checks import like_checked, of_sequences_checked, of_tokens_checked
from kldiv_kernels.recipes.composed import options_checked
from kldiv_kernels.recipes.recipe import Recipe
from kldiv_kernels.recipes.reductions import (
    batch_mean,
    group_logsumexp,
    group_mean,
    group_softmax,
    group_sum,
    masked,
    policy_result,
    sequence_mean,
    times,
    valid_tokens,
)
from kldiv_kernels.stats import token_stats

PAPERS = (
    Recipe(
        73, "DRPO", "DRPO: Efficient Reasoning via Decoupled Reward Policy Optimization", 2026, ("drpo_loss",), "R1",
        "code", link="github.com/Optimization-AI/DRPO",
        differs="The code's value of the wrong answers' part is the constant τ, with the gradient of the objective; "
        "here it is the objective. The code gathers the answers of all ranks first.",
    ),
    Recipe(
        109, "COPO", "COPO: Consistency-Aware Policy Optimization", 2025,
        ("copo_loss", "copo_global_advantages", "answer_entropy"), "R1", "code", link="github.com/hijih/copo-code",
        differs="Defaults as in run_copo.sh. Of the code's eight ways to weigh the two advantages this has two: "
        "soft-with-zero and only-soft.",
    ),
)  # fmt: skip


def drpo_loss(
    logits: Tensor,
    token_ids: Tensor,
    rewards: Tensor,
    groups: Tensor,
    *,
    old_logprobs: Tensor,
    mask: Tensor | None = None,
    tau: float = 10.0,
    length_temperature: float = 0.1,
    beta: float = 1e3,
    delta: float = 1e-4,
    kl_estimator: Literal["k1", "k3"] = "k1",
    max_length: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> PolicyLoss:
    r"""−(1/prompts)·Σ_prompts [Σ₊ w·S/Σ₊ w − τ·log Σ₋ exp(S/τ)] + sg[β·max(KL − δ, 0)]·KL; paper 73 (DRPO), nats.

    S: an answer's mean ℓ. Σ₊ over the correct answers of a prompt, with the shorter ones' w = exp((1 − |o|/L)/Λ)
    larger; Σ₋ over the wrong ones, nothing where none has a probability. A prompt without both kinds adds nothing, but
    counts. A sampled token without probability makes the KL infinite and the loss NaN; beta=0 leaves the KL out.

    Args:
        logits: [B, T, V]. token_ids, old_logprobs, mask: [B, T]. rewards: [B], correct above 0. groups: [B], the prompt
            of each answer; all its answers in one call.
        tau, length_temperature, max_length: τ, Λ and L, which is T by default.
        beta, delta, kl_estimator: of the trust region; KL is the mean over tokens of "k1" ℓ_old − ℓ or "k3"
            ρ − 1 − (ℓ − ℓ_old).
        temperature, ignore_index, vocab_size, backend: see `kk.token_stats`.

    Returns: `kk.PolicyLoss`; of its metrics `kl` is KL. One read, and one for the gradient.

    >>> import torch, kldiv_kernels as kk
    >>> logits = torch.tensor([[[2.0, 0.5, -1.0, 0.0]], [[0.0, 0.0, 0.0, 0.0]]])
    >>> out = kk.recipes.drpo_loss(
    ...     logits, torch.tensor([[0], [1]]), torch.tensor([1.0, 0.0]), torch.tensor([0, 0]),
    ...     old_logprobs=torch.full((2, 1), 0.25).log())
    >>> round(out.loss.item(), 4)
    -1.0439
    """
    if kl_estimator not in ("k1", "k3"):
        raise ValueError(f"drpo_loss: kl_estimator is {kl_estimator!r}; expected k1 or k3")
    for name, value in (("tau", tau), ("length_temperature", length_temperature)):
        if not value > 0:
            raise ValueError(f"drpo_loss: {name} is {value}; expected above 0")
    of_sequences_checked(token_ids, rewards=rewards, groups=groups)
    of_tokens_checked(token_ids, old_logprobs=old_logprobs)
    valid = valid_tokens(token_ids, mask, ignore_index)
    logprob = token_stats(
        logits, labels=torch.where(valid, token_ids, 0), stats=("logprob",), temperature=temperature, mask=valid,
        vocab_size=vocab_size, backend=backend,
    ).logprob  # fmt: skip
    lengths, scores = valid.sum(-1).to(logprob.dtype), sequence_mean(logprob, valid)
    correct, wrong = (lengths > 0) & (rewards > 0), (lengths > 0) & ~(rewards > 0)
    both = group_sum(correct.double(), groups).bool() & group_sum(wrong.double(), groups).bool()
    longest = max(valid.shape[-1], 1) if max_length is None else max_length
    pulled = group_softmax(-lengths / (longest * length_temperature), groups, correct & both)
    log_total = masked(group_logsumexp(scores / tau, groups, wrong & both), both)
    # Shares of one sum, so that each answer has a loss of its own; value and gradient are those of the sum.
    pushed = times(group_softmax(scores.detach() / tau, groups, wrong & both), tau * log_total)
    prompts = (numbered(groups).amax() + 1).to(logprob.dtype) if groups.numel() else 1.0
    of_answer = (pushed - times(pulled, scores)) / (lengths.clamp_min(1) * prompts)

    moved = masked(logprob - old_logprobs.detach().to(logprob.dtype), valid)
    estimates = -moved if kl_estimator == "k1" else torch.expm1(moved) - moved
    per_token = of_answer[:, None].expand_as(logprob)
    if beta != 0:
        beyond = (beta * (batch_mean(estimates.detach(), valid) - delta)).clamp_min(0)
        per_token = per_token + times(beyond, estimates) / lengths.sum().clamp_min(1)
    return policy_result(per_token, logprob, valid, aggregation="token-sum", metrics={"kl": estimates})


def copo_loss(
    logits: Tensor,
    token_ids: Tensor,
    local_advantages: Tensor,
    global_advantages: Tensor,
    answers: Tensor,
    groups: Tensor,
    rewards: Tensor,
    *,
    old_logprobs: Tensor,
    sharpness: float = 5.0,
    midpoint: float = 1.0,
    zero_wrong: bool = True,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> PolicyLoss:
    r"""w·PPO(A_local) + (1 − w)·PPO(A_global), w = σ(k·(H − b)) of the answers' entropy H; paper 109 (COPO), as run.

    Where a prompt's answers agree, their advantages within the group say little, and those between prompts count.

    Args:
        logits: [B, T, V]. token_ids, old_logprobs, mask: [B, T].
        local_advantages: [B], within the group, as GRPO's. global_advantages: [B], `copo_global_advantages`.
        answers, groups: [B] integers, see `answer_entropy`. rewards: [B].
        sharpness, midpoint: k and b, of H in bits. zero_wrong: w = 0 where the reward is 0 ("soft-with-zero").
        clip_low, clip_high, dual_clip, normalizer: of both losses, see `kk.policy_loss`; the aggregation is
            seq-mean-token-mean.
        temperature, ignore_index, vocab_size, backend: see `kk.token_stats`.

    Returns: `kk.PolicyLoss`; its metric `local_weight` is the mean of w. One read, and one for the gradient.

    >>> import torch, kldiv_kernels as kk
    >>> out = kk.recipes.copo_loss(
    ...     torch.zeros(2, 1, 4), torch.tensor([[0], [1]]), torch.zeros(2), torch.ones(2), torch.tensor([7, 7]),
    ...     torch.tensor([0, 0]), torch.ones(2), old_logprobs=torch.full((2, 1), 0.25).log())
    >>> round(out.loss.item(), 4)
    -0.9933
    """
    options_checked("copo_loss", logits, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    of_sequences_checked(
        token_ids, local_advantages=local_advantages, global_advantages=global_advantages, answers=answers,
        groups=groups, rewards=rewards,
    )  # fmt: skip
    of_tokens_checked(token_ids, old_logprobs=old_logprobs)
    valid = valid_tokens(token_ids, mask, ignore_index)
    logprob = token_stats(
        logits, labels=torch.where(valid, token_ids, 0), stats=("logprob",), temperature=temperature, mask=valid,
        vocab_size=vocab_size, backend=backend,
    ).logprob  # fmt: skip
    weight = torch.sigmoid(sharpness * (answer_entropy(answers, groups) - midpoint))
    if zero_wrong:
        weight = torch.where(rewards == 0, 0.0, weight)
    shares = weight.to(logprob.dtype)[:, None].expand_as(logprob)
    log_ratio = masked(logprob - old_logprobs.detach().to(logprob.dtype), valid)
    total = torch.zeros_like(logprob)
    for share, advantages in ((shares, local_advantages), (1 - shares, global_advantages)):
        given = advantages.detach().to(logprob.dtype)[:, None].expand_as(logprob)
        term = surrogate(log_ratio, given, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
        # A share of 0 of an infinite loss is 0.
        total = total + torch.where(share > 0, share * term.per_token, 0.0)
    return policy_result(
        total, logprob, valid, aggregation="seq-mean-token-mean", normalizer=normalizer,
        metrics={"local_weight": shares},
    )  # fmt: skip


@torch.no_grad()
def copo_global_advantages(
    rewards: Tensor, groups: Tensor, answers: Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    r"""(R_g − mean R)/(std R + eps) over the batch's prompts, at each sample: [B], without gradient; paper 109 (COPO).

    R_g: a prompt's mean reward; with `answers` times 1 − λH, λ = (1 − 1/n)/log₂ n of n samples (the code's
    reward_coef_flg, off in its script). std is unbiased; one prompt alone has the advantage 0.

    Args: rewards: [B]. groups, answers: [B] integers, see `answer_entropy`.

    >>> import torch, kldiv_kernels as kk
    >>> a = kk.recipes.copo_global_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1]))
    >>> a.round(decimals=3)
    tensor([-0.7070, -0.7070,  0.7070,  0.7070])
    """
    if not rewards.is_floating_point():
        raise TypeError(f"copo_global_advantages: rewards is {rewards.dtype}; expected floating point")
    like_checked("rewards", rewards, groups=groups, answers=answers)
    values = rewards.double()
    size, of_prompt = group_sum(torch.ones_like(values), groups), group_mean(values, groups)
    if answers is not None:
        # A sample alone has H = 0.
        of_prompt = of_prompt * (1 - (1 - 1 / size) / size.clamp_min(2).log2() * answer_entropy(answers, groups))
    # A sum of 1/n is the number of prompts but for rounding.
    prompts = (1 / size).sum().round()
    if of_prompt.numel():
        # Prompts with equal rewards differ from one of them by exactly 0.
        of_prompt = of_prompt - of_prompt.amin()
    apart = of_prompt - (of_prompt / size).sum() / prompts.clamp_min(1)
    deviation = ((apart.square() / size).sum() / (prompts - 1).clamp_min(1)).sqrt()
    return (apart / (deviation + eps)).to(rewards.dtype)


@torch.no_grad()
def answer_entropy(answers: Tensor, groups: Tensor) -> Tensor:
    r"""The entropy, in bits, of the final answers of a prompt's samples, at each sample: [B] float64; paper 109 (COPO).

    Args: answers: [B] integers, equal where the answers are. groups: [B] integers, the prompt of each sample.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.answer_entropy(torch.tensor([7, 8, 7]), torch.tensor([0, 0, 1])).tolist()
    [1.0, 1.0, 0.0]
    """
    like_checked("groups", groups, answers=answers)
    ones = torch.ones(groups.shape, dtype=torch.float64, device=groups.device)
    alike = group_sum(ones, numbered(groups) * groups.numel() + numbered(answers))
    return group_mean((group_sum(ones, groups) / alike).log2(), groups)
