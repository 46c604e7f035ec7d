"""Which token of a response gets how much of the credit: weights and advantages by token.

They have no gradient and go to `kk.policy_loss` as `token_weights` or `advantages`, which reads the logits once. Only
`gtpo_loss` is a loss itself. π, ℓ = log π, ℓ_old, ℓ_ref: of the sampled token under the policy, the policy that sampled
and a reference; ρ = e^(ℓ − ℓ_old); A: the advantage; H: the entropy of the policy, in nats.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from kldiv_kernels.choices import Backend
from kldiv_kernels.groups import numbered, sums
from kldiv_kernels.policy import PolicyLoss, importance, with_slope
from kldiv_kernels.policy import advantages as from_rewards
from kldiv_kernels.recipes.checks import of_sequences_checked, of_tokens_checked
from kldiv_kernels.recipes.composed import of_tokens
from kldiv_kernels.recipes.recipe import Recipe
from kldiv_kernels.recipes.reductions import masked, policy_result, reverse_cumsum, sequence_mean, valid_tokens, widened
from kldiv_kernels.recipes.selection import first_tokens
from kldiv_kernels.stats import token_stats

PAPERS = (
    Recipe(
        27, "DGPO", "DGPO: Distribution Guided Policy Optimization for Fine Grained Credit Assignment", 2026,
        ("dgpo_weights",), "R0+f", "restated", link="arXiv 2605.03327",
        differs="Neither the paper's text nor the authors' code was seen.",
    ),
    Recipe(
        37, "STEER", "Rethinking Entropy Interventions in RLVR: An Entropy Change Perspective", 2025,
        ("steer_weights",), "R0", "code", link="github.com/zz-haooo/STEER",
        differs="The estimate of the entropy's change is the code's. The paper's theorem has one more factor π of the "
        "sampled token, and 0 for clipped tokens. minimum is 0.7 in the paper (version 4), 0.8 in the code's script.",
    ),
    Recipe(
        47, "GTPO", "GTPO: Trajectory-Based Policy Optimization in Large Language Models", 2025,
        ("conflict_weights", "gtpo_loss"), "R1", "code", link="github.com/winstonsmith1897/GTPO",
        differs="The code filters by 0.7 in place of ln 2, whatever the initial entropy, and divides a completion's "
        "loss by its conflict tokens (per_conflict_mean=True). Conflict tokens are, as in the code, those of a run "
        "from either end; those of the abstract need none (require_run=False).",
    ),
    Recipe(
        84, "PRL", "PRL: Process Reward Learning Improves LLMs' Reasoning Ability and Broadens the Reasoning Boundary",
        2026, ("process_advantages",), "R0", "code", link="github.com/MaxwellJryao/Process-Reward-Learning",
        differs="The code fills a step by looking for the next number that is not 0; a sum of exactly 0 at the end of "
        "a step would then be that of the next step. Here it is 0.",
    ),
)  # fmt: skip


@torch.no_grad()
def dgpo_weights(
    logits: Tensor,
    reference_logits: Tensor,
    mask: Tensor,
    *,
    credit_temperature: float = 0.5,
    power: float = 1.0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""w = T·softmax_t(d·(H/log V)^κ / τ) over each response's T tokens: token weights with mean 1, [B, T].

    d = 1 − Σ_v √(q_v p_v) is the squared Hellinger distance of policy and reference, H the policy's entropy. Source:
    paper 27 (DGPO) as two others restate it. For `kk.policy_loss(token_weights=w)` without a KL. One read.

    Args:
        logits, reference_logits: [B, T, V]. mask: [B, T] bool. credit_temperature: τ; the paper has 0.5 to 1. power: κ.
        temperature, vocab_size, backend: see `kk.token_stats`.

    >>> import torch, kldiv_kernels as kk
    >>> s, b, t = [2.0, 0.5, -1.0, 0.0], [0.5, 0.0, 0.0, -0.5], [1.0, 1.5, -0.5, 0.0]
    >>> kk.recipes.dgpo_weights(torch.tensor([[s, b]]), torch.tensor([[t, t]]), torch.tensor([[True, True]]))
    tensor([[1.0080, 0.9920]])
    """
    if credit_temperature <= 0:
        raise ValueError(f"dgpo_weights: credit_temperature is {credit_temperature}; expected a number above 0")
    valid = mask != 0
    stats = token_stats(
        logits, reference_logits, stats=("hellinger", "entropy"), temperature=temperature, mask=valid,
        vocab_size=vocab_size, backend=backend,
    )  # fmt: skip
    largest = math.log(max(logits.shape[-1] if vocab_size is None else vocab_size, 2))
    # Rounding may leave an entropy just below 0, of which a power is NaN.
    score = stats.hellinger * (stats.entropy / largest).clamp_min(0) ** power
    share = torch.where(valid, score / credit_temperature, -torch.inf).softmax(-1)
    return masked(share * valid.sum(-1, keepdim=True), valid)


