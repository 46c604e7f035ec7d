"""Lists and groups: an order of classes, and a softmax or a regression over the candidates of a prompt.

Scalars, in nats; what has a gradient is said, and nothing else gets one.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from kldiv_kernels.choices import Backend
from kldiv_kernels.groups import centre, extreme, numbered, unbiased_variance
from kldiv_kernels.recipes.checks import like_checked, of_tokens_checked
from kldiv_kernels.recipes.lists import plackett_luce
from kldiv_kernels.recipes.recipe import Recipe
from kldiv_kernels.recipes.reductions import (
    batch_mean,
    group_logsumexp,
    group_mean,
    group_softmax,
    valid_labels,
    widened,
)
from kldiv_kernels.stats import token_stats
from kldiv_kernels.top_k import topk, topk_token_stats

PAPERS = (
    Recipe(
        26, "PLD", "PLD: A Choice-Theoretic List-Wise Knowledge Distillation", 2025, ("pld_loss",), "torch", "paper",
        differs="The first k places alone, with which a language model's vocabulary is two reads of each model's "
        "logits and one for the gradient, are not in the paper.",
    ),
    Recipe(
        48, "CRD", "Diffusion Reinforcement Learning via Centered Reward Distillation", 2026,
        ("centered_reward_loss", "velocity_anchor"), "none", "restated", link="arXiv 2603.14128",
        differs="As in a code of others. Its centring of both directions, with softmax weights, is left out.",
    ),
    Recipe(
        82, "ADPO", "ADPO: Anchored Direct Preference Optimization", 2026,
        ("adpo_loss", "reward_targets", "adaptive_tau"), "none", "code",
        differs="The author's code has the adaptive temperature on; here it is a call of its own. That the mean is "
        "over prompts, and the deviation of the rewards unbiased, is assumed. A later version's means over tokens, "
        "bounds and other losses are left out. Over a vocabulary it is soft_cross_entropy of (logits − reference)/τ.",
    ),
)  # fmt: skip


def pld_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    weight_temperature: float = 4.0,
    k: int | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Σ_k α_k·[−s_k + log Σ_{l ≥ k} e^{s_l}]: Plackett–Luce in the teacher's order, the label first; paper 26 (PLD).

    α = softmax(teacher logits/τ): how sure the teacher is of a place. In place of cross-entropy and distillation.

    Args:
        logits: [*, V], s, with gradient. teacher_logits: [*, V]. labels: [*]. weight_temperature: τ, of the weights
            alone.
        k: None: all places, sorted in PyTorch, for classifiers; of equal classes the lower first. A number: the first k
            places, exact, with all others behind them, for any vocabulary.
        mask, …, backend: see `kk.token_stats`.

    Returns: a scalar, the mean over rows.

    >>> import torch, kldiv_kernels as kk
    >>> s, t = torch.tensor([[2.0, 0.5, -1.0, 0.0]]), torch.tensor([[1.0, 1.5, -0.5, 0.0]])
    >>> round(kk.recipes.pld_loss(s, t, torch.tensor([1]), weight_temperature=1.0).item(), 4)
    1.0256
    """
    like_checked("logits", logits, teacher_logits=teacher_logits)
    of_tokens_checked(logits[..., 0], labels=labels)
    ids, valid = valid_labels(labels, mask, ignore_index, logits.shape[-1] if vocab_size is None else vocab_size)
    ids, teacher = ids.clamp_min(0), teacher_logits.detach()
    if k is None:
        own, other = (torch.where(valid[..., None], widened(x[..., :vocab_size]), 0.0) for x in (logits, teacher))
        # Adds a number to a row, which changes nothing but the rounding: the gradient of a sure row keeps its digits.
        own = own.log_softmax(-1)
        order = other.scatter(-1, ids[..., None], math.inf).argsort(dim=-1, descending=True, stable=True)
        weights = (other / weight_temperature).softmax(-1).gather(-1, order)
        return batch_mean(plackett_luce(own.gather(-1, order), weights), valid)
    with torch.no_grad():
        found = topk(teacher, k, mask=valid, vocab_size=vocab_size, backend=backend).ids
        # The label goes to the front, and the last of the others out where it was none of them.
        first = (found == ids[..., None]).to(torch.int64)
        others = found.gather(-1, first.argsort(dim=-1, stable=True))[..., : k - 1]
        order = torch.cat([ids[..., None], others], dim=-1)
        weights = token_stats(
            teacher, labels=order, stats=("logprob",), temperature=weight_temperature, mask=valid,
            vocab_size=vocab_size, backend=backend,
        ).logprob.exp()  # fmt: skip
    stats = topk_token_stats(logits, order, mask=valid, vocab_size=vocab_size, check=False, backend=backend)
    rows = plackett_luce(stats.topk_logprobs, weights, tail_logprob=stats.tail_logprob)
    return batch_mean(rows, valid)


