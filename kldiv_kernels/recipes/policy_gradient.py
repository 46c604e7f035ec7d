"""Policy gradients with weights, selections and denominators of their own: one call of `policy_loss` each.

Weights without gradient that are known beforehand are its advantages. ℓ, ℓ_old, ℓ_ref: log-probabilities of the sampled
token under the policy, the policy that sampled and a reference; ρ = exp(ℓ − ℓ_old).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from kldiv_kernels.policy import PolicyLoss, policy_loss
from kldiv_kernels.policy.advantages import rloo
from kldiv_kernels.recipes.checks import of_sequences_checked, of_tokens_checked
from kldiv_kernels.recipes.composed import of_tokens
from kldiv_kernels.recipes.recipe import Recipe
from kldiv_kernels.recipes.reductions import batch_mean, defaults, masked, sequence_mean, valid_tokens, widened

PAPERS = (
    Recipe(
        53, "OREAL", "Exploring the Limit of Outcome Reward for Learning Mathematical Reasoning", 2026,
        ("oreal_loss", "token_reward_loss"), "R0", "code", link="arXiv 2502.06781",
        differs="As released: correct answers are weighted by their advantage (eq. 11 has a weight of 1: "
        "scale_positive=False), the KL is k3 to the first policy, and each part has its own number of tokens. The "
        "value of the wrong answers' part is −A·ω·ℓ, where the code's is −A·ω with the same gradient. The code's "
        "kl_type='kl' has the wrong sign and is left out.",
    ),
    Recipe(
        61, "CTBench GRPO",
        "MLLM-CBench:A Comprehensive Benchmark for Continual Instruction Tuning of Multimodal LLMs with "
        "Chain-of-Thought Reasoning Analysis",
        2026, (), "R0", "derived",
        differs="Plain GRPO: kk.policy_loss(…, loss_type='grpo', kl_estimator='k3', kl_coef=β, reference_logprobs=…); "
        "its ablation without KL is kl_coef=0. The text was not read, and β was not found.",
    ),
    Recipe(
        72, "TOPR", "Tapered Off-Policy REINFORCE: Stable and efficient reinforcement learning for LLMs", 2026,
        ("topr_loss",), "R1", "restated", link="arXiv 2503.14286",
        differs="The paper's ratio is that of the whole answer (level='sequence_sum'); verl takes its mean over tokens "
        "('sequence'), ROLL that of each token ('token', one read). Other limits of the ratio than 0 and 1 are left "
        "out.",
    ),
    Recipe(
        107, "Clip-Cov / KL-Cov", "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models", 2025,
        ("clip_cov_loss", "kl_cov_loss", "entropy_change"), "R1", "code", link="arXiv 2505.22617",
        differs="The text penalises KL(old‖policy) on the chosen tokens; the code, and this function, |ℓ − ℓ_old|. "
        "clip_low and clip_high of Clip-Cov are 1, as in the published scripts.",
    ),
)  # fmt: skip


def oreal_loss(
    logits: Tensor,
    token_ids: Tensor,
    rewards: Tensor,
    groups: Tensor,
    token_scores: Tensor,
    *,
    reference_logprobs: Tensor | None = None,
    negative_coef: float = 0.5,
    kl_coef: float = 0.01,
    scale_positive: bool = True,
    token_counts: Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    **options: Any,
) -> PolicyLoss:
    r"""−Σ_{R>0} A·ω⁺·ℓ/N₊ − η·Σ_{R≤0} A·ω⁻·ℓ/N₋ + κ·Σ k3/N; paper 53 (OREAL), eqs. 10 and 11, as released.

    ω± = max(±(2σ(w̄) − 1), 0) with w̄ the mean of an answer's token scores so far; A: RLOO of the rewards; N₊, N₋, N:
    the tokens of correct answers, of wrong ones, of both; k3 of `reference_logprobs`. η, κ: negative_coef, kl_coef.

    Args:
        logits: [B, T, V]. token_ids: [B, T]. rewards, groups: [B], the outcome of each answer and its prompt.
        token_scores: [B, T], of the token reward model (`token_reward_loss`), as logits; no gradient.
        reference_logprobs: [B, T], of the policy before training; needed unless kl_coef is 0.
        scale_positive: False leaves A out of the correct answers' part, as eq. 11.
        token_counts: [3], N₊, N₋ and N over all ranks and accumulation steps. Default: of this call.
        mask, options: see `kk.policy_loss`.

    Returns: `kk.PolicyLoss`, in nats.

    >>> import torch, kldiv_kernels as kk
    >>> out = kk.recipes.oreal_loss(
    ...     torch.zeros(2, 1, 4), torch.tensor([[0], [1]]), torch.tensor([1.0, 0.0]), torch.tensor([0, 0]),
    ...     torch.tensor([[1.0], [-1.0]]), kl_coef=0.0)
    >>> round(out.loss.item(), 4)
    0.3203
    """
    of_tokens_checked(token_ids, token_scores=token_scores)
    of_sequences_checked(token_ids, rewards=rewards, groups=groups)
    if token_counts is not None and token_counts.shape != (3,):
        raise ValueError(f"oreal_loss: token_counts has shape {list(token_counts.shape)}; expected [3]")
    valid = valid_tokens(token_ids, mask, ignore_index)
    scores = widened(masked(token_scores.detach(), valid))
    # 2σ(w) − 1 is tanh(w/2).
    credit = (scores.cumsum(-1) / valid.cumsum(-1).clamp_min(1) / 2).tanh()
    correct = valid & (rewards > 0)[:, None]
    if token_counts is None:
        token_counts = torch.stack([correct.sum(), (valid & ~correct).sum(), valid.sum()])
    of_correct, of_wrong, of_all = token_counts.to(scores.dtype).clamp_min(1).unbind()
    advantages = rloo(rewards, groups)[:, None]
    positive = (advantages if scale_positive else 1.0) * credit.clamp_min(0) * (of_all / of_correct)
    negative = negative_coef * advantages * (-credit).clamp_min(0) * (of_all / of_wrong)
    weights = masked(torch.where(correct, positive, negative), valid)
    chosen = defaults(
        options, loss_type="reinforce", aggregation="token-mean", normalizer=of_all, kl_estimator="k3", kl_coef=kl_coef
    )
    return policy_loss(logits, token_ids, weights, reference_logprobs=reference_logprobs, mask=valid, **chosen)


def token_reward_loss(token_scores: Tensor, rewards: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Binary cross-entropy of σ(mean_t w_t) with the answer's outcome: trains OREAL's token reward model (paper 53).

    Args: token_scores: [B, T], w, with gradient. rewards: [B], 0 to 1. mask: [B, T].

    Returns: a scalar, the mean over the answers that have tokens; in nats.

    >>> import torch, kldiv_kernels as kk
    >>> round(kk.recipes.token_reward_loss(torch.tensor([[1.0, 3.0]]), torch.tensor([1.0])).item(), 4)
    0.1269
    """
    of_tokens_checked(token_scores, mask=mask)
    of_sequences_checked(token_scores, rewards=rewards)
    mean = sequence_mean(token_scores, mask)
    losses = binary_cross_entropy_with_logits(mean, rewards.detach().to(mean.dtype), reduction="none")
    return batch_mean(losses, None if mask is None else (mask != 0).any(-1))