@torch.no_grad()
def steer_weights(
    old_logprobs: Tensor,
    old_entropy: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    logprobs: Tensor | None = None,
    minimum: float = 0.7,
    floor: float = 0.02,
    scheme: Literal["exponential", "linear"] = "exponential",
    bounds: tuple[float, float] = (0.8, 1.2),
) -> Tensor:
    r"""Weights that fall with |Ω|, Ω = A·ρ·(1 − π)(log π + H) the estimated change of a token's entropy; [B, T].

    exponential: w = minimum^(|Ω| / max(max |Ω|, floor)); linear: from bounds[1] at the smallest |Ω| to bounds[0] at the
    largest, the middle where they are equal. Source: paper 37 (STEER) and its code. For
    `kk.policy_loss(token_weights=w, clip_low=0.2, clip_high=0.28, dual_clip=10, aggregation="token-mean")`.

    Args:
        old_logprobs, old_entropy: [B, T] of the policy that sampled; `kk.PolicyLoss` has the entropy of a pass.
        advantages: [B] or [B, T]. mask: [B, T] bool; the extremes are those of its tokens, the method's micro-batch.
        logprobs: [B, T] of the current policy. Default: the old ones, so that ρ is 1.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.steer_weights(
    ...     torch.tensor([[-0.1, -1.0, -3.0]]), torch.tensor([[0.3, 1.2, 2.5]]), torch.tensor([[1.0, -1.0, 0.5]]),
    ...     torch.ones(1, 3, dtype=torch.bool), minimum=0.8)
    tensor([[0.9823, 0.8880, 0.8000]])
    """
    if scheme not in ("exponential", "linear"):
        raise ValueError(f"steer_weights: scheme is {scheme!r}; expected exponential or linear")
    if not 0 < minimum <= 1 or floor <= 0:
        raise ValueError(f"steer_weights: minimum is {minimum}, floor {floor}; expected 0 < minimum ≤ 1, floor > 0")
    of_tokens_checked(mask, old_logprobs=old_logprobs, old_entropy=old_entropy, logprobs=logprobs)
    valid = mask != 0
    # The code's bounds of a probability keep log π and the ratio finite.
    lowest, highest = math.log(1e-8), math.log1p(-1e-8)
    old_logprobs = widened(old_logprobs)
    log_pi = (old_logprobs if logprobs is None else widened(logprobs)).clamp(lowest, highest)
    ratio = (log_pi - old_logprobs.clamp_min(lowest)).exp()
    change = of_tokens(advantages, log_pi) * ratio * -torch.expm1(log_pi) * (log_pi + old_entropy)
    size = masked(change.abs(), valid)
    # A number beside the tokens', since an empty batch has no extremes.
    top = torch.cat([size.flatten(), size.new_zeros(1)]).amax()
    if scheme == "exponential":
        return masked(minimum ** (size / top.clamp_min(floor)), valid)
    bottom = torch.cat([torch.where(valid, size, torch.inf).flatten(), top[None]]).amin()
    low, high = bounds
    spread = torch.where(top > bottom, top - bottom, 1.0)
    place = torch.where(top > bottom, (size - bottom) / spread, 0.5)
    return masked(high - (high - low) * place, valid)


