"""The functions of logits as torchtitan's losses: (pred, labels, global_valid_tokens) -> (loss, metrics)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kldiv_kernels.adapters.torchtitan.base import BaseLoss
from kldiv_kernels.adapters.torchtitan.functions import cross_entropy_loss, distillation_loss
from kldiv_kernels.nn import DivergenceLoss
from kldiv_kernels.parallel import Group


class CrossEntropyLoss(BaseLoss):
    """`cross_entropy_loss` as torchtitan's loss of this name.

    >>> import torch
    >>> loss = CrossEntropyLoss.Config().build()
    >>> value, metrics = loss(torch.zeros(1, 2, 4), torch.tensor([[3, 0]]), torch.tensor(2.0))
    >>> round(value.item(), 4), metrics
    (1.3863, {})
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        global_vocab_size: int | None = None
        """Columns of the vocabulary over all ranks, where they are not shared evenly."""

    def __init__(
        self, config: CrossEntropyLoss.Config, *, compile_config: Any = None, tp_group: Group | None = None
    ) -> None:
        """Args: see `DistillationLoss`."""
        self._of_shards: dict[str, Any] = {"global_vocab_size": config.global_vocab_size, "tp_group": tp_group}

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | float | None = None, **others: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Args: see `DistillationLoss`; others: what torchtitan gives every loss, of which this one takes nothing."""
        loss = cross_entropy_loss(pred, labels, **self._of_shards)
        return loss if global_valid_tokens is None else loss / global_valid_tokens, {}


class DistillationLoss(BaseLoss):
    """`distillation_loss` in the form of torchtitan's losses; the teacher's logits are an argument of the call.

    Of `ChunkedLossWrapper`, which cuts the tensors of a call into chunks of the sequence, it may be the `loss_fn`.

    >>> import torch
    >>> loss = DistillationLoss.Config(kind="js", beta=0.5).build()
    >>> student, teacher, labels = torch.zeros(1, 2, 4), torch.eye(2, 4)[None], torch.tensor([[3, 0]])
    >>> loss(student, labels, torch.tensor(2.0), teacher_logits=teacher)[0].item() > 0
    True
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        kind: str = "forward_kl"
        """The divergence: forward_kl, reverse_kl, js, or another of the registry."""

        temperature: float = 1.0
        """Both sides' logits are divided by it."""

        temperature_squared: bool = False
        """The loss is multiplied by the square of the temperature, so that gradients keep their size."""

        alpha: float | None = None
        """Parameter of the kinds that have it; 0.5 where None. An error for other kinds."""

        beta: float | None = None
        """Parameter of the kinds that have it, as js; 0.5 where None. An error for other kinds."""

        global_vocab_size: int | None = None
        """Columns of the vocabulary over all ranks, where they are not shared evenly."""

    def __init__(
        self, config: DistillationLoss.Config, *, compile_config: Any = None, tp_group: Group | None = None
    ) -> None:
        """Args:
            config: checked here.
            compile_config: torchtitan's, which gives it to every loss. No effect: nothing is left to fuse.
            tp_group: see `cross_entropy_loss`.

        Raises: TypeError, ValueError: an unknown kind, or an option that it does not have.
        """
        self._options: dict[str, Any] = {
            "temperature": config.temperature, "temperature_squared": config.temperature_squared,
            "alpha": config.alpha, "beta": config.beta,
        }  # fmt: skip
        self._options["kind"] = DivergenceLoss(config.kind, **self._options).kind
        self._options |= {"global_vocab_size": config.global_vocab_size, "tp_group": tp_group}

    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | float | None = None,
        *,
        teacher_logits: Tensor,
        **others: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, no metrics).

        Args:
            pred: [*, V], the student's logits, or this rank's columns of every row.
            labels: [*]; tokens whose label is -100 do not count.
            global_valid_tokens: what the sum is divided by: the tokens over all ranks and accumulation steps.
            teacher_logits: as pred, on the same columns.
            others: what torchtitan gives every loss, such as positions, of which this one takes nothing.
        """
        return distillation_loss(pred, teacher_logits, labels, normalizer=global_valid_tokens, **self._options), {}
