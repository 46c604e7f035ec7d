"""A thin distillation trainer on top of `transformers.Trainer`. Needs the extra `kldiv_kernels[train]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kldiv_kernels.extras import needed_by

if TYPE_CHECKING:
    from kldiv_kernels.trainer.cached import CachedSequences
    from kldiv_kernels.trainer.distillation import DistillationArguments, DistillationTrainer

__all__ = ["CachedSequences", "DistillationArguments", "DistillationTrainer"]


def __getattr__(name: str) -> Any:
    # Imported on first use: the command line reads this package for its help, and transformers takes seconds.
    if name in __all__:
        with needed_by(__name__):
            if name == "CachedSequences":
                from kldiv_kernels.trainer import cached

                return cached.CachedSequences
            from kldiv_kernels.trainer import distillation

            return getattr(distillation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
