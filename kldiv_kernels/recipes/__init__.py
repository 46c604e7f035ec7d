"""Methods of papers by name, each a few lines of PyTorch over `token_stats`, `policy_loss` and the top-k losses.

`kk.recipes.find("tsd_kd")` and `kk.recipes.listing()` say which there are and what paper and code disagree on; a module
is a family. `reductions`, `selection`, `lists`, `f_divergences` and `mixtures` are what they are built of.
"""

from __future__ import annotations

from kldiv_kernels.recipes.on_policy_distillation import (
    gopd_advantages,
    gopd_loss,
    scope_advantages,
    scope_loss,
    tcod_loss,
    tsd_kd_loss,
    vopd_advantages,
    vopd_loss,
)
from kldiv_kernels.recipes.recipe import Recipe
from kldiv_kernels.recipes.registry import FAMILIES, RECIPES, find, listing

__all__ = [
    "FAMILIES",
    "RECIPES",
    "Recipe",
    "find",
    "gopd_advantages",
    "gopd_loss",
    "listing",
    "scope_advantages",
    "scope_loss",
    "tcod_loss",
    "tsd_kd_loss",
    "vopd_advantages",
    "vopd_loss",
]
