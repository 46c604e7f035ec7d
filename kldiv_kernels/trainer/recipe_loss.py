"""A recipe in the place of a trainer's loss: which ones there are, their options, and what they are given.

A recipe that a trainer can run takes logits and what a trainer has beside them: a teacher's logits, labels or a mask.
Its other arguments are options, `--set name=value` on the command line.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.keywords import nearest
from kldiv_kernels.losses import divergence_loss

# What the trainer knows, and nobody sets.
_GIVEN = (
    "logits", "teacher_logits", "reference_logits", "base_logits", "token_ids", "labels", "mask", "normalizer",
    "weight", "old_logprobs", "reference_logprobs", "sampling_logprobs", "anchor_logprobs", "token_weights",
    "kl_weights", "per_token_gradient", "preset", "ignore_index", "vocab_size", "backend", "reduction", "shift",
    "in_place", "exclude", "online_mask",
)  # fmt: skip
# Of the row on which options are tried: more than any option of k.
_COLUMNS = 4096


def settable(function: str) -> dict[str, inspect.Parameter]:
    """The options of a recipe that are not the trainer's: those of what its `**options` go to, too."""
    own = inspect.signature(getattr(kk.recipes, function)).parameters
    # Tensors come first, and options are keywords.
    found = {name: p for name, p in own.items() if name not in _GIVEN and p.kind is p.KEYWORD_ONLY}
    if any(p.kind is p.VAR_KEYWORD for p in own.values()):
        target = divergence_loss if "token_ids" not in own else kk.policy_loss
        more = inspect.signature(target).parameters.items()
        found |= {n: p for n, p in more if p.kind is p.KEYWORD_ONLY and n not in (*_GIVEN, *own, "kind")}
    return found


@dataclass(frozen=True)
class RecipeFunction(ABC):
    """A function of `kk.recipes` with its options. ValueError, naming the option, for what it does not take."""

    function: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.call).parameters

    @property
    def call(self) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(kk.recipes, self.function)
        return function

    def settable(self) -> dict[str, inspect.Parameter]:
        return settable(self.function)

    def check(self, where: str) -> None:
        allowed = self.settable()
        for name in self.options:
            if name not in allowed:
                hint = nearest(name, allowed) or f"; it has {', '.join(allowed)}"
                raise ValueError(f"{where}: {name} is no option of {self.function}{hint}")
        missing = [n for n, p in allowed.items() if p.default is p.empty and n not in self.options]
        if missing:
            raise ValueError(f"{where}: {self.function} has no default of {', '.join(missing)}; set it")
        # The recipe knows what it allows: ask it, before anything is loaded.
        try:
            self._try()
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error

    @abstractmethod
    def _try(self) -> None:
        """Calls it on one token."""


@dataclass(frozen=True)
class RecipeLoss(RecipeFunction):
    """A recipe of logits and of another model's, or of labels alone."""

    def takes(self, name: str) -> bool:
        passes_on = any(p.kind is p.VAR_KEYWORD for p in self.parameters.values())
        of_others = ("normalizer",) if "token_ids" in self.parameters else ("labels", "normalizer")
        return name in self.parameters or (passes_on and name in of_others)

    @property
    def reference(self) -> str | None:
        """What it calls the other model's logits."""
        return next((name for name in ("teacher_logits", "reference_logits") if name in self.parameters), None)

    def _try(self) -> None:
        row, target = torch.zeros(1, 1, _COLUMNS), torch.zeros(1, 1, dtype=torch.int64)
        known: dict[str, Any] = {"normalizer": torch.ones(()), "vocab_size": _COLUMNS, "backend": "reference"}
        self(row, row, target, base_logits=row, **known)

    def __call__(
        self,
        logits: Tensor,
        other: Tensor | None,
        labels: Tensor,
        *,
        vocab_size: int,
        backend: str,
        base_logits: Tensor | None = None,
        normalizer: Tensor | None = None,
        ignore_index: int = -100,
    ) -> Tensor:
        """The loss of logits [B, T, V]; labels [B, T] are what the positions predict, `ignore_index` where nothing."""
        given: dict[str, Any] = {"vocab_size": vocab_size, "backend": backend, "base_logits": base_logits}
        given |= {"labels": labels, "token_ids": labels, "normalizer": normalizer, "mask": labels != ignore_index}
        if self.reference is not None:
            given[self.reference] = other
        taken = {name: x for name, x in given.items() if self.takes(name) or name in ("vocab_size", "backend")}
        if "labels" in taken or "token_ids" in taken:
            # They say it: a mask beside them would be the same.
            taken.pop("mask", None)
        out = self.call(logits, **taken, **self.options)
        loss: Tensor = out.loss if isinstance(out, kk.PolicyLoss) else out
        return loss
