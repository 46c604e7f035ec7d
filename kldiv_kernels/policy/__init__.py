"""Losses of the GRPO family from raw logits, their options, and advantages.

`loss` has the public function, `options` what it can be told, `terms` the surrogates, `weights` what a token counts.
`sequences` says which tokens are a sequence and sums over it, over packed ones by `segments`. `per_token` puts these
together for log-probabilities that are given, `assembly` the whole loss; `slopes` has gradients that are known
beforehand, `one_read` the form whose gradient comes out of the same read,
`spread` what becomes of it where a mesh spreads the rows.
"""

from __future__ import annotations

from kldiv_kernels.policy import advantages
from kldiv_kernels.policy.assembly import PolicyLoss
from kldiv_kernels.policy.inputs import Groups, Tensors, groups_checked
from kldiv_kernels.policy.loss import policy_loss, policy_loss_of
from kldiv_kernels.policy.options import (
    CHOICES,
    CLIPPED,
    DPPO,
    EXACT_KL,
    LOSS_TYPES,
    OPTION_NAMES,
    PolicyOptions,
    looks_at_the_batch,
    off_policy_given,
    resolve,
)
from kldiv_kernels.policy.per_token import TokenLosses, token_losses
from kldiv_kernels.policy.slopes import with_slope
from kldiv_kernels.policy.spread import of_spread_rows
from kldiv_kernels.policy.terms import PolicyTerm, level_log_ratio, ratio_bounds, surrogate
from kldiv_kernels.policy.weights import aggregate, highest_entropy, importance, kl_estimate

__all__ = [
    "CHOICES",
    "CLIPPED",
    "DPPO",
    "EXACT_KL",
    "LOSS_TYPES",
    "OPTION_NAMES",
    "Groups",
    "PolicyLoss",
    "PolicyOptions",
    "PolicyTerm",
    "Tensors",
    "TokenLosses",
    "advantages",
    "aggregate",
    "groups_checked",
    "highest_entropy",
    "importance",
    "kl_estimate",
    "level_log_ratio",
    "looks_at_the_batch",
    "of_spread_rows",
    "off_policy_given",
    "policy_loss",
    "policy_loss_of",
    "ratio_bounds",
    "resolve",
    "surrogate",
    "token_losses",
    "with_slope",
]