@torch.no_grad()
def conflict_weights(
    token_ids: Tensor,
    advantages: Tensor,
    groups: Tensor,
    mask: Tensor,
    *,
    positive: float = 2.0,
    require_run: bool = True,
) -> Tensor:
    r"""λ of GTPO: conflict tokens count `positive` in completions with A > 0 and 0 in those with A < 0; [B, T].

    A conflict token stands at the same place in a completion with A > 0 and in one with A < 0 of its group; others
    count 1. Places are counted from the start, then from the end, and the two weights multiplied. Source: paper 47
    (GTPO) and its code.

    Args:
        token_ids: [B, T]. advantages: [B]; completions with A = 0 take no part. groups: [B] integers, the prompt.
        mask: [B, T] bool; its tokens are counted. require_run: True: conflict tokens are those of a run without a gap
            from the start or the end, in which the other completion may change; False: any.

    >>> import torch, kldiv_kernels as kk
    >>> ids = torch.tensor([[5, 7, 9, 0], [5, 8, 4, 9]])
    >>> kk.recipes.conflict_weights(ids, torch.tensor([1.0, -1.0]), torch.tensor([0, 0]), ids > 0)
    tensor([[2., 1., 2., 0.],
            [0., 1., 1., 0.]])
    """
    of_tokens_checked(token_ids, mask=mask)
    of_sequences_checked(token_ids, advantages=advantages, groups=groups)
    valid = mask != 0
    weights = valid.to(advantages.dtype)
    for conflict in _conflicts(token_ids, advantages, groups, valid, require_run):
        weights = torch.where(conflict, weights * torch.where(advantages > 0, positive, 0.0)[:, None], weights)
    return weights


