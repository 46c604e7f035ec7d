"""Methods of papers by name, each a few lines of PyTorch over `token_stats`, `policy_loss` and the top-k losses.

`kk.recipes.find("tsd_kd")` and `kk.recipes.listing()` say which there are and what paper and code disagree on; a module
is a family. `schedules` has numbers that change with the step. `reductions`, `selection`, `lists`, `f_divergences`,
`mixtures` and `composed` are what the methods are built of.
"""

from __future__ import annotations

from kldiv_kernels.recipes import lists, reductions, schedules, selection
from kldiv_kernels.recipes.clipped_kl import (
    clipped_divergence_rows,
)
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
from kldiv_kernels.recipes.recipe import (
    Recipe,
)
from kldiv_kernels.recipes.registry import (
    FAMILIES,
    RECIPES,
    find,
    listing,
)
from kldiv_kernels.recipes.reward_shaping import (
    bundle_advantages,
    calibrated_rewards,
    difficulty_mask,
    ensemble_rewards,
    kl_shaped_rewards,
    mvar_advantages,
    win_transform,
)
from kldiv_kernels.recipes.teacher_and_reward import (
    calibrl_loss,
    kdrl_loss,
    kdrl_mask,
    leaky_hinge,
    skill_sd_loss,
    trace_loss,
    trrd_loss,
)
from kldiv_kernels.recipes.token_credit import (
    conflict_weights,
    dgpo_weights,
    gtpo_loss,
    process_advantages,
    steer_weights,
)

__all__ = [
    "FAMILIES",
    "RECIPES",
    "Recipe",
    "bundle_advantages",
    "calibrated_rewards",
    "calibrl_loss",
    "clipped_divergence_rows",
    "conflict_weights",
    "dgpo_weights",
    "difficulty_mask",
    "ensemble_rewards",
    "find",
    "gopd_advantages",
    "gopd_loss",
    "gtpo_loss",
    "kdrl_loss",
    "kdrl_mask",
    "kl_shaped_rewards",
    "leaky_hinge",
    "listing",
    "lists",
    "mvar_advantages",
    "process_advantages",
    "reductions",
    "schedules",
    "scope_advantages",
    "scope_loss",
    "selection",
    "skill_sd_loss",
    "steer_weights",
    "tcod_loss",
    "trace_loss",
    "trrd_loss",
    "tsd_kd_loss",
    "vopd_advantages",
    "vopd_loss",
    "win_transform",
]
