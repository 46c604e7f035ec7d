"""TRL's DistillationTrainer with any divergence of the registry, from logits instead of TRL's chunked head."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from trl.trainer import distillation_trainer

from kldiv_kernels.adapters.trl.scoring import completion_logits
from kldiv_kernels.choices import Backend
from kldiv_kernels.losses import divergence_loss
from kldiv_kernels.registry import kinds_with
from kldiv_kernels.stats import entropy

_SCORING_INPUTS = inspect.signature(distillation_trainer.DistillationTrainer._get_last_hidden_state).parameters


class DistillationTrainer(distillation_trainer.DistillationTrainer):
    """`trl.DistillationTrainer` (on-policy: the student writes the completions) with a divergence of this library.

    Arguments, DistillationConfig, data, generation, normaliser and metrics are TRL's; so are, with the defaults here,
    the loss and its gradient. TRL 1.15 or 1.16. The logits of the completion are kept in memory for student and
    teacher, [batch, completion, vocab] each; TRL computes them in tiles, twice or three times.

    Args:
        kind: the divergence, a name of `kldiv_kernels.divergence_loss`. Default "js": with DistillationConfig's beta,
            as in TRL, forward KL at 0 and reverse KL at 1 (TRL's default).
        alpha: parameter of the divergences that have it, by default 0.5; an error with others.
        beta: parameter of js and alpha_beta, by default DistillationConfig's; an error with others.
        temperature_squared: multiply the loss by temperature². Default False, as in TRL.
        vocab_size: columns from there on are padding. Default: all are tokens.
        backend: see `kldiv_kernels.divergence_loss`.
        args, kwargs: those of `trl.DistillationTrainer`.

    Raises:
        ValueError, TypeError: at construction, for what `divergence_loss` does not allow.
    """

    # TRL's types are those of any transformers.Trainer.
    model: Any
    teacher_model: Any

    def __init__(
        self,
        *args: Any,
        kind: str = "js",
        alpha: float | None = None,
        beta: float | None = None,
        temperature_squared: bool = False,
        vocab_size: int | None = None,
        backend: Backend = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._how: dict[str, Any] = {
            "kind": kind, "alpha": alpha, "beta": self.beta if beta is None and kind in kinds_with("beta") else beta,
            "temperature": self.temperature, "temperature_squared": temperature_squared,
        }  # fmt: skip
        # The loss knows what it allows: ask it on a row of the model's width, before anything is generated.
        row = torch.zeros(1, self.model.config.get_text_config().vocab_size)
        divergence_loss(row, row, vocab_size=vocab_size, **self._how)
        self._where: dict[str, Any] = {"vocab_size": vocab_size, "backend": backend}

    def _compute_loss(
        self, unwrapped_student: Any, inputs: Mapping[str, Any], num_items_in_batch: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        completion = inputs["completion_ids"].size(1)
        batch = {
            "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            **{name: inputs[name] for name in _SCORING_INPUTS if name in inputs},
        }
        student, _ = completion_logits(unwrapped_student, unwrapped_student, completion, **batch)
        self.teacher_model.eval()
        with torch.no_grad():
            unwrapped_teacher = self.accelerator.unwrap_model(self.teacher_model)
            teacher, _ = completion_logits(self.teacher_model, unwrapped_teacher, completion, **batch)
            # TRL wants the sum of the entropies for its log.
            entropies = entropy(student, mask=mask, temperature=self.temperature, **self._where)
        count = mask.sum()
        loss = divergence_loss(
            student, teacher.to(student.device), mask=mask, **self._how, **self._where,
            normalizer=count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch,
        )  # fmt: skip
        return loss, entropies.sum(), count