def topr_loss(
    logits: Tensor,
    token_ids: Tensor,
    rewards: Tensor,
    *,
    old_logprobs: Tensor,
    level: Literal["sequence_sum", "sequence", "token"] = "sequence_sum",
    baseline: float = 0.0,
    **options: Any,
) -> PolicyLoss:
    r"""−w·R·mean_t ℓ, w = 1 where R ≥ 0, else sg[min(ρ, 1)]; paper 72 (TOPR), eq. 8, from others' words and code.

    Args:
        logits: [B, T, V]. token_ids: [B, T]. rewards: [B]; 1 and −1 in the paper.
        old_logprobs: [B, T], of the policy that sampled; the answers may be used for many steps.
        level: of ρ: "sequence_sum" exp(Σ_t ℓ − ℓ_old), "sequence" exp(mean_t …) as in verl, "token" as in ROLL.
        baseline: subtracted from the rewards; −1 leaves the answers with R = 1 alone.
        options: of `kk.policy_loss`.

    Returns: `kk.PolicyLoss`, the mean over answers.

    >>> import torch, kldiv_kernels as kk
    >>> out = kk.recipes.topr_loss(
    ...     torch.zeros(1, 2, 4), torch.tensor([[0, 1]]), torch.tensor([-1.0]), old_logprobs=torch.full((1, 2), -1.0))
    >>> round(out.loss.item(), 4)
    -0.6402
    """
    if level not in ("sequence_sum", "sequence", "token"):
        raise ValueError(f"topr_loss: level is {level!r}; expected sequence_sum, sequence or token")
    chosen = defaults(
        options, loss_type="topr", importance_level=level, aggregation="seq-mean-token-mean", log_ratio_clamp=math.inf
    )
    return policy_loss(logits, token_ids, rewards - baseline, old_logprobs=old_logprobs, **chosen)


