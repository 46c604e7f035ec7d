"""`DistillationTrainer`: `transformers.Trainer` with the loss (1 − w)·D(teacher, student) + w·cross-entropy.

Checkpoints, resuming, logging and distribution are the Trainer's. What stands here is the loss of a batch,
its normaliser and the held-out evaluation; `kldiv_kernels.distillation` has the loss from logits.

The loss of a batch is Σ over its target tokens / number of target tokens of the whole optimiser step, over all
accumulation steps and ranks (`num_items_in_batch`). A mean per micro-batch, averaged, would weigh a token by how
few others stand beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from kldiv_kernels.distillation import IGNORED, LossOptions, distillation_loss, shared_vocab_size
from kldiv_kernels.stats import token_stats


@dataclass
class DistillationArguments(TrainingArguments):
    """`transformers.TrainingArguments` and the options of the loss; see `kldiv_kernels.divergence_loss`.

    Raises ValueError, naming the argument, for a value that the loss does not allow.
    """

    kind: str = field(default="forward_kl", metadata={"help": "Divergence between teacher and student."})
    ce_weight: float = field(
        default=0.0, metadata={"help": "w in (1 − w)·divergence + w·cross-entropy on the labels; 1: no teacher needed."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Divides both logits of the divergence."})
    temperature_squared: bool = field(
        default=False, metadata={"help": "Multiply the divergence by temperature², so that gradients keep their size."}
    )
    alpha: float = field(default=0.5, metadata={"help": "Parameter of the divergences that have it."})
    beta: float = field(default=0.5, metadata={"help": "Parameter of js and alpha_beta."})
    vocab_size: int | None = field(
        default=None,
        metadata={"help": "Columns from here on are padding; default: the narrower of the two models' vocabularies."},
    )
    backend: str = field(default="auto", metadata={"help": "Backend of kldiv_kernels."})
    # The Trainer would report a running average in place of a NaN or infinite loss, and so hide it.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Leave NaN and inf out of logged losses."})

    def __post_init__(self) -> None:
        self.loss_options().check("DistillationArguments")
        super().__post_init__()  # type: ignore[no-untyped-call]

    def loss_options(self) -> LossOptions:
        return LossOptions(**{option.name: getattr(self, option.name) for option in fields(LossOptions)})


class DistillationTrainer(Trainer):
    """Distils `teacher_model` into `model`, both causal language models of `transformers` over one vocabulary.

    Args:
        model: the student.
        teacher_model: frozen, run without gradients on the student's device, in its own dtype; None only with
            `ce_weight=1`. Its vocabulary may be padded to another width than the student's.
        args: `DistillationArguments`.
        others: as in `transformers.Trainer`. Datasets yield `input_ids` and unshifted `labels`, -100 where a token is
            no target.

    `evaluate()` reports, per held-out target token in nats and at temperature 1, `eval_loss` (the student's
    cross-entropy) and, with a teacher, `eval_kl` (KL(teacher ∥ student)); both whatever the training loss is.
    """

    args: DistillationArguments
    # compute_loss divides by the number of target tokens of the whole step.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel,
        teacher_model: PreTrainedModel | None,
        args: DistillationArguments,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        data_collator: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if teacher_model is None and args.ce_weight != 1.0:
            raise ValueError(
                f"DistillationTrainer: teacher_model is None; ce_weight = {args.ce_weight} needs one (1 does not)"
            )
        self.vocab_size = shared_vocab_size(model, teacher_model, args.vocab_size)
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class,
            compute_metrics=_held_out_metrics, callbacks=callbacks, optimizers=optimizers,
        )  # fmt: skip
        # Both make the Trainer count target tokens for every model, also one whose own loss would not ask for it.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self.teacher_model = None
        if teacher_model is not None:
            teacher_model.requires_grad_(False)
            # Gives the teacher the student's device and mixed precision; in evaluation mode it is not wrapped in DDP.
            self.teacher_model = self.accelerator.prepare_model(teacher_model, evaluation_mode=True).eval()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        features, targets = _split_targets(inputs)
        outputs = model(**features, use_cache=False)
        teacher_logits = None if self.args.ce_weight == 1.0 else self._teacher_logits(features)
        if num_items_in_batch is None:
            normalizer, ranks = (targets != IGNORED).sum(), 1
        else:
            # One element a GPU under DataParallel, all equal.
            normalizer, ranks = torch.as_tensor(num_items_in_batch, device=targets.device).reshape(-1)[0], self._ranks()
        loss = distillation_loss(
            outputs.logits,
            teacher_logits,
            targets,
            self.args.loss_options(),
            vocab_size=self.vocab_size,
            # A batch without a single target has loss 0, not 0/0.
            normalizer=normalizer.clamp_min(1),
        )
        # DDP averages the gradients of ranks that each divided by the tokens of all of them.
        loss = loss * ranks if ranks > 1 else loss
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """Sums over the target tokens of each sequence, [batch, 1 or 2], and their number, [batch].

        Sums of sequences gather exactly over ranks; a mean a batch would weigh a token by its batch.
        """
        features, targets = _split_targets(self._prepare_inputs(dict(inputs)))
        mask = targets != IGNORED
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**features, use_cache=False).logits
            teacher_logits = self._teacher_logits(features) if self.teacher_model is not None else None
            stats = token_stats(
                logits, teacher_logits, targets,
                stats=("logprob",) if teacher_logits is None else ("logprob", "forward_kl"),
                mask=mask, vocab_size=self.vocab_size, backend=self.args.backend,
            )  # fmt: skip
        sums = [-stats.logprob.sum(-1)]
        if teacher_logits is not None:
            sums.append(stats.forward_kl.sum(-1))
        return None, torch.stack(sums, dim=-1), mask.sum(-1)

    def _teacher_logits(self, inputs: Mapping[str, Any]) -> Tensor:
        assert self.teacher_model is not None
        with torch.no_grad():
            logits: Tensor = self.teacher_model(**inputs, use_cache=False).logits
        return logits

    def _ranks(self) -> int:
        """By how many ranks the count of target tokens is shared: as in `Trainer.compute_loss`."""
        if not self.args.average_tokens_across_devices:
            return 1
        return int(self.accelerator.num_processes) // int(self.get_tp_size())


def _split_targets(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """The models' inputs, and the target of each position.

    The labels are shifted, not the logits: the gradient of `logits[:, :-1]` would be copied into a buffer of zeros as
    large as the logits, while the masked last row costs nothing.
    """
    rest = dict(inputs)
    labels = rest.pop("labels", None)
    if labels is None:
        raise ValueError(f"DistillationTrainer: the batch has no labels; it has {', '.join(rest)}")
    return rest, torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def _held_out_metrics(prediction: EvalPrediction) -> dict[str, float]:
    sums = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    tokens = max(1, int(np.asarray(prediction.label_ids).sum()))
    return {name: float(total) / tokens for name, total in zip(("loss", "kl"), sums, strict=False)}
