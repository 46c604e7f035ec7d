"""A recipe of preference pairs, given what a trainer makes of a batch.

A recipe says by the names of its tensors what it needs, and `MADE` how each is made: another recipe of these tensors is
a name in `recipe_options.PREFERENCE`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.choices import Backend
from kldiv_kernels.trainer.recipe_loss import RecipeFunction

_COLUMNS = 8


@dataclass(frozen=True)
class Samples:
    """Log-probabilities of what a model wrote: of the policy, with its gradient, and of the reference; [S, U].

    They are 0 where the mask is False.
    """

    logprobs: Tensor
    reference_logprobs: Tensor
    mask: Tensor


@dataclass(frozen=True)
class PairBatch:
    """Logits [2B, T, V] of B chosen answers, then of the rejected ones; labels [2B, T], what each position predicts."""

    logits: Tensor
    reference_logits: Tensor
    labels: Tensor
    vocab_size: int
    backend: Backend
    # [2B, T], 0 where both answers of a pair are alike.
    phrases: Tensor | None = None
    samples: Samples | None = None

    @cached_property
    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """log π/π_ref of chosen and of rejected answers, [B] each."""
        stats, _ = kk.recipes.lists.pair_statistics(
            self.logits, self.reference_logits, self.labels, ("logprob", "reference_logprob"),
            vocab_size=self.vocab_size, backend=self.backend,
        )  # fmt: skip
        chosen, rejected = (stats.logprob - stats.reference_logprob).sum(-1).chunk(2)
        return chosen, rejected

    def written(self) -> Samples:
        assert self.samples is not None
        return self.samples


MADE: dict[str, Callable[[PairBatch], Any]] = {
    "logits": lambda batch: batch.logits,
    "reference_logits": lambda batch: batch.reference_logits,
    "labels": lambda batch: batch.labels,
    "vocab_size": lambda batch: batch.vocab_size,
    "backend": lambda batch: batch.backend,
    "phrases": lambda batch: batch.phrases,
    "chosen_log_ratios": lambda batch: batch.log_ratios[0],
    "rejected_log_ratios": lambda batch: batch.log_ratios[1],
    "online_logprobs": lambda batch: batch.written().logprobs,
    "online_reference_logprobs": lambda batch: batch.written().reference_logprobs,
    "online_mask": lambda batch: batch.written().mask,
    "reference_sample_logprobs": lambda batch: batch.written().logprobs.sum(-1),
}


@dataclass(frozen=True)
class PairLoss(RecipeFunction):
    """A recipe of pairs: the tensors of `MADE` that it names, and its options."""

    def __call__(self, batch: PairBatch) -> Tensor:
        loss: Tensor = self.call(**{n: MADE[n](batch) for n in self.parameters if n in MADE}, **self.options)
        return loss

    @property
    def writer(self) -> Literal["policy", "reference"] | None:
        """Whose samples it takes."""
        if "online_logprobs" in self.parameters:
            return "policy"
        return "reference" if "reference_sample_logprobs" in self.parameters else None

    @property
    def has_phrases(self) -> bool:
        return "phrases" in self.parameters

    @property
    def beta(self) -> float:
        """What log-ratios are multiplied with to be rewards."""
        return float(self.options.get("beta", self.parameters["beta"].default))

    def settable(self) -> dict[str, inspect.Parameter]:
        # Samples and metrics are those of the model as it is.
        return {name: p for name, p in super().settable().items() if name != "temperature"}

    def _try(self) -> None:
        rows, one = torch.zeros(2, 1, _COLUMNS), torch.ones(2, 1, dtype=torch.int64)
        samples = Samples(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))
        self(PairBatch(rows, rows, one, _COLUMNS, "reference", one, samples))