def clip_cov_loss(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor,
    fraction: float = 2e-4,
    bounds: tuple[float, float] = (1.0, 5.0),
    **options: Any,
) -> PolicyLoss:
    r"""PPO's surrogate without `fraction` of the tokens, drawn from those of high covariance; paper 107 (Clip-Cov).

    The covariance of a token is (ℓ − mean ℓ)(A − mean A), means over the call's tokens. Those with one inside `bounds`
    that the clip leaves alone are drawn from, at least one; the dropped ones stay in the denominator.

    Args:
        logits: [B, T, V]. token_ids, old_logprobs: [B, T]. advantages: [B] or [B, T].
        options: of `kk.policy_loss`. Defaults: clip_low=1, clip_high=1, the mean over tokens.

    Returns: `kk.PolicyLoss`; its metric clip_fraction_cov is the share of dropped tokens.

    >>> import torch, kldiv_kernels as kk
    >>> ids, old = torch.tensor([[0, 1]]), torch.tensor([[-1.0, -2.0]])
    >>> logits = torch.tensor([[[3.0, 0.0], [3.0, 0.0]]])
    >>> out = kk.recipes.clip_cov_loss(logits, ids, torch.tensor([[2.0, -2.0]]), old_logprobs=old)
    >>> round(out.loss.item(), 4), out.metrics["clip_fraction_cov"].item()
    (-2.0, 0.5)
    """
    chosen = defaults(
        options, loss_type="grpo", aggregation="token-mean", clip_low=1.0, clip_high=1.0, cov_selection="clip"
    )
    return policy_loss(
        logits, token_ids, advantages, old_logprobs=old_logprobs, cov_fraction=fraction, cov_bounds=bounds, **chosen
    )


def kl_cov_loss(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor,
    percent: float = 0.2,
    kl_coef: float = 1.0,
    **options: Any,
) -> PolicyLoss:
    r"""−A·ρ, and β·|ℓ − ℓ_old| on the tokens with the highest covariance; no clip; paper 107 (KL-Cov).

    Args:
        logits: [B, T, V]. token_ids, old_logprobs: [B, T]. advantages: [B] or [B, T].
        percent: of the tokens, at least one; in percent, 0.2 for 7B and 0.02 for 32B. Covariance: see `clip_cov_loss`.
        kl_coef: β. options: of `kk.policy_loss`; the mean over tokens.

    Returns: `kk.PolicyLoss`, in nats.

    >>> import torch, kldiv_kernels as kk
    >>> ids, old = torch.tensor([[0, 1]]), torch.tensor([[-1.0, -2.0]])
    >>> logits = torch.tensor([[[3.0, 0.0], [3.0, 0.0]]])
    >>> out = kk.recipes.kl_cov_loss(logits, ids, torch.tensor([[2.0, -2.0]]), old_logprobs=old, percent=100)
    >>> round(out.loss.item(), 4)
    -1.2389
    """
    if not 0 < percent <= 100:
        raise ValueError(f"kl_cov_loss: percent is {percent}; expected above 0 and at most 100")
    chosen = defaults(
        options, loss_type="grpo", aggregation="token-mean", clip_low=1.0, clip_high=math.inf, cov_selection="kl"
    )
    return policy_loss(
        logits, token_ids, advantages, old_logprobs=old_logprobs, cov_fraction=percent / 100, cov_kl_coef=kl_coef,
        **chosen,
    )  # fmt: skip


@torch.no_grad()
def entropy_change(logprobs: Tensor, advantages: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""−Cov(ℓ, A) over the tokens, a scalar without gradient; paper 107: what a step does to the entropy.

    To first order the entropy of a softmax whose logits move by η·A changes by η times this, for tokens sampled from
    it. Below 0 the entropy falls. In nats.

    Args: logprobs: [B, T]. advantages: [B] or [B, T]. mask: [B, T].

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.entropy_change(torch.tensor([[-1.0, -3.0]]), torch.tensor([[1.0, -1.0]])).item()
    -1.0
    """
    advantages = of_tokens(advantages, logprobs)
    of_tokens_checked(logprobs, mask=mask)
    logprobs, advantages = widened(logprobs), widened(advantages)
    return -batch_mean((logprobs - batch_mean(logprobs, mask)) * (advantages - batch_mean(advantages, mask)), mask)
