"""The loss of distillation, (1 − w)·D(teacher, student) + w·cross-entropy, and its options.

What `kldiv_kernels.trainer` and `kldiv_kernels.adapters.transformers` share. The student's logits, and a teacher's,
are there or are made of hidden states and heads chunk by chunk (`sources.Source`).

Passes over logits [tokens, vocabulary] of a loss and its gradient, and from hidden states what is multiplied with the
student's head: for logits and for gradients (with the teacher's once more, where there is one).

    teacher                          its logits       k log-probs a token               hidden states
    D alone                          3                2 where one read serves it,       1 + 2
                                                      else 3
    cross-entropy alone              2                2                                 1 + 2
    both                             3                3                                 1 + 2, of k log-probs 2 + 2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kldiv_kernels import registry, top_k
from kldiv_kernels.backends import names as backend_names
from kldiv_kernels.choices import Backend
from kldiv_kernels.losses import divergence_loss
from kldiv_kernels.sources import Source
from kldiv_kernels.top_k import topk_divergence_loss, topk_divergence_of, topk_statistics_of
from kldiv_kernels.weighted import weighted_sum_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100
_WHERE = "distillation_loss"


@dataclass(frozen=True)
class LossOptions:
    """ce_weight is w, 0 to 1; for tail see `kldiv_kernels.topk_divergence_loss`, for others `divergence_loss`."""

    kind: str = "forward_kl"
    ce_weight: float = 0.0
    temperature: float = 1.0
    temperature_squared: bool = False
    alpha: float | None = None
    beta: float | None = None
    backend: Backend = "auto"
    tail: str = "bucket"

    @property
    def factor(self) -> float:
        """What `temperature_squared` multiplies the divergence by."""
        return self.temperature**2 if self.temperature_squared else 1.0

    def divergence_options(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "temperature_squared": self.temperature_squared,
            **self.parameters(),
        }

    def parameters(self) -> dict[str, Any]:
        """Those of alpha and beta that the kind has, or that are given although it has none."""
        given = (("alpha", self.alpha), ("beta", self.beta))
        return {
            name: 0.5 if x is None else x
            for name, x in given
            if x is not None or self.kind in registry.kinds_with(name)
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
        topk_divergence_loss(
            row, torch.tensor([[0, 1]]), row.log_softmax(-1), self.kind, tail=self.tail,  # type: ignore[arg-type]
            backend="reference", **self.divergence_options(),
        )  # fmt: skip


def distillation_of(
    source: Source, targets: Tensor, options: LossOptions, *, vocab_size: int, normalizer: Tensor
) -> Tensor:
    """Σ over target tokens of (1 − w)·D + w·(−log q_target), divided by `normalizer`. float32 scalar.

    source: logits [batch, tokens, vocab], wherever they come from; targets [batch, tokens], already shifted, -100 where
    there is none.
    """
    weight = options.ce_weight
    weights = {}
    if weight < 1.0:
        if source.reference is None:
            raise ValueError(f"distillation_loss: teacher_logits is None; ce_weight = {weight} needs them")
        weights[options.kind] = (1.0 - weight) * options.factor
    if weight:
        weights[_cross_entropy(options)] = -weight
    loss, _ = weighted_sum_of(
        _WHERE, source, targets, weights, temperature=options.temperature, mask=targets != IGNORED,
        normalizer=normalizer, vocab_size=vocab_size, backend=options.backend, **options.parameters(),
    )  # fmt: skip
    return loss


def topk_distillation_of(
    source: Source,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    targets: Tensor,
    options: LossOptions,
    *,
    vocab_size: int,
    normalizer: Tensor,
) -> Tensor:
    """`distillation_of` a teacher that is known by k log-probabilities a token, [batch, tokens, K].

    A target whose position has no id (-1 in all of its row) has no divergence; its cross-entropy counts.
    """
    where, weight, target = "topk_distillation_loss", options.ce_weight, targets != IGNORED
    if weight == 1.0:
        return distillation_of(source, targets, options, vocab_size=vocab_size, normalizer=normalizer)
    tail: Any = options.tail
    rows: dict[str, Any] = {
        "tail": tail,
        "mask": rows_with_ids(topk_ids) & target,
        "normalizer": normalizer,
        "backend": options.backend,
        **options.parameters(),
    }
    if weight == 0.0:
        return topk_divergence_of(
            where, source, topk_ids, topk_logprobs, options.kind, vocab_size=vocab_size,
            temperature=options.temperature, temperature_squared=options.temperature_squared, **rows,
        )  # fmt: skip
    logits = source.logits
    looks = top_k.looks_at(logits, None)
    ids, logprobs = top_k.teacher_checked(where, topk_ids, topk_logprobs, logits, vocab_size, looks)
    if tail == "bucket":
        rows["tail_logprob"] = top_k.tail_of(
            where, logprobs, ids, vocab_size, given=topk_logprobs.dtype, floor=None, check=looks
        )
    of_target = _cross_entropy(options)
    student = topk_statistics_of(
        where, source, ids, targets, stats=("topk_logprobs", "tail_logprob", of_target),
        temperature=options.temperature, mask=target, vocab_size=vocab_size, check=False, backend=options.backend,
    )  # fmt: skip
    # The k tokens and the rest are a distribution on k + 1 outcomes: logits of themselves, of which the last is the
    # tail again.
    outcomes = torch.cat([student.topk_logprobs, student.tail_logprob[..., None]], dim=-1)
    columns = torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
    loss = topk_divergence_loss(
        outcomes, torch.where(ids >= 0, columns, -1), logprobs, options.kind, check=False, **rows, temperature=1.0,
    )  # fmt: skip
    return (1.0 - weight) * options.factor * loss - weight * student[of_target].sum() / normalizer


def _cross_entropy(options: LossOptions) -> str:
    """The statistic whose negative it is: of the student at temperature 1, whatever that of the divergence is."""
    return "logprob" if options.temperature == 1.0 else "untempered_logprob"


def rows_with_ids(topk_ids: Tensor) -> Tensor:
    """[batch, tokens] bool: at which positions the teacher is known."""
    return (topk_ids >= 0).any(dim=-1)


def shared_vocab_size(
    model: PreTrainedModel, teacher: PreTrainedModel | None, given: int | None, *, cached: int | None = None
) -> int:
    """How many columns of the logits both models have, or `given` if they do. Raises ValueError if they do not.

    cached: the vocabulary of log-probabilities that stand for the teacher.
    """
    widths = [int(m.config.get_text_config().vocab_size) for m in (model, teacher) if m is not None]
    narrower = "model"
    if cached is not None:
        narrower = "of model and cache"
        widths.append(cached)
    if given is None:
        return min(widths)
    if not 1 <= given <= min(widths):
        raise ValueError(f"vocab_size is {given}; expected 1 to {min(widths)}, the width of the narrower {narrower}")
    return given
