"""`PreferenceTrainer`: of two answers to a prompt the chosen one becomes likelier, by DPO or a relative of it.

    prompt, chosen, rejected -> both models read both answers -> recipe -> gradient
    prompt -> the policy (hypo) or the reference (xpo) writes an answer -> both read it, for these recipes too

The reference is a frozen model of the policy's vocabulary, as a rule the policy before training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel

import kldiv_kernels as kk
from kldiv_kernels.choices import Backend
from kldiv_kernels.distillation import IGNORED
from kldiv_kernels.stats import token_stats
from kldiv_kernels.trainer import pairs
from kldiv_kernels.trainer.arguments import DistillationArguments
from kldiv_kernels.trainer.distillation import DistillationTrainer
from kldiv_kernels.trainer.pair_loss import PairBatch, PairLoss, Samples
from kldiv_kernels.trainer.recipe_loss import RecipeFunction
from kldiv_kernels.trainer.recipe_options import PREFERENCE, named_function
from kldiv_kernels.trainer.reference_reset import ResetReference
from kldiv_kernels.trainer.sampling import ends_of, sampled, up_to_the_end

ACCURACY, MARGIN, KL = "accuracy", "reward_margin", "policy_kl"
_COLUMNS = ("prompt_ids", *(f"{name}_{part}" for name in pairs.ANSWERS for part in ("ids", "start", "phrases")))


@dataclass
class PreferenceArguments(DistillationArguments):
    """`DistillationArguments` and what is sampled. `recipe`: tdpo, dpo, f_dpo, hypo, rrpo or xpo; default tdpo."""

    recipes: ClassVar[tuple[str, ...]] = tuple(PREFERENCE)

    recipe: str | None = field(default="tdpo", metadata={"help": f"The loss: {', '.join(PREFERENCE)}."})
    completion_length: int = field(default=64, metadata={"help": "Tokens that hypo and xpo have written at most."})

    reset_patience: int | None = field(
        default=None,
        metadata={"help": "Evaluations without a lower eval_loss after which the reference becomes the policy."},
    )

    def __post_init__(self) -> None:
        for name in ("completion_length", "reset_patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"PreferenceArguments: {name} is {value}; expected at least 1")
        if self.recipe is None:
            raise ValueError(f"PreferenceArguments: recipe is None; expected {', '.join(PREFERENCE)}")
        super().__post_init__()

    def recipe_function(self) -> RecipeFunction:
        return self.pair_loss()

    def pair_loss(self) -> PairLoss:
        function, options = named_function("PreferenceArguments", str(self.recipe), PREFERENCE)
        return PairLoss(function, {**options, **self.recipe_options})


class PreferenceTrainer(DistillationTrainer):
    """Trains `model` on pairs of answers, relative to `reference_model`.

    Args:
        args: `PreferenceArguments`. reference_model: frozen, of the same vocabulary, such as the model before training.
        others: as for `DistillationTrainer`. Rows are those of `kldiv_kernels.trainer.pairs.load_pairs`.

    The logs have, as means since the line before, and of held-out pairs with `eval_` before the name:

    - `reward_margin`: β·(log π/π_ref of the chosen answer − that of the rejected one), the mean over pairs;
    - `accuracy`: the share of pairs where it is above 0, and half of those where it is 0: ½ at the reference itself;
    - `policy_kl`: KL(policy ∥ reference), the mean over the tokens of both answers, in nats.

    `eval_loss` is −log σ(reward_margin), the mean over held-out pairs, whatever the recipe.

    With `args.reset_patience` the reference becomes the policy where `eval_loss` gets no lower
    (`kk.recipes.schedules.ReferenceReset`), and the optimiser starts anew. `reference_resets` in the logs counts them.

    Raises ValueError for what does not go together.
    """

    args: PreferenceArguments

    def __init__(
        self, model: PreTrainedModel, reference_model: PreTrainedModel | None, args: PreferenceArguments, *,
        data_collator: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        if reference_model is None:
            raise ValueError("PreferenceTrainer: reference_model is None; rewards are relative to it")
        super().__init__(model, reference_model, args, data_collator=data_collator or pairs.collate, **options)
        # Sums on the device since the last line of the log.
        self._sums: list[Tensor] = []
        self.reset: ResetReference | None = None
        if args.reset_patience is not None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError(
                    f"PreferenceTrainer: reset_patience is {args.reset_patience}; expected None under FSDP and "
                    "DeepSpeed, where a rank has not the whole policy"
                )
            frozen = self.accelerator.unwrap_model(self.teacher_model)
            self.reset = ResetReference(self.accelerator.unwrap_model(model), frozen, args.reset_patience)
            self.add_callback(self.reset)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        batch, outputs = self._batch(model, inputs)
        rewards = self._numbers(batch)
        margins = rewards[:, 0] - rewards[:, 1]
        each = [torch.ones_like(margins), _preferred(margins), margins, *rewards[:, 2:].T]
        self._sums.append(torch.stack(each).sum(-1))
        # The mean over a micro-batch's pairs, and over micro-batches.
        loss = self.args.pair_loss()(batch) / self._micro_batches()
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """What `_numbers` has of each pair, [batch, 4]; how many pairs it is, ones of [batch, 1]."""
        with torch.no_grad(), self.compute_loss_context_manager():
            batch, _ = self._batch(model, self._prepare_inputs(dict(inputs)), samples=False)
            found = self._numbers(batch)
        return None, found, torch.ones_like(found[:, :1])

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._sums and "loss" in logs:
            total = self.accelerator.reduce(torch.stack(self._sums).sum(0).float(), "sum")
            count, correct, margin, kl, tokens = total.tolist()
            logs = {**logs, ACCURACY: correct / count, MARGIN: margin / count, KL: kl / max(1.0, tokens)}
            if self.reset is not None:
                logs["reference_resets"] = self.reset.count
            self._sums.clear()
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.reset is not None and self.is_world_process_zero():
            # First: a checkpoint is whole when the Trainer's own last file is there.
            self.reset.save(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}")
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.reset is not None:
            self.reset.load(Path(resume_from_checkpoint))

    def _batch(
        self, model: torch.nn.Module, inputs: Mapping[str, Any], *, samples: bool = True
    ) -> tuple[PairBatch, Any]:
        outputs, reference = self._read(model, inputs["input_ids"], inputs["attention_mask"])
        phrases = inputs.get("phrases")
        who = self.args.pair_loss().writer if samples else None
        batch = PairBatch(
            outputs.logits, reference, _shifted(inputs["labels"], IGNORED), self.vocab_size,
            cast(Backend, self.args.backend), None if phrases is None else _shifted(phrases, 0),
            None if who is None else self._samples(model, model if who == "policy" else self.teacher_model, inputs),
        )  # fmt: skip
        return batch, outputs

    def _read(self, model: torch.nn.Module, tokens: Tensor, mask: Tensor) -> tuple[Any, Tensor]:
        """The policy's outputs, and the reference's logits. Padding stands on the right, where nothing looks at it."""
        outputs = model(input_ids=tokens, attention_mask=mask, use_cache=False)
        assert self.teacher_model is not None
        with torch.no_grad():
            reference: Tensor = self.teacher_model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        return outputs, reference

    def _samples(self, model: torch.nn.Module, writer: Any, inputs: Mapping[str, Any]) -> Samples:
        """One answer to each prompt, by `writer`, as both models see it."""
        prompts, mask = inputs["prompt_ids"], inputs["prompt_mask"]
        unwrapped: Any = self.accelerator.unwrap_model(writer)
        tokens = sampled(unwrapped, prompts, mask, length=self.args.completion_length)
        written = up_to_the_end(tokens[:, prompts.shape[1] :], ends_of(unwrapped))
        tokens, known, answers = _to_the_right(tokens, mask, written)
        labels = _shifted(torch.where(answers, tokens, IGNORED), IGNORED)
        outputs, reference = self._read(model, tokens, known.long())
        valid = labels != IGNORED
        stats = token_stats(
            outputs.logits, reference, torch.where(valid, labels, 0), stats=("logprob", "reference_logprob"),
            mask=valid, vocab_size=self.vocab_size, backend=cast(Backend, self.args.backend),
        )  # fmt: skip
        return Samples(stats.logprob, stats.reference_logprob, valid)

    @torch.no_grad()
    def _numbers(self, batch: PairBatch) -> Tensor:
        """Of each pair: rewards of chosen and rejected, Σ KL(policy ∥ reference), number of tokens; [batch, 4]."""
        names = ("logprob", "reference_logprob", "reverse_kl")
        stats, valid = kk.recipes.lists.pair_statistics(
            batch.logits, batch.reference_logits, batch.labels, names, vocab_size=batch.vocab_size,
            backend=batch.backend,
        )  # fmt: skip
        # Statistics are 0 where no token counts.
        rewards = self.args.pair_loss().beta * (stats.logprob - stats.reference_logprob).sum(-1)
        sums = [sum(x.sum(-1).chunk(2)) for x in (stats.reverse_kl, valid)]
        return torch.stack([*rewards.chunk(2), *sums], dim=-1).double()  # type: ignore[list-item]

    def _held_out_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        chosen, rejected, kl, tokens = np.asarray(prediction.predictions, dtype=np.float64).T
        margins = chosen - rejected
        return {
            "loss": float(np.logaddexp(0, -margins).mean()),
            ACCURACY: float(_preferred(margins).mean()),
            MARGIN: float(margins.mean()),
            KL: float(kl.sum() / max(1.0, tokens.sum())),
        }

    def _set_signature_columns_if_needed(self) -> None:
        """Columns of pairs are no arguments of the model, and would be dropped as unused."""
        self._signature_columns = list(_COLUMNS)  # type: ignore[assignment]


def measured(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a summary has of the held-out evaluations."""
    found = [entry for entry in history if "eval_loss" in entry]
    first, last = found[0], found[-1]
    return {
        "held_out_loss": last["eval_loss"],
        "held_out_accuracy": {"before": first[f"eval_{ACCURACY}"], "after": last[f"eval_{ACCURACY}"]},
        "held_out_reward_margin": last[f"eval_{MARGIN}"],
        "policy_reference_kl": last[f"eval_{KL}"],
    }


def _preferred(margins: Any) -> Any:
    """1 where the chosen answer is, ½ where neither is; of a tensor or an array."""
    return (margins > 0) + 0.5 * (margins == 0)


def _shifted(x: Tensor, value: int) -> Tensor:
    """What stands at the next position; the logits of the last one predict nothing."""
    return torch.nn.functional.pad(x[:, 1:], (0, 1), value=value)


def _to_the_right(tokens: Tensor, mask: Tensor, written: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, bool of those that are there, bool of those of answers), with padding on the right in place of the left.

    tokens: [batch, P + U]. mask: [batch, P], of the prompts. written: [batch, U], of the answers.
    """
    length = tokens.shape[1]
    prompts = mask != 0
    places = torch.arange(length, device=tokens.device) + (~prompts).sum(-1, keepdim=True)
    inside, places = places < length, places.clamp_max(length - 1)
    answers = torch.cat([torch.zeros_like(prompts), written], dim=-1).gather(1, places) & inside
    known = torch.cat([prompts, written], dim=-1).gather(1, places) & inside
    return tokens.gather(1, places), known, answers
