"""Exact divergences, entropy and log-probabilities over the full vocabulary, from raw logits, in one pass.

The functions load when the first of them is asked for: `import kldiv_kernels` alone does not import PyTorch, so that
the command line answers at once. (A program that was exported with this package's operators needs
`import kldiv_kernels.ops` before it is loaded.)
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kldiv_kernels.version import __version__

if TYPE_CHECKING:
    from kldiv_kernels import nn, recipes
    from kldiv_kernels.backends import backends
    from kldiv_kernels.kernel_plans import Plan
    from kldiv_kernels.linear import (
        Head,
        TeacherProjection,
        linear_divergence_loss,
        linear_policy_loss,
        linear_token_stats,
        linear_topk_divergence_loss,
        teacher_projection,
    )
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
    from kldiv_kernels.planning import plan
    from kldiv_kernels.policy import PolicyLoss, advantages, policy_loss
    from kldiv_kernels.registry import register_statistic, unregister_statistic
    from kldiv_kernels.stats import TokenStats, entropy, selective_log_softmax, token_stats
    from kldiv_kernels.top_k import (
        TopK,
        topk,
        topk_divergence_from_logits,
        topk_divergence_loss,
        topk_token_stats,
    )

__all__ = [
    "Head",
    "Plan",
    "PolicyLoss",
    "TeacherProjection",
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
    "linear_divergence_loss",
    "linear_policy_loss",
    "linear_token_stats",
    "linear_topk_divergence_loss",
    "nn",
    "plan",
    "policy_loss",
    "recipes",
    "register_statistic",
    "renyi",
    "reverse_chi2",
    "reverse_kl",
    "selective_log_softmax",
    "skew_kl",
    "skew_reverse_kl",
    "soft_cross_entropy",
    "teacher_projection",
    "token_stats",
    "topk",
    "topk_divergence_from_logits",
    "topk_divergence_loss",
    "topk_token_stats",
    "triangular",
    "tvd",
    "unregister_statistic",
]
_HOMES = ("losses", "stats", "top_k", "policy", "linear", "kernel_plans", "planning", "registry", "backends")


class _Package(ModuleType):
    """Its public names are what this file says, and not the submodules that importing leaves here."""

    def __getattr__(self, name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name in ("nn", "recipes"):
            return import_module(f"{__name__}.{name}")
        for home in _HOMES:
            module = import_module(f"{__name__}.{home}")
            if name in getattr(module, "__all__", vars(module)):
                value = getattr(module, name)
                super().__setattr__(name, value)
                return value
        raise AssertionError(name)

    def __setattr__(self, name: str, value: Any) -> None:
        # The folder `backends` has the name of a function.
        if not (name == "backends" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted(__all__)


sys.modules[__name__].__class__ = _Package
