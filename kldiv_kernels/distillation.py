"""The loss of distillation from logits, (1 − w)·D(teacher, student) + w·cross-entropy, and its options.

What `kldiv_kernels.trainer` and `kldiv_kernels.adapters.transformers` share.

Passes over [tokens, vocabulary] (see the table in DESIGN.md): D alone 3, cross-entropy alone 3, both at temperature 1
5 (one table of statistics, one backward); both at another temperature 6, and 3 to add the two gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kldiv_kernels.backends import names as backend_names
from kldiv_kernels.losses import divergence_loss
from kldiv_kernels.stats import selective_log_softmax, token_stats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100


@dataclass(frozen=True)
class LossOptions:
    """See `kldiv_kernels.divergence_loss`; ce_weight is w, 0 to 1."""

    kind: str = "forward_kl"
    ce_weight: float = 0.0
    temperature: float = 1.0
    temperature_squared: bool = False
    alpha: float = 0.5
    beta: float = 0.5
    backend: str = "auto"

    def divergence_options(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "temperature_squared": self.temperature_squared,
            "alpha": self.alpha,
            "beta": self.beta,
        }

    def check(self, where: str) -> None:
        """Raises ValueError, naming the option, for a value that the loss does not allow."""
        if not 0.0 <= self.ce_weight <= 1.0:
            raise ValueError(f"{where}: ce_weight is {self.ce_weight}; expected between 0 and 1")
        if self.backend not in ("auto", *backend_names()):
            allowed = ", ".join(("auto", *backend_names()))
            raise ValueError(f"{where}: backend is {self.backend!r}; expected one of {allowed}")
        # The loss knows what it allows: ask it on two columns, before anything is loaded.
        row = torch.zeros(1, 2)
        divergence_loss(row, row, self.kind, backend="reference", **self.divergence_options())


def distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor | None,
    targets: Tensor,
    options: LossOptions,
    *,
    vocab_size: int,
    normalizer: Tensor,
) -> Tensor:
    """Σ over target tokens of (1 − w)·D + w·(−log q_target), divided by `normalizer`. float32 scalar.

    logits, teacher_logits [batch, tokens, vocab]; targets [batch, tokens], already shifted, -100 where there is none.
    """
    common: dict[str, Any] = {
        "mask": targets != IGNORED,
        "vocab_size": vocab_size,
        "backend": options.backend,
    }
    weight = options.ce_weight
    if weight == 1.0:
        return -selective_log_softmax(logits, targets, **common).sum() / normalizer
    if teacher_logits is None:
        raise ValueError(f"distillation_loss: teacher_logits is None; ce_weight = {weight} needs them")
    if weight == 0.0:
        return divergence_loss(
            logits, teacher_logits, options.kind, normalizer=normalizer, **options.divergence_options(), **common
        )
    if options.temperature == 1.0:
        stats = token_stats(
            logits, teacher_logits, targets, stats=("logprob", options.kind),
            alpha=options.alpha, beta=options.beta, **common,
        )  # fmt: skip
        return ((1.0 - weight) * stats[options.kind] - weight * stats.logprob).sum() / normalizer
    divergence = divergence_loss(
        logits, teacher_logits, options.kind, normalizer=normalizer, **options.divergence_options(), **common
    )
    logprob = selective_log_softmax(logits, targets, **common)
    return (1.0 - weight) * divergence - weight * logprob.sum() / normalizer


def shared_vocab_size(model: PreTrainedModel, teacher: PreTrainedModel | None, given: int | None) -> int:
    """How many columns of the logits both models have, or `given` if they do. Raises ValueError if they do not."""
    widths = [int(m.config.get_text_config().vocab_size) for m in (model, teacher) if m is not None]
    if given is None:
        return min(widths)
    if not 1 <= given <= min(widths):
        raise ValueError(f"vocab_size is {given}; expected 1 to {min(widths)}, the width of the narrower model")
    return given
