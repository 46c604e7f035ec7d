"""From log-probabilities to the loss of each token: the policy term, its weight, and the KL to a reference policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kldiv_kernels.parallel import Group
from kldiv_kernels.policy.options import PolicyOptions
from kldiv_kernels.policy.sequences import SequenceSums, rows
from kldiv_kernels.policy.slopes import with_slope
from kldiv_kernels.policy.terms import Tokens, level_log_ratio, policy_term, summands
from kldiv_kernels.policy.weights import sampled_kl, weighted


@dataclass(frozen=True)
class TokenLosses:
    """[B, T] each. What stands where the mask is False is of no meaning, and finite.

    per_token: the policy term times its weight, without the KL. clipped: by name, where a gradient was clipped away.
    log_ratio, level_log_ratio: of the policy to its anchor, of the token and at the importance level. kl: the estimator
    `options.kl_estimator`, None without a reference. All but `clipped` carry the gradient.
    """

    per_token: Tensor
    clipped: dict[str, Tensor]
    log_ratio: Tensor
    level_log_ratio: Tensor
    kl: Tensor | None


def token_log_ratio(logprob: Tensor, anchor: Tensor, own_anchor: bool) -> Tensor:
    """log π − log μ [B, T]; `own_anchor`: see `token_losses`."""
    if not own_anchor:
        return logprob - anchor
    nothing = torch.zeros_like(anchor).masked_fill(anchor.isnan(), torch.nan)
    return with_slope(nothing, logprob, torch.ones_like(anchor))


def token_losses(
    logprob: Tensor,
    anchor: Tensor,
    advantages: Tensor,
    mask: Tensor,
    options: PolicyOptions,
    *,
    reference: Tensor | None = None,
    weight: Tensor | None = None,
    log_weight: Tensor | None = None,
    penalty: Tensor | None = None,
    level: Callable[[Tensor], Tensor] | None = None,
    own_anchor: bool = False,
    log_ratio: Tensor | None = None,
    sums: SequenceSums | None = None,
    batch_group: Group | None = None,
) -> TokenLosses:
    """The losses of tokens [B, T] whose log-probabilities are given, each finite where the mask is False.

    Args:
        logprob: of the policy, with gradient. anchor: of the policy that the ratio is taken to. reference: of the
            policy that the KL is taken to.
        weight: multiplies the policy term. VESPO has the off-policy weight inside its own: there it takes
            `log_weight`, whose sum over a sequence counts; default weight.log().
        penalty: added to the policy term before its weight.
        level: what becomes of the log-ratio at the importance level.
        own_anchor: the anchor is this policy itself, and the ratio 1, of a token without probability too.
        log_ratio, sums: `token_log_ratio`, and the sums of `terms.summands`, where they are known. Default: found
            here, for sequences that are rows.
        batch_group: the ranks over which `cov_selection` selects.
    """
    if log_ratio is None:
        log_ratio = token_log_ratio(logprob, anchor, own_anchor)
    if sums is None:
        if log_weight is None and weight is not None and options.loss_type == "vespo":
            log_weight = weight.log()
        sums = rows(mask).sums(summands(log_ratio, advantages, mask, options, log_weight))
    of_level = level_log_ratio(log_ratio, mask, options, sums)
    if level is not None:
        of_level = level(of_level)
    tokens = Tokens(logprob, anchor, advantages, mask, log_ratio, of_level, sums, batch_group)
    term = policy_term(tokens, options)
    per_token = term.per_token if penalty is None else term.per_token + penalty
    kl = None if reference is None else sampled_kl(tokens, reference, options)
    return TokenLosses(weighted(per_token, weight, options), term.clipped, log_ratio, of_level, kl)
