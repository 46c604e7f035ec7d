"""`DistillationTrainer`: `transformers.Trainer` with the loss (1 − w)·D(teacher, student) + w·cross-entropy.

Checkpoints, resuming, logging and distribution are the Trainer's. What stands here is the loss of a batch,
its normaliser and the held-out evaluation; `kldiv_kernels.distillation` has the loss from logits.
The teacher is a model, or k log-probabilities a token that come with the data, as from a teacher cache.

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

from kldiv_kernels.distillation import (
    IGNORED,
    LossOptions,
    distillation_loss,
    rows_with_ids,
    shared_vocab_size,
    topk_distillation_loss,
)
from kldiv_kernels.stats import selective_log_softmax, token_stats
from kldiv_kernels.top_k import topk_divergence_loss
from kldiv_kernels.trainer import cached

_ROWS = ("topk_ids", "topk_logprobs")


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
    alpha: float | None = field(
        default=None, metadata={"help": "Parameter of skew_kl, skew_reverse_kl, renyi, alpha, alpha_beta; default 0.5."}
    )
    beta: float | None = field(default=None, metadata={"help": "Parameter of js and alpha_beta; default 0.5."})
    vocab_size: int | None = field(
        default=None,
        metadata={"help": "Columns from here on are padding; default: the narrower of the two models' vocabularies."},
    )
    tail: str = field(
        default="bucket",
        metadata={"help": "Of a teacher in the data, as k log-probs a token; see topk_divergence_loss."},
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
        teacher_model: frozen, run without gradients on the student's device, in its own dtype. Its vocabulary may be
            padded to another width than the student's. None with `ce_weight=1`, or where the data have the teacher.
        args: `DistillationArguments`.
        data_collator: as in `transformers.Trainer`; default for data that have the teacher:
            `kldiv_kernels.trainer.cached.collate`, which pads.
        others: as in `transformers.Trainer`. Datasets yield `input_ids` and unshifted `labels`, -100 where a token is
            no target. Without a teacher model they also yield its `topk_ids` [tokens, K], -1 for none, and
            `topk_logprobs` [tokens, K] at `args.temperature`: row t is its distribution of token t + 1, as in
            `kldiv_kernels.trainer.CachedSequences`, a teacher cache as a data set.

    `evaluate()` reports, per held-out target token in nats and whatever the training loss is, `eval_loss` (the
    student's cross-entropy, at temperature 1) and the divergence from the teacher: from a model `eval_kl`
    (KL(teacher ∥ student) at temperature 1), from rows `eval_topk_kl` (the KL on k + 1 outcomes, the k tokens and all
    others as one, at `args.temperature`: at most the full KL).
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
        held_out = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
        given = [data for data in (train_dataset, *held_out) if data is not None]
        have_rows = [_has_rows(data) for data in given] if teacher_model is None else []
        if teacher_model is None and args.ce_weight != 1.0 and all(have is False for have in have_rows):
            raise ValueError(
                f"DistillationTrainer: teacher_model is None; ce_weight = {args.ce_weight} needs one (1 does not), or "
                f"data with {' and '.join(_ROWS)}"
            )
        sequences = [data for data in given if have_rows and isinstance(data, cached.CachedSequences)]
        self.vocab_size = shared_vocab_size(
            model, teacher_model, args.vocab_size,
            cached=min((data.cache.info.vocab_size for data in sequences), default=None),
        )  # fmt: skip
        for data in sequences:
            data.check_for(vocab_size=self.vocab_size, temperature=args.temperature, positions=max_positions(model))
        if data_collator is None and True in have_rows:
            data_collator = cached.collate
        self.teacher_model = None
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class,
            compute_metrics=self._held_out_metrics, callbacks=callbacks, optimizers=optimizers,
        )  # fmt: skip
        # Both make the Trainer count target tokens for every model, also one whose own loss would not ask for it.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
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
        features, targets, rows = _split(inputs)
        outputs = model(**features, use_cache=False)
        if num_items_in_batch is None:
            normalizer, ranks = (targets != IGNORED).sum(), 1
        else:
            # One element a GPU under DataParallel, all equal.
            normalizer, ranks = torch.as_tensor(num_items_in_batch, device=targets.device).reshape(-1)[0], self._ranks()
        options = self.args.loss_options()
        # A batch without a single target has loss 0, not 0/0.
        scale: dict[str, Any] = {"vocab_size": self.vocab_size, "normalizer": normalizer.clamp_min(1)}
        if self.args.ce_weight == 1.0:
            loss = distillation_loss(outputs.logits, None, targets, options, **scale)
        elif self.teacher_model is not None:
            loss = distillation_loss(outputs.logits, self._teacher_logits(features), targets, options, **scale)
        elif rows is not None:
            loss = topk_distillation_loss(outputs.logits, *rows, targets, options, **scale)
        else:
            raise ValueError(
                f"DistillationTrainer: teacher_model is None and the batch has no {' and '.join(_ROWS)}; it has "
                f"{', '.join(inputs)}"
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
        """Sums over the tokens of each sequence, [batch, 1 or 2], and of how many tokens they are, the same shape.

        Sums of sequences gather exactly over ranks; a mean a batch would weigh a token by its batch.
        """
        features, targets, rows = _split(self._prepare_inputs(dict(inputs)))
        mask = targets != IGNORED
        common: dict[str, Any] = {"vocab_size": self.vocab_size, "backend": self.args.backend}
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**features, use_cache=False).logits
            if self.teacher_model is not None:
                stats = token_stats(
                    logits, self._teacher_logits(features), targets, stats=("logprob", "forward_kl"), mask=mask,
                    **common,
                )  # fmt: skip
                found = [(-stats.logprob, mask), (stats.forward_kl, mask)]
            else:
                found = [(-selective_log_softmax(logits, targets, mask=mask, **common), mask)]
                if rows is not None:
                    known = mask & rows_with_ids(rows[0])
                    kl = topk_divergence_loss(
                        logits, *rows, mask=known,
                        reduction="none", temperature=self.args.temperature, **common,
                    )  # fmt: skip
                    found.append((kl, known))
        sums, counts = (torch.stack([x.sum(-1) for x in column], dim=-1) for column in zip(*found, strict=True))
        return None, sums, counts

    def _held_out_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        sums, counts = (
            np.asarray(x, dtype=np.float64).sum(axis=0) for x in (prediction.predictions, prediction.label_ids)
        )
        names = ("loss", "topk_kl" if self.teacher_model is None else "kl")
        return {name: float(x) / max(1.0, float(n)) for name, x, n in zip(names, sums, counts, strict=False)}

    def _set_signature_columns_if_needed(self) -> None:
        """The teacher's rows are no arguments of the model, and would be dropped as unused."""
        super()._set_signature_columns_if_needed()
        if self.teacher_model is None:
            self._signature_columns = list(dict.fromkeys([*(self._signature_columns or ()), *_ROWS]))  # type: ignore[assignment]

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A checkpoint has weights that are tied to others only once: those are not missing."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)

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


def _split(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor, tuple[Tensor, Tensor] | None]:
    """The models' inputs, the target of each position, and the teacher's rows where the batch has them.

    The labels are shifted, not the logits: the gradient of `logits[:, :-1]` would be copied into a buffer of zeros as
    large as the logits, while the masked last row costs nothing.
    """
    rest = dict(inputs)
    labels = rest.pop("labels", None)
    if labels is None:
        raise ValueError(f"DistillationTrainer: the batch has no labels; it has {', '.join(rest)}")
    ids, logprobs = (rest.pop(name, None) for name in _ROWS)
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return rest, targets, None if ids is None or logprobs is None else (ids, logprobs)


def max_positions(model: PreTrainedModel) -> int | None:
    """How many tokens a sequence may have; None where the configuration does not say."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if found is None else int(found)


def _has_rows(data: Any) -> bool | None:
    """Whether a data set has the teacher's rows, by its columns or its first element; None where neither says."""
    columns = getattr(data, "column_names", None)
    if columns is None and hasattr(data, "__getitem__") and hasattr(data, "__len__") and len(data) > 0:
        columns = data[0]
    return None if columns is None else all(name in columns for name in _ROWS)