def centered_reward_loss(
    scores: Tensor,
    advantages: Tensor,
    groups: Tensor,
    *,
    beta: float = 1.0,
    clip: float = 5.0,
    form: Literal["mse", "bce"] = "mse",
) -> Tensor:
    r"""(c/β)·mean[(β·(r − r̄) − (a − ā))²], a = ½ + clamp(A, ±c)/(2c), r̄ and ā the prompt's means; paper 48 (CRD).

    "bce": the binary cross-entropy of σ(β(r − r̄)) with σ(a − ā) in place of the square. r̄ has no gradient. Adding a
    number to all r of a prompt changes nothing; a sample alone has no loss of "mse".

    Args:
        scores: [B], r, with gradient: −(‖v_θ − v‖² − ‖v_old − v‖²) of a diffusion model, or the log-ratio to the policy
            that sampled of a language model (derived). advantages: [B], normalised. groups: [B] integers, the prompt.
        beta, clip: β and c.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.centered_reward_loss(
    ...     torch.tensor([0.3, 0.1]), torch.tensor([1.0, -1.0]), torch.tensor([0, 0])).abs() < 1e-6
    tensor(True)
    """
    if form not in ("mse", "bce"):
        raise ValueError(f"centered_reward_loss: form is {form!r}; expected mse or bce")
    like_checked("scores", scores, advantages=advantages, groups=groups)
    scores, target = widened(scores), _unit(advantages, clip).to(widened(scores).dtype)
    apart = beta * (scores - group_mean(scores.detach(), groups))
    wanted = target - group_mean(target, groups)
    if form == "mse":
        return clip / beta * batch_mean((apart - wanted).square())
    return clip / beta * batch_mean(binary_cross_entropy_with_logits(apart, wanted.sigmoid(), reduction="none"))


def velocity_anchor(
    velocities: Tensor,
    reference_velocities: Tensor,
    advantages: Tensor | None = None,
    *,
    kl_coef: float = 0.1,
    clip: float = 5.0,
) -> Tensor:
    r"""κ·mean_i[w_i·mean(v_θ − v_ref)²], w = m + (1 − m)·a, m = 10⁻⁴/κ: CRD's KL to the reference; paper 48.

    Args: velocities: [B, *], with gradient. reference_velocities: like them; with guidance in the code. advantages:
        [B], whose a (see `centered_reward_loss`) holds good samples closer; None: w = 1. kl_coef: κ. clip: of the
        advantages.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.velocity_anchor(torch.ones(2, 3), torch.zeros(2, 3))
    tensor(0.1000)
    """
    like_checked("velocities", velocities, reference_velocities=reference_velocities)
    squares = (widened(velocities) - reference_velocities.detach()).square().flatten(1).mean(-1)
    if advantages is None:
        return kl_coef * batch_mean(squares)
    if advantages.shape != squares.shape:
        raise ValueError(f"velocity_anchor: advantages has shape {list(advantages.shape)}; expected [{len(squares)}]")
    if not kl_coef > 0:
        raise ValueError(f"velocity_anchor: kl_coef is {kl_coef}; advantages weigh it, expected a number above 0")
    least = 1e-4 / kl_coef
    return kl_coef * batch_mean((least + (1 - least) * _unit(advantages, clip)) * squares)


