"""Exact divergences, entropy and log-probabilities over the full vocabulary, from raw logits, in one pass."""

from __future__ import annotations

from kldiv_kernels import nn
from kldiv_kernels.backends import backends
from kldiv_kernels.losses import (
    alpha_beta_divergence,
    alpha_divergence,
    cauchy_schwarz,
    divergence_loss,
    forward_chi2,
    forward_kl,
    hellinger,
    jeffreys,
    js_divergence,
    renyi,
    reverse_chi2,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    soft_cross_entropy,
    triangular,
    tvd,
)
from kldiv_kernels.planning import Plan, plan
from kldiv_kernels.policy import PolicyLoss, advantages, policy_loss
from kldiv_kernels.registry import register_statistic, unregister_statistic
from kldiv_kernels.stats import TokenStats, entropy, selective_log_softmax, token_stats
from kldiv_kernels.top_k import TopK, topk, topk_divergence_from_logits, topk_divergence_loss, topk_token_stats
from kldiv_kernels.version import __version__

__all__ = [
    "Plan",
    "PolicyLoss",
    "TokenStats",
    "TopK",
    "__version__",
    "advantages",
    "alpha_beta_divergence",
    "alpha_divergence",
    "backends",
    "cauchy_schwarz",
    "divergence_loss",
    "entropy",
    "forward_chi2",
    "forward_kl",
    "hellinger",
    "jeffreys",
    "js_divergence",
    "nn",
    "plan",
    "policy_loss",
    "register_statistic",
    "renyi",
    "reverse_chi2",
    "reverse_kl",
    "selective_log_softmax",
    "skew_kl",
    "skew_reverse_kl",
    "soft_cross_entropy",
    "token_stats",
    "topk",
    "topk_divergence_from_logits",
    "topk_divergence_loss",
    "topk_token_stats",
    "triangular",
    "tvd",
    "unregister_statistic",
]
