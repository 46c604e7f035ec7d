"""This library inside TRL 1.14 to 1.16.

    from kldiv_kernels.adapters.trl import DistillationTrainer, GRPOTrainer, patched_trl

GRPOTrainer is TRL's with every loss of `policy_loss` and the methods of `recipe_of`, DistillationTrainer TRL's with
every divergence (both TRL 1.15 or 1.16). `patch_trl` replaces divergences, log-probabilities and entropy inside TRL's
other trainers. TRL is imported when a trainer or a patch is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kldiv_kernels.adapters.trl.grpo_recipes import GRPORecipe, recipe_of
from kldiv_kernels.adapters.trl.patch import patch_trl, patched_trl, unpatch_trl
from kldiv_kernels.adapters.trl.version import require

if TYPE_CHECKING:
    from kldiv_kernels.adapters.trl.distillation import DistillationTrainer
    from kldiv_kernels.adapters.trl.grpo import GRPOTrainer

__all__ = [
    "DistillationTrainer",
    "GRPORecipe",
    "GRPOTrainer",
    "patch_trl",
    "patched_trl",
    "recipe_of",
    "unpatch_trl",
]

# TRL 1.14 scores tokens in another way, which the trainers do not know.
_TRAINERS = {"DistillationTrainer": "distillation", "GRPOTrainer": "grpo"}


def __getattr__(name: str) -> Any:
    if name not in _TRAINERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require(f"kldiv_kernels.adapters.trl.{name}", first=(1, 15))
    return getattr(import_module(f"{__name__}.{_TRAINERS[name]}"), name)
