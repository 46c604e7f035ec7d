"""This library inside TRL 1.14 to 1.16: trainers, and functions of TRL replaced in place.

    from kldiv_kernels.adapters.trl import GRPOTrainer

GRPOTrainer: TRL's with `policy_loss`. TRL is imported when a name here is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kldiv_kernels.adapters.trl.version import require

if TYPE_CHECKING:
    from kldiv_kernels.adapters.trl.grpo import GRPOTrainer

__all__ = ["GRPOTrainer"]

# TRL 1.14 scores tokens in another way, which the trainers do not know.
_TRAINERS = {"GRPOTrainer": "grpo"}


def __getattr__(name: str) -> Any:
    if name not in _TRAINERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require(f"kldiv_kernels.adapters.trl.{name}", first=(1, 15))
    return getattr(import_module(f"{__name__}.{_TRAINERS[name]}"), name)