def adpo_loss(
    sequence_logprobs: Tensor, anchor_logprobs: Tensor, targets: Tensor, groups: Tensor, *, tau: float | Tensor = 0.8
) -> Tensor:
    r"""−mean over prompts of Σ_i q_i·log softmax_i((ℓ_i − ℓ_anchor,i)/τ) over a prompt's candidates; paper 82 (ADPO).

    Of two candidates with τ = 1/β and q one of them it is DPO.

    Args:
        sequence_logprobs: [B], Σ_t ℓ of each candidate, with gradient. anchor_logprobs: [B], of a fixed policy, of a
            running mean or of the policy that sampled. targets: [B], q, with the sum 1 in each prompt:
            `reward_targets`. groups: [B] integers, the prompt. tau: τ, or [B] of `adaptive_tau`.

    >>> import torch, kldiv_kernels as kk
    >>> same = torch.tensor([-3.0, -7.0])
    >>> round(kk.recipes.adpo_loss(same, same, torch.tensor([0.9, 0.1]), torch.tensor([0, 0])).item(), 4)
    0.6931
    """
    like_checked(
        "sequence_logprobs", sequence_logprobs, anchor_logprobs=anchor_logprobs, targets=targets, groups=groups,
        tau=tau if isinstance(tau, Tensor) else None,
    )  # fmt: skip
    temperature = tau.detach() if isinstance(tau, Tensor) else tau
    scores = (widened(sequence_logprobs) - anchor_logprobs.detach()) / temperature
    logprobs = scores - group_logsumexp(scores, groups)
    wanted = targets.detach()
    # A target of 0 of a candidate without probability is 0.
    losses = torch.where(wanted == 0, 0.0, -wanted * logprobs)
    prompts = numbered(groups).amax() + 1 if groups.numel() else 1
    return losses.sum() / prompts


@torch.no_grad()
def reward_targets(rewards: Tensor, groups: Tensor, *, temperature: float = 0.5) -> Tensor:
    r"""softmax over a prompt's candidates of (reward − mean)/deviation/β: targets of `adpo_loss`, [B]; paper 82 (ADPO).

    The deviation is unbiased; candidates with equal rewards have equal targets.

    Args: rewards: [B]. groups: [B] integers, the prompt. temperature: β.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.reward_targets(torch.tensor([1.0, 0.0, 5.0]), torch.tensor([0, 0, 1]))
    tensor([0.9442, 0.0558, 1.0000])
    """
    if not temperature > 0:
        raise ValueError(f"reward_targets: temperature is {temperature}; expected a number above 0")
    like_checked("rewards", rewards, groups=groups)
    index, rewards = numbered(groups), widened(rewards)
    centred, count = centre(rewards, index)
    deviation = unbiased_variance(centred, count, index).sqrt()
    scaled = centred / torch.where(deviation > 0, deviation, 1.0)
    return group_softmax(scaled / temperature, groups).to(rewards.dtype)


@torch.no_grad()
def adaptive_tau(
    mean_logprobs: Tensor,
    rewards: Tensor,
    groups: Tensor,
    *,
    vocab_size: int,
    tau: float = 0.8,
    bounds: tuple[float, float] = (0.05, 5.0),
) -> Tensor:
    r"""τ·(1 + ½H + ½(1 − H)(1 − R)) inside the bounds, [B]: warmer where the policy is unsure, or wrong; paper 82.

    H: −(mean ℓ of the candidate)/log V. R: its reward from 0, the prompt's lowest, to 1, its highest; 0 where all are
    equal (derived).

    Args: mean_logprobs, rewards: [B]. groups: [B] integers, the prompt. vocab_size: V.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.adaptive_tau(torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), vocab_size=100)
    tensor([0.8000, 1.2000])
    """
    like_checked("mean_logprobs", mean_logprobs, rewards=rewards, groups=groups)
    mean_logprobs, rewards = widened(mean_logprobs), widened(rewards)
    unsure = -mean_logprobs / math.log(vocab_size)
    index = numbered(groups)
    low, high = (extreme(rewards, index, which) for which in ("amin", "amax"))
    place = torch.where(high > low, (rewards - low) / (high - low), 0.0)
    return (tau * (1 + 0.5 * unsure + 0.5 * (1 - unsure) * (1 - place))).clamp(*bounds)


def _unit(advantages: Tensor, clip: float) -> Tensor:
    """Advantages from −clip to clip as 0 to 1, without gradient."""
    return 0.5 + widened(advantages.detach()).clamp(-clip, clip) / (2 * clip)
