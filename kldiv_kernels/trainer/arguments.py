"""The arguments of `DistillationTrainer`: those of transformers, and the options of the loss or of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from transformers import TrainingArguments

from kldiv_kernels.distillation import LossOptions
from kldiv_kernels.trainer.recipe_loss import RecipeFunction, RecipeLoss
from kldiv_kernels.trainer.recipe_options import DISTILLATION, function_of


@dataclass
class DistillationArguments(TrainingArguments):
    """`transformers.TrainingArguments` and the options of the loss; see `kldiv_kernels.divergence_loss`.

    With `recipe` the loss is that function of `kldiv_kernels.recipes`, and kind, ce_weight, temperature and tail say
    nothing.

    Raises ValueError, naming the argument, for a value that the loss does not allow.
    """

    # Functions that `recipe` may be.
    recipes: ClassVar[tuple[str, ...]] = DISTILLATION

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
    fused_linear: bool | None = field(
        default=None,
        metadata={
            "help": "Loss from hidden states, without the logits in memory; default: where both heads are plain."
        },
    )
    recipe: str | None = field(
        default=None,
        metadata={"help": "Function of kldiv_kernels.recipes in place of the loss, such as asft_loss."},
    )
    recipe_options: dict[str, Any] = field(default_factory=dict, metadata={"help": "Its options by name."})
    backend: str = field(default="auto", metadata={"help": "Backend of kldiv_kernels."})
    # The Trainer would report a running average in place of a NaN or infinite loss, and so hide it.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Leave NaN and inf out of logged losses."})

    def __post_init__(self) -> None:
        where = "DistillationArguments"
        self.loss_options().check(where)
        if self.recipe is not None:
            if self.recipe not in self.recipes:
                self.recipe = function_of(where, self.recipe, self.recipes)
            self.recipe_function().check(where)
            if self.fused_linear:
                raise ValueError(f"{where}: fused_linear is True, but the recipe {self.recipe!r} takes logits")
        elif self.recipe_options:
            raise ValueError(f"{where}: recipe_options is {self.recipe_options}, without a recipe; expected none")
        super().__post_init__()  # type: ignore[no-untyped-call]

    def loss_options(self) -> LossOptions:
        return LossOptions(**{option.name: getattr(self, option.name) for option in fields(LossOptions)})

    def recipe_function(self) -> RecipeFunction:
        """The recipe with its options, where there is one."""
        return self.recipe_loss()

    def recipe_loss(self) -> RecipeLoss:
        return RecipeLoss(str(self.recipe), self.recipe_options)