def gtpo_loss(
    logits: Tensor,
    token_ids: Tensor,
    rewards: Tensor,
    groups: Tensor,
    *,
    entropy_coef: float = 0.1,
    entropy_threshold: float = math.log(2),
    initial_entropy: float | Tensor | None = None,
    per_conflict_mean: bool = False,
    positive: float = 2.0,
    require_run: bool = True,
    old_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> PolicyLoss:
    r"""−(1/G) Σ_i δ_i·(A_i − γ⟨H⟩_i)/|o_i|·Σ_t ρ_t·λ_t, without a clip and a KL; paper 47 (GTPO) and its code.

    A: GRPO's advantages of the rewards. ⟨H⟩: the mean entropy of a completion, without gradient. δ = 1 where it is at
    most the threshold, or where the initial policy's is above it; else 0. λ: `conflict_weights`.

    Args:
        logits: [B, T, V]. token_ids: [B, T]. rewards: [B]. groups: [B] integers, the prompt. entropy_coef: γ.
        entropy_threshold: ln 2 as in the paper. initial_entropy: a number or [B], the mean entropy before training.
            Default: none, as in the code. per_conflict_mean: True divides a completion's loss by its conflict tokens.
        positive, require_run: see `conflict_weights`. old_logprobs: [B, T], of the ratio ρ; default: this policy's, so
            that it is 1. mask, normalizer, temperature, ignore_index, vocab_size, backend: see `kk.policy_loss`.

    Returns: `kk.PolicyLoss`, the mean over sequences, with the metrics entropy and kept_fraction (of the tokens).

    >>> import torch, kldiv_kernels as kk
    >>> logits = torch.tensor([2.0, 0.5, -1.0, 0.0]).expand(2, 2, 4)
    >>> out = kk.recipes.gtpo_loss(
    ...     logits, torch.tensor([[0, 1], [0, 2]]), torch.tensor([1.0, 0.0]), torch.tensor([0, 0]),
    ...     entropy_threshold=1.0)
    >>> round(out.loss.item(), 4)
    -0.2657
    """
    per_sequence = initial_entropy if isinstance(initial_entropy, Tensor) and initial_entropy.dim() > 0 else None
    of_sequences_checked(token_ids, rewards=rewards, groups=groups, initial_entropy=per_sequence)
    of_tokens_checked(token_ids, old_logprobs=old_logprobs)
    valid = valid_tokens(token_ids, mask, ignore_index)
    stats = token_stats(
        logits, None, torch.where(valid, token_ids, 0), stats=("logprob", "entropy"), temperature=temperature,
        mask=valid, vocab_size=vocab_size, backend=backend,
    )  # fmt: skip
    entropy = stats.entropy.detach()
    mean = sequence_mean(entropy, valid)
    kept = (mean <= entropy_threshold) | (initial_entropy is not None and initial_entropy > entropy_threshold)
    advantages = from_rewards.group_relative(rewards, groups).to(mean.dtype)
    weights = conflict_weights(token_ids, advantages, groups, valid, positive=positive, require_run=require_run)
    if per_conflict_mean:
        left, right = _conflicts(token_ids, advantages, groups, valid, require_run)
        weights = weights / (left | right).sum(-1, keepdim=True).clamp_min(1)
    shaped = torch.where(kept, advantages - entropy_coef * mean, 0.0)
    per_token = -shaped[:, None] * weights
    if old_logprobs is None:
        # The ratio is 1, of a token without probability too.
        slope = per_token.masked_fill(stats.logprob.isnan(), torch.nan)
        per_token = with_slope(slope.clone(), stats.logprob, slope)
    else:
        old = masked(old_logprobs.to(stats.logprob.dtype), valid)
        per_token = importance(per_token, stats.logprob, old)
    return policy_result(
        per_token, stats.logprob, valid,
        aggregation="seq-mean-token-mean", normalizer=normalizer, entropy=entropy,
        metrics={"entropy": entropy, "kept_fraction": kept[:, None].expand_as(entropy)},
    )  # fmt: skip


@torch.no_grad()
def process_advantages(
    advantages: Tensor,
    old_logprobs: Tensor,
    reference_logprobs: Tensor,
    mask: Tensor,
    *,
    eta: float = 200.0,
    step_length: int = 256,
    step_ends: Tensor | None = None,
) -> Tensor:
    r"""A_t = A − (1/η) Σ_{j ≥ e(t)} (ℓ_old − ℓ_ref) with e(t) the last token of t's step, itself in the sum; [B, T].

    Source: paper 84 (PRL), its code. For a clipped loss without a KL.

    Args:
        advantages: [B] or [B, T], GRPO's. old_logprobs, reference_logprobs: [B, T]. mask: [B, T] bool.
        eta: η; 200 and 256 for Llama-3.2-3B, 1 and 128 for Qwen2.5-Math-1.5B, 100 and 64 for 7B.
        step_length: tokens of a step, counted over the mask. step_ends: [B, T] bool, the last token of each step, in
            place of step_length. A sequence's last token ends a step, too.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.process_advantages(
    ...     torch.tensor([1.0]), torch.tensor([[-1.0, -1.0, -1.0]]), torch.tensor([[-2.0, -3.0, -5.0]]),
    ...     torch.ones(1, 3, dtype=torch.bool), eta=10.0, step_length=2)
    tensor([[0.4000, 0.4000, 0.6000]])
    """
    if eta <= 0 or step_length < 1:
        raise ValueError(f"process_advantages: eta is {eta}, step_length {step_length}; expected eta > 0, a length ≥ 1")
    of_tokens_checked(old_logprobs, reference_logprobs=reference_logprobs, mask=mask, step_ends=step_ends)
    valid = mask != 0
    ends = valid.cumsum(-1) % step_length == 0 if step_ends is None else step_ends != 0
    ends = (ends & valid) | first_tokens(valid.flip(-1), 1).flip(-1)
    count = mask.shape[-1]
    places = torch.where(ends, torch.arange(count, device=mask.device), count)
    end = places.flip(-1).cummin(-1).values.flip(-1).clamp_max(max(count - 1, 0))
    moved = reverse_cumsum(widened(old_logprobs) - widened(reference_logprobs), valid).gather(-1, end)
    return masked(of_tokens(advantages, moved) - moved / eta, valid)


def _conflicts(
    token_ids: Tensor, advantages: Tensor, groups: Tensor, mask: Tensor, require_run: bool
) -> tuple[Tensor, Tensor]:
    """Bool [B, T] each: conflict tokens by their place from the start, and from the end."""
    index, signs = numbered(groups)[:, None], (advantages > 0, advantages < 0)

    def at_place(ids: Tensor, mask: Tensor) -> Tensor:
        # One number for each (group, place, token) that occurs.
        ids = numbered(torch.where(mask, ids, -1))
        places = mask.cumsum(-1)
        found = numbered((index * (mask.shape[-1] + 1) + places) * max(ids.numel(), 1) + ids).reshape(-1)
        conflict = mask & (advantages != 0)[:, None]
        for sign in signs:
            count = sums((sign[:, None] & mask).reshape(-1).long(), found)
            conflict = conflict & (count[found] > 0).reshape(mask.shape)
        return conflict & ((mask & ~conflict).cumsum(-1) == 0) if require_run else conflict

    return at_place(token_ids, mask), at_place(token_ids.flip(-1), mask.flip(-1)).flip(-1)
