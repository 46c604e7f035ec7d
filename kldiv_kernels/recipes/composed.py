"""Policy losses that a recipe puts together itself, where `policy_loss` has no option for them.

Log-probabilities of the sampled tokens by one `token_stats`, arithmetic on [B, T], and a `kk.PolicyLoss` at the end.
What stands where `valid` is False is 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kldiv_kernels.policy import PolicyLoss, PolicyTerm, resolve, surrogate
from kldiv_kernels.recipes.checks import of_sequences_checked, of_tokens_checked
from kldiv_kernels.recipes.reductions import masked, policy_result, valid_tokens
from kldiv_kernels.stats import TokenStats, token_stats

# The bound of |log-ratio| that policy_loss has by default.
LOG_RATIO_CLAMP = 20.0


def options_checked(where: str, logits: Tensor, **options: Any) -> None:
    """What `policy_loss` would say of these options of its clipped surrogate."""
    chosen = resolve(where, None, {"loss_type": "grpo", **options})
    if logits.dim() == 2 and chosen.aggregation.startswith("seq"):
        raise ValueError(
            f"{where}: aggregation is {chosen.aggregation!r}, which needs sequences: logits [batch, tokens, vocab]; "
            "for [tokens, vocab] use aggregation='token-mean'"
        )


def sampled_tokens(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None, ignore_index: int, **options: Any
) -> tuple[TokenStats, Tensor]:
    """(logprob and entropy of the sampled tokens, bool [B, T] of the tokens that count); options of `token_stats`."""
    valid = valid_tokens(token_ids, mask, ignore_index)
    return token_stats(logits, labels=torch.where(valid, token_ids, 0), mask=valid, **options), valid


def given(x: Tensor, logprob: Tensor, valid: Tensor) -> Tensor:
    """x [B, T] as it enters a loss: without gradient, in the dtype of `logprob`, 0 where masked."""
    return masked(x.detach().to(logprob.dtype), valid)


def apart(logprob: Tensor, other: Tensor, valid: Tensor) -> Tensor:
    """log π − the other's log-probability, [B, T]; 0 where masked."""
    return masked(logprob, valid) - given(other, logprob, valid)


def of_tokens(advantages: Tensor, like: Tensor) -> Tensor:
    """Advantages [B] or [B, T] as [B, T], without gradient. ValueError for another shape.

    >>> of_tokens(torch.tensor([1.0]), torch.zeros(1, 2))
    tensor([[1., 1.]])
    """
    if advantages.dim() == like.dim():
        of_tokens_checked(like, advantages=advantages)
    else:
        of_sequences_checked(like, advantages=advantages)
    advantages = advantages.detach().to(like.dtype)
    return advantages if advantages.dim() == like.dim() else advantages[:, None].expand_as(like)


def clipped_term(log_ratio: Tensor, advantages: Tensor, valid: Tensor, **bounds: float) -> PolicyTerm:
    """`surrogate` of a log-ratio that is 0 where masked, clamped as `policy_loss` does it."""
    clamped = log_ratio.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    return surrogate(clamped, masked(of_tokens(advantages, log_ratio), valid), **bounds)


def composed_loss(
    per_token: Tensor,
    stats: TokenStats,
    valid: Tensor,
    term: PolicyTerm,
    metrics: Mapping[str, Tensor],
    aggregation: str,
    normalizer: float | Tensor | None,
) -> PolicyLoss:
    """`policy_result` with the entropy, the clip fractions of `term` and `metrics`."""
    fractions = {f"clip_fraction_{name}": where for name, where in term.clipped.items()}
    return policy_result(
        per_token, stats.logprob, valid, aggregation=aggregation, normalizer=normalizer, entropy=stats.entropy,
        metrics={**fractions, **metrics},
    )  # fmt: skip
