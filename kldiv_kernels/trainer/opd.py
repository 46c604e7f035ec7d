"""`OnPolicyTrainer`: the student writes, the teacher scores what it wrote. On-policy distillation and its relatives.

    block of text -> its first tokens -> the student samples a completion -> both models read it -> recipe -> gradient

Everything else is `DistillationTrainer`'s, the held-out evaluation on text included. All models have one vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kldiv_kernels.adapters import tensor_parallel
from kldiv_kernels.choices import Backend
from kldiv_kernels.distillation import IGNORED
from kldiv_kernels.stats import token_stats
from kldiv_kernels.trainer.arguments import DistillationArguments
from kldiv_kernels.trainer.distillation import DistillationTrainer
from kldiv_kernels.trainer.recipe_loss import RecipeLoss
from kldiv_kernels.trainer.recipe_options import ON_POLICY, named_function
from kldiv_kernels.trainer.sampling import ends_of, sampled, up_to_the_end

SAMPLED_KL = "sampled_kl"


@dataclass
class OnPolicyArguments(DistillationArguments):
    """`DistillationArguments` and what is sampled. `recipe`: opd, vopd, gopd or tsd_kd; default opd."""

    recipes: ClassVar[tuple[str, ...]] = tuple(ON_POLICY)

    recipe: str | None = field(default="opd", metadata={"help": "The loss: opd, vopd, gopd or tsd_kd."})
    prompt_length: int = field(default=32, metadata={"help": "Tokens of a block that the student goes on from."})
    completion_length: int = field(default=64, metadata={"help": "Tokens that it writes at most."})
    sampling_temperature: float = field(default=1.0, metadata={"help": "Of the student as it writes."})

    def __post_init__(self) -> None:
        for name in ("prompt_length", "completion_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"OnPolicyArguments: {name} is {getattr(self, name)}; expected at least 1")
        if not 0 < self.sampling_temperature < float("inf"):
            raise ValueError(
                f"OnPolicyArguments: sampling_temperature is {self.sampling_temperature}; expected above 0 and finite"
            )
        if self.recipe is None:
            raise ValueError(f"OnPolicyArguments: recipe is None; expected {', '.join(ON_POLICY)}")
        super().__post_init__()

    def recipe_loss(self) -> RecipeLoss:
        function, options = named_function("OnPolicyArguments", str(self.recipe), ON_POLICY)
        return RecipeLoss(function, {**options, **self.recipe_options})


class OnPolicyTrainer(DistillationTrainer):
    """Distils `teacher_model` into `model` on completions that `model` samples.

    Args:
        args: `OnPolicyArguments`. base_model: of the recipe gopd, frozen, such as the student before training; no other
            recipe takes one.
        others: as for `DistillationTrainer`. Of a row of the training data the first `prompt_length` tokens are used.

    `sampled_kl` in the logs is KL(student ‖ teacher) on the completions, the mean over their tokens since the line
    before, in nats.

    Raises ValueError for a block that is shorter than the prompt, for a model that is tensor parallel, and for what
    does not go together.
    """

    args: OnPolicyArguments

    def __init__(
        self, model: PreTrainedModel, teacher_model: PreTrainedModel | None, args: OnPolicyArguments, *,
        base_model: PreTrainedModel | None = None, **options: Any,
    ) -> None:  # fmt: skip
        where, wants = "OnPolicyTrainer", args.recipe_loss().takes("base_logits")
        if teacher_model is None:
            raise ValueError(f"{where}: teacher_model is None; it scores what the student writes")
        if wants != (base_model is not None):
            state, expected = ("None", "one") if wants else ("given", "none")
            raise ValueError(f"{where}: base_model is {state}, with the recipe {args.recipe!r}; expected {expected}")
        tensor_parallel.refuse(
            where, "and its ranks would each sample other completions", model=model, teacher_model=teacher_model,
            base_model=base_model,
        )  # fmt: skip
        super().__init__(model, teacher_model, args, **options)
        self.base_model = None
        if base_model is not None:
            base_model.requires_grad_(False)
            self.base_model = self.accelerator.prepare_model(base_model, evaluation_mode=True).eval()
        # Sums on the device, of the divergence and of the tokens since the last line of the log.
        self._sampled: list[Tensor] = []

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        prompts = inputs["input_ids"]
        length = self.args.prompt_length
        if prompts.shape[1] < length:
            raise ValueError(
                f"OnPolicyTrainer: blocks have {prompts.shape[1]} tokens; expected prompt_length = {length}"
            )
        sequences = self._written(model, prompts[:, :length])
        completions = sequences[:, length:]
        written = up_to_the_end(completions, ends_of(self.accelerator.unwrap_model(model)))
        labels = torch.where(written, completions, IGNORED)
        outputs = model(input_ids=sequences, use_cache=False)
        # A view: the position before a token predicts it.
        logits = outputs.logits[:, length - 1 : -1]
        with torch.no_grad():
            teacher, base = (
                None if other is None else other(input_ids=sequences, use_cache=False).logits[:, length - 1 : -1]
                for other in (self.teacher_model, self.base_model)
            )
            self._note(logits, teacher, labels)
        loss = self.args.recipe_loss()(
            logits, teacher, labels, base_logits=base, vocab_size=self.vocab_size, backend=self.args.backend,
            ignore_index=IGNORED,
        )  # fmt: skip
        # How long completions are is not known before: the mean over a micro-batch's tokens, and over micro-batches.
        loss = loss / self._micro_batches()
        return (loss, outputs) if return_outputs else loss

    def _written(self, model: torch.nn.Module, prompts: Tensor) -> Tensor:
        """Prompts with the student's completions, [batch, prompt_length + completion_length]."""
        return sampled(
            self.accelerator.unwrap_model(model), prompts, torch.ones_like(prompts),
            length=self.args.completion_length, temperature=self.args.sampling_temperature,
        )  # fmt: skip

    def _note(self, logits: Tensor, teacher: Tensor | None, labels: Tensor) -> None:
        mask, backend = labels != IGNORED, cast(Backend, self.args.backend)
        kl = token_stats(
            logits, teacher, stats=("reverse_kl",), mask=mask, vocab_size=self.vocab_size, backend=backend
        ).reverse_kl
        self._sampled.append(torch.stack([kl.sum().double(), mask.sum().double()]))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._sampled and "loss" in logs:
            total = self.accelerator.reduce(torch.stack(self._sampled).sum(0).float(), "sum")
            logs = {**logs, SAMPLED_KL: (total[0] / total[1].clamp_min(1)).item()}
            self._sampled.clear()
        super().log(logs, *args, **kwargs)
