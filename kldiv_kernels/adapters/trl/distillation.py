"""TRL's DistillationTrainer with any divergence of the registry, from hidden states or logits."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from trl.trainer import distillation_trainer

from kldiv_kernels.adapters import headless, tensor_parallel
from kldiv_kernels.adapters.trl.scoring import completion_logits
from kldiv_kernels.choices import Backend
from kldiv_kernels.linear import hidden_states
from kldiv_kernels.losses import divergence_loss
from kldiv_kernels.registry import kinds_with
from kldiv_kernels.sources import Logits, Source
from kldiv_kernels.weighted import weighted_sum_of

_WHERE = "DistillationTrainer"
_SCORING_INPUTS = inspect.signature(distillation_trainer.DistillationTrainer._get_last_hidden_state).parameters


class DistillationTrainer(distillation_trainer.DistillationTrainer):
    """`trl.DistillationTrainer` (on-policy: the student writes the completions) with a divergence of this library.

    Arguments, DistillationConfig, data, generation, normaliser and metrics are TRL's; so are, with the defaults here,
    the loss and its gradient. TRL 1.15 or 1.16. Where both models have a plain head, loss and gradient come from hidden
    states in one pass, as in `kldiv_kernels.trainer.DistillationTrainer`. Elsewhere, as with a PEFT model or FSDP, the
    logits of the completion are kept in memory for student and teacher, [batch, completion, vocab] each.

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
        ValueError, TypeError: at construction, for what `divergence_loss` does not allow, and for a model that is
            tensor parallel: TRL samples on each rank by itself.
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
        tensor_parallel.refuse(
            _WHERE, "and TRL samples on each rank by itself", model=self.model,
            teacher_model=self.accelerator.unwrap_model(self.teacher_model),
        )  # fmt: skip
        self._how: dict[str, Any] = {
            "kind": kind, "alpha": alpha, "beta": self.beta if beta is None and kind in kinds_with("beta") else beta,
            "temperature": self.temperature, "temperature_squared": temperature_squared,
        }  # fmt: skip
        # The loss knows what it allows: ask it on a row of the model's width, before anything is generated.
        row = torch.zeros(1, self.model.config.get_text_config().vocab_size)
        divergence_loss(row, row, vocab_size=vocab_size, **self._how)
        self._where: dict[str, Any] = {"vocab_size": vocab_size, "backend": backend}
        around = headless.why_not_in(self)
        with self.accelerator.autocast():
            teacher = self.accelerator.unwrap_model(self.teacher_model)
            self._from_hidden = around is None and headless.why_not(model=self.model, teacher_model=teacher) is None

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
        source = self._source(unwrapped_student, completion, batch)
        count = mask.sum()
        weight = self.temperature**2 if self._how["temperature_squared"] else 1.0
        parameters = {name: self._how[name] for name in ("alpha", "beta") if self._how[name] is not None}
        # TRL wants the sum of the entropies for its log.
        loss, (_, entropies) = weighted_sum_of(
            _WHERE, source, None, {self._how["kind"]: weight, "entropy": 0.0}, mask=mask, temperature=self.temperature,
            normalizer=count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch,
            **parameters, **self._where,
        )  # fmt: skip
        return loss, entropies.sum(), count

    def _source(self, student: Any, completion: int, batch: dict[str, Any]) -> Source:
        """Of the completion: hidden states and heads, or logits."""
        teacher, predicts = self.accelerator.unwrap_model(self.teacher_model), slice(-(completion + 1), -1)
        self.teacher_model.eval()
        if not self._from_hidden:
            logits, _ = completion_logits(student, student, completion, **batch)
            with torch.no_grad():
                theirs, _ = completion_logits(self.teacher_model, teacher, completion, **batch)
            return Logits(logits, theirs.to(logits.device))
        hidden = headless.hidden_states_of(student, student, batch)[:, predicts]
        with torch.no_grad():
            theirs = headless.hidden_states_of(self.teacher_model, teacher, batch)[:, predicts]
        with self.accelerator.autocast():
            return hidden_states(
                _WHERE, hidden, headless.head_of(student), theirs.to(hidden.device), headless.head_of(teacher)
            )
