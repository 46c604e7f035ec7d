"""Policies that play against each other: which answer is preferred to an opponent's, and no reward.

P(y ≻ y') is the probability that y is preferred. Log-probabilities of an answer are sums over its tokens, of
`kk.selective_log_softmax`. What has a gradient is said, and nothing else gets one. Scalars, means over answers or
pairs, in nats.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from kldiv_kernels.recipes.checks import like_checked, of_sequences_checked, of_tokens_checked
from kldiv_kernels.recipes.recipe import Recipe
from kldiv_kernels.recipes.reductions import batch_mean, sequence_sum, widened

Opponents = TypeVar("Opponents")

PAPERS = (
    Recipe(
        30, "Nash-MP", "Accelerating Nash Learning from Human Feedback via Mirror Prox", 2025, ("mirror_prox_loss",),
        "none", "derived", link="arXiv 2505.19731",
        differs="The steps were seen in a review, the loss follows from them. Neither β, η nor the target's rate of a "
        "running mean was found. Its relative in TRL, Nash-MD, weighs each token by its own log-ratio alone; its "
        "opponent is kk.recipes.mixtures.mix_logits((1 − c, logits), (c, reference)).",
    ),
    Recipe(
        56, "EGPO",
        "Extragradient Preference Optimization (EGPO): Beyond Last-Iterate Convergence for Nash Learning from Human "
        "Feedback",
        2025, ("online_ipo_loss",), "none", "code", link="github.com/zhourunlong/EGPO",
        differs="The code divides the log-probabilities of an answer by its length, and takes those of prefixes, too: "
        "give those. kk.recipes.extragradient_step is its step, with the optimizer's state as the code has it.",
    ),
    Recipe(
        68, "INPO",
        "Iterative Nash Policy Optimization: Aligning LLMs with General Preferences via No-Regret Learning", 2024,
        ("inpo_loss",), "none", "restated",
        differs="From somebody else's implementation; the authors' was not found. Another method of that name, a "
        "square for each answer by itself, is not this one.",
    ),
)  # fmt: skip


def mirror_prox_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    target_logprobs: Tensor,
    opponent_preference: Tensor,
    *,
    beta: float,
    eta: float,
    mask: Tensor | None = None,
) -> Tensor:
    r"""sg[P(y' ≻ y) − ½ + β·log π/π_ref + (β/η)·log π/π_target]·log π(y): a proximal step; paper 30 (Nash-MP), derived.

    Its gradient is, in the mean over y of the policy, that of P(opponent ≻ π) + β·KL(π‖π_ref) + (β/η)·KL(π‖π_target).

    Args:
        logprobs: [B, T], of the policy for its own answers y, with gradient. reference_logprobs, target_logprobs:
            [B, T], the target a slowly moving copy of the policy. opponent_preference: [B], P(y' ≻ y), y' of the
            target, or of a mixture of it with the reference.
        beta: β, of the reference. eta: η, the step; `math.inf` leaves the target out. mask: [B, T] bool.

    >>> import math, torch, kldiv_kernels as kk
    >>> ell = torch.tensor([[-1.0, -1.0]])
    >>> kk.recipes.mirror_prox_loss(ell, ell - 0.5, ell, torch.tensor([0.75]), beta=0.1, eta=math.inf)
    tensor(-0.7000)
    """
    for name, value in (("beta", beta), ("eta", eta)):
        if not value > 0:
            raise ValueError(f"mirror_prox_loss: {name} is {value}; expected a number above 0")
    of_tokens_checked(
        logprobs, reference_logprobs=reference_logprobs, target_logprobs=target_logprobs, mask=mask
    )  # fmt: skip
    of_sequences_checked(logprobs, opponent_preference=opponent_preference)
    own = sequence_sum(logprobs, mask)
    to_reference = sequence_sum((widened(logprobs) - reference_logprobs).detach(), mask)
    coefficient = opponent_preference.detach().to(own.dtype) - 0.5 + beta * to_reference
    if eta != math.inf:
        coefficient = coefficient + beta / eta * sequence_sum((widened(logprobs) - target_logprobs).detach(), mask)
    return batch_mean(coefficient * own, None if mask is None else (mask != 0).any(-1))


def online_ipo_loss(
    first_log_ratios: Tensor,
    second_log_ratios: Tensor,
    first_preferences: Tensor,
    second_preferences: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    r"""mean[(h(y) − h(y') − (P(y ≻ y'') − P(y' ≻ y''))/β)²], h = log π/π_ref: online IPO, and EGPO's loss; paper 56.

    It is 0 where π ∝ π_ref·exp(P(· ≻ y'')/β).

    Args: first_log_ratios, second_log_ratios: [B], h of y and of y', with gradient; the code's answers are the
        reference's. first_preferences, second_preferences: [B], P of each against the opponent's y'', a mean where it
        wrote several. beta: β.

    >>> import torch, kldiv_kernels as kk
    >>> round(kk.recipes.online_ipo_loss(*(torch.tensor([x]) for x in (2.0, 0.0, 0.6, 0.5))).item(), 4)
    1.0
    """
    if not beta > 0:
        raise ValueError(f"online_ipo_loss: beta is {beta}; expected a number above 0")
    like_checked(
        "first_log_ratios", first_log_ratios, second_log_ratios=second_log_ratios, first_preferences=first_preferences,
        second_preferences=second_preferences,
    )  # fmt: skip
    apart = widened(first_log_ratios) - widened(second_log_ratios)
    wanted = (first_preferences - second_preferences).detach().to(apart.dtype) / beta
    return batch_mean((apart - wanted).square())


def extragradient_step(
    optimizer: Optimizer, opponents: Callable[[], Opponents], loss: Callable[[Opponents], Tensor]
) -> Tensor:
    r"""A step of EGPO: one to look ahead, against opponents of there the step itself, from where it began; paper 56.

    θ½ = θ − η∇L(θ; opponents of θ), θ ← θ − η∇L(θ; opponents of θ½). Weights and the optimizer's state are copied, and
    the copies are back before the second gradient.

    Args: optimizer: of the policy. opponents: what the policy, as it is, writes, such as samples and their preferences.
        loss: of such opponents, with its gradient by the policy's weights, such as `online_ipo_loss`.

    Returns: the second loss, without gradient.

    >>> import torch, kldiv_kernels as kk
    >>> x = torch.nn.Parameter(torch.tensor(1.0))
    >>> step = kk.recipes.extragradient_step(torch.optim.SGD([x], lr=0.5), lambda: x.detach().clone(), lambda y: x * y)
    >>> step, x.detach()
    (tensor(0.5000), tensor(0.7500))
    """
    weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = [parameter.detach().clone() for parameter in weights]
    state = copy.deepcopy(optimizer.state_dict())
    found = opponents()
    for ahead in (True, False):
        optimizer.zero_grad()
        value = loss(found)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if ahead:
            found = opponents()
            with torch.no_grad():
                for parameter, old in zip(weights, before, strict=True):
                    parameter.copy_(old)
            optimizer.load_state_dict(state)
    return value.detach()


def inpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    reference_chosen_logprobs: Tensor,
    reference_rejected_logprobs: Tensor,
    old_chosen_logprobs: Tensor,
    old_rejected_logprobs: Tensor,
    *,
    eta: float = 7.5e-3,
    tau: float = 2.5e-3,
) -> Tensor:
    r"""mean[(h − 1/(2η))²], h = log π_w/π_l − (τ/η)·log ref_w/ref_l − (1 − τ/η)·log old_w/old_l; paper 68 (INPO).

    Pairs are written by the policy of the iteration's start, "old", and ordered by the preference. τ = η is IPO.

    Args: chosen_logprobs, rejected_logprobs: [B], with gradient; the others [B]. eta: η, one over the step of mirror
        descent. tau: τ, above 0 and at most η, the strength of the KL.

    >>> import torch, kldiv_kernels as kk
    >>> zero = torch.zeros(1)
    >>> kk.recipes.inpo_loss(zero, zero, zero, zero, zero, zero, eta=0.25, tau=0.1)
    tensor(4.)
    """
    if not 0 < tau <= eta:
        raise ValueError(f"inpo_loss: tau is {tau}, eta {eta}; expected 0 < tau ≤ eta")
    like_checked(
        "chosen_logprobs", chosen_logprobs, rejected_logprobs=rejected_logprobs,
        reference_chosen_logprobs=reference_chosen_logprobs, reference_rejected_logprobs=reference_rejected_logprobs,
        old_chosen_logprobs=old_chosen_logprobs, old_rejected_logprobs=old_rejected_logprobs,
    )  # fmt: skip
    own = widened(chosen_logprobs) - widened(rejected_logprobs)
    reference, old = (
        (widened(chosen) - widened(rejected)).detach()
        for chosen, rejected in (
            (reference_chosen_logprobs, reference_rejected_logprobs), (old_chosen_logprobs, old_rejected_logprobs),
        )
    )  # fmt: skip
    share = tau / eta
    return batch_mean((own - share * reference - (1 - share) * old - 1 / (2 * eta)).square())
