"""`DistillationTrainer`: `transformers.Trainer` with the loss (1 − w)·D(teacher, student) + w·cross-entropy.

Checkpoints, resuming, logging and distribution are the Trainer's. What stands here is the loss of a batch,
its normaliser and the held-out evaluation; `kldiv_kernels.distillation` has the loss, `headless` what it is of.
The teacher is a model, or k log-probabilities a token that come with the data, as from a teacher cache.

The loss of a batch is Σ over its target tokens / number of target tokens of the whole optimiser step, over all
accumulation steps and ranks (`num_items_in_batch`). A mean per micro-batch, averaged, would weigh a token by how
few others stand beside it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from kldiv_kernels.adapters import headless, tensor_parallel
from kldiv_kernels.distillation import (
    IGNORED,
    distillation_of,
    rows_with_ids,
    shared_vocab_size,
    topk_distillation_of,
)
from kldiv_kernels.sources import Source
from kldiv_kernels.stats import statistics_of
from kldiv_kernels.top_k import topk_divergence_of
from kldiv_kernels.trainer import cached
from kldiv_kernels.trainer.arguments import DistillationArguments

_WHERE = "DistillationTrainer"
_ROWS = ("topk_ids", "topk_logprobs")
_logger = logging.getLogger(__name__)


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

    `fused_linear` says whether the losses take hidden states and heads: by default where each model's logits are those
    of `kldiv_kernels.Head`, which is tried on a few tokens; otherwise a warning says why not. Never under FSDP,
    DeepSpeed, DataParallel, tensor parallelism and torch.compile. Checkpoints are the same either way.

    Both models may be tensor parallel (`from_pretrained(distributed_config=DistributedConfig(tp_size=...))`), also
    under FSDP2 (`fsdp_size`): the student, or both. Where the plan of a head is "colwise", its logits stay where they
    are, and the loss is computed from each rank's columns.

    Raises ValueError for what does not go together, for context and sequence parallelism, and for
    `args.fused_linear=True` where that is impossible.
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
        if args.recipe is not None:
            _check_recipe_data(args, teacher_model, have_rows)
        elif teacher_model is None and args.ce_weight != 1.0 and all(have is False for have in have_rows):
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
        tensor_parallel.check(_WHERE, self, teacher_model)
        # Both make the Trainer count target tokens for every model, also one whose own loss would not ask for it.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        if teacher_model is not None:
            teacher_model.requires_grad_(False)
            # Gives the teacher the student's device and mixed precision; in evaluation mode it is not wrapped in DDP.
            self.teacher_model = self.accelerator.prepare_model(teacher_model, evaluation_mode=True).eval()
        self.fused_linear = self.args.fused_linear is not False and self._is_fused()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        features, targets, rows = _split(inputs)
        if num_items_in_batch is None:
            normalizer, ranks = (targets != IGNORED).sum(), 1
        else:
            # One element a GPU under DataParallel, all equal.
            normalizer, ranks = torch.as_tensor(num_items_in_batch, device=targets.device).reshape(-1)[0], self._ranks()
        if self.args.recipe is not None:
            return self._recipe_loss(model, features, targets, normalizer, ranks, return_outputs)
        if self.args.ce_weight != 1.0 and self.teacher_model is None and rows is None:
            absent = " and ".join(_ROWS)
            raise ValueError(
                f"{_WHERE}: teacher_model is None and the batch has no {absent}; it has {', '.join(inputs)}"
            )
        with_teacher = self.args.ce_weight != 1.0 and self.teacher_model is not None
        # Outputs that somebody wants have logits.
        outputs = model(**features, use_cache=False) if return_outputs or not self.fused_linear else None
        source, options = self._source(model, features, outputs, with_teacher), self.args.loss_options()
        # A batch without a single target has loss 0, not 0/0.
        scale: dict[str, Any] = {"vocab_size": self.vocab_size, "normalizer": normalizer.clamp_min(1)}
        if rows is None or with_teacher:
            loss = distillation_of(source, targets, options, **scale)
        else:
            loss = topk_distillation_of(source, *rows, targets, options, **scale)
        # DDP averages the gradients of ranks that each divided by the tokens of all of them.
        loss = loss * ranks if ranks > 1 else loss
        return (loss, outputs) if return_outputs else loss

    def _recipe_loss(
        self, model: torch.nn.Module, features: dict[str, Any], targets: Tensor, normalizer: Tensor, ranks: int,
        return_outputs: bool,
    ) -> Any:  # fmt: skip
        outputs = model(**features, use_cache=False)
        logits, theirs = self._logits(features, outputs, self.teacher_model)
        if theirs is not None:
            theirs = tensor_parallel.whole(theirs)
        recipe = self.args.recipe_loss()
        loss = recipe(
            tensor_parallel.whole(logits), theirs, targets, vocab_size=self.vocab_size, backend=self.args.backend,
            normalizer=normalizer.clamp_min(1), ignore_index=IGNORED,
        )  # fmt: skip
        # A mean that is the recipe's own is one of a micro-batch.
        loss = loss * ranks if recipe.takes("normalizer") else loss / self._micro_batches()
        return (loss, outputs) if return_outputs else loss

    def _micro_batches(self) -> int:
        assert self.model is not None
        # Before a training nobody has counted them.
        return int(getattr(self, "current_gradient_accumulation_steps", 1)) if self.model.training else 1

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
            with_teacher = self.teacher_model is not None
            outputs = None if self.fused_linear else model(**features, use_cache=False)
            source = self._source(model, features, outputs, with_teacher)
            names = ("logprob", "forward_kl") if with_teacher else ("logprob",)
            stats = statistics_of(_WHERE, source, targets, stats=names, mask=mask, **common)
            found = [(-stats.logprob, mask)]
            if with_teacher:
                found.append((stats.forward_kl, mask))
            elif rows is not None:
                known = mask & rows_with_ids(rows[0])
                kl = topk_divergence_of(
                    _WHERE, source, *rows, "forward_kl", tail="bucket", mask=known,
                    reduction="none", temperature=self.args.temperature, **common,
                )  # fmt: skip
                found.append((kl, known))
        sums, counts = (torch.stack([x.sum(-1) for x in column], dim=-1) for column in zip(*found, strict=True))
        return None, sums, counts

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        if self.get_tp_size() > 1:
            # The Trainer takes it back at the end of the loop.
            self.gather_function = partial(tensor_parallel.gathered, self)
        return super().evaluation_loop(*args, **kwargs)

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

    def _source(self, model: torch.nn.Module, features: dict[str, Any], outputs: Any, with_teacher: bool) -> Source:
        """The student's logits and the teacher's: those of `outputs`, or without them hidden states and heads."""
        teacher = self.teacher_model if with_teacher else None
        if outputs is None:
            return headless.source(_WHERE, (model, self.model), teacher, features, self.accelerator.autocast)
        return tensor_parallel.source(_WHERE, *self._logits(features, outputs, teacher), self.vocab_size)

    def _logits(self, features: dict[str, Any], outputs: Any, teacher: Any) -> tuple[Tensor, Tensor | None]:
        """The student's and the teacher's; DTensors where each rank has some of the columns."""
        logits = tensor_parallel.spread(_WHERE, self.model, outputs.logits)
        if teacher is None:
            return logits, None
        with torch.no_grad():
            return logits, tensor_parallel.spread(_WHERE, teacher, teacher(**features, use_cache=False).logits)

    def _is_fused(self) -> bool:
        """Whether the losses can take hidden states; if not a warning, or an error where they were asked to."""
        if self.args.recipe is not None:
            return False
        with self.accelerator.autocast():
            reason = headless.why_not_in(self) or headless.why_not(model=self.model, teacher_model=self.teacher_model)
        if reason is None:
            return True
        if self.args.fused_linear:
            raise ValueError(f"{_WHERE}: fused_linear is True, which is impossible here: {reason}")
        if self.is_world_process_zero():
            _logger.warning("%s: all logits are kept in memory (fused_linear is off): %s", _WHERE, reason)
        return False

    def _ranks(self) -> int:
        """By how many ranks the count of target tokens is shared: as in `Trainer.compute_loss`."""
        if not self.args.average_tokens_across_devices:
            return 1
        return int(self.accelerator.num_processes) // int(self.get_tp_size())


def _check_recipe_data(args: DistillationArguments, teacher: Any, have_rows: list[bool | None]) -> None:
    if True in have_rows:
        raise ValueError(
            f"{_WHERE}: recipe is {args.recipe!r} with data that have {' and '.join(_ROWS)}; expected none"
        )
    if teacher is None and (wants := args.recipe_loss().reference) is not None:
        raise ValueError(f"{_WHERE}: teacher_model is None; the recipe {args.recipe!r} takes its logits ({wants})")


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
