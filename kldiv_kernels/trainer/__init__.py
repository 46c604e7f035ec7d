"""Thin trainers of distillation and preferences on `transformers.Trainer`. Needs the extra `kldiv_kernels[train]`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kldiv_kernels.extras import needed_by

if TYPE_CHECKING:
    from kldiv_kernels.trainer.arguments import DistillationArguments
    from kldiv_kernels.trainer.cached import CachedSequences
    from kldiv_kernels.trainer.distillation import DistillationTrainer
    from kldiv_kernels.trainer.opd import OnPolicyArguments, OnPolicyTrainer
    from kldiv_kernels.trainer.preference import PreferenceArguments, PreferenceTrainer

__all__ = [
    "CachedSequences",
    "DistillationArguments",
    "DistillationTrainer",
    "OnPolicyArguments",
    "OnPolicyTrainer",
    "PreferenceArguments",
    "PreferenceTrainer",
]
_HOMES = {
    "CachedSequences": "cached",
    "DistillationArguments": "arguments",
    "OnPolicyArguments": "opd",
    "OnPolicyTrainer": "opd",
    "PreferenceArguments": "preference",
    "PreferenceTrainer": "preference",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: the command line reads this package for its help, and transformers takes seconds.
    if name in __all__:
        with needed_by(__name__):
            return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'distillation')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
