"""The reference becomes the policy where held-out pairs get no better: `ReferenceReset`, through checkpoints too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback, TrainerControl, TrainerState

import kldiv_kernels as kk

_STATE, _WEIGHTS = "reference_reset.json", "reference"


def takes_weights(reference: PreTrainedModel, policy: PreTrainedModel) -> bool:
    """Whether the reference has weights of the policy's names and shapes."""
    ours, theirs = ({name: x.shape for name, x in model.state_dict().items()} for model in (reference, policy))
    return ours == theirs


class ResetReference(TrainerCallback):
    """Resets `reference` after `patience` evaluations whose `eval_loss` is not below the best since the last reset.

    Raises ValueError where it has other weights than the policy.
    """

    def __init__(self, policy: PreTrainedModel, reference: PreTrainedModel, patience: int) -> None:
        if not takes_weights(reference, policy):
            raise ValueError(
                f"PreferenceTrainer: reset_patience is {patience}, but the reference is not of the model's "
                "architecture; expected None, or a reference that can take its weights"
            )
        self.reference, self.rule, self.count = reference, kk.recipes.schedules.ReferenceReset(patience), 0

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any = None, **given: Any
    ) -> None:
        # Behind the last step there is nothing to train towards it.
        if state.global_step < state.max_steps and self.rule.update(-metrics["eval_loss"]):
            self.rule.apply(given["model"], self.reference, given["optimizer"])
            self.count += 1

    def save(self, checkpoint: Path) -> None:
        checkpoint.mkdir(parents=True, exist_ok=True)
        if self.count:
            self.reference.save_pretrained(checkpoint / _WEIGHTS)
        state = {**self.rule.state_dict(), "count": self.count}
        (checkpoint / _STATE).write_text(json.dumps(state), encoding="utf-8")

    def load(self, checkpoint: Path) -> None:
        state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        self.rule.load_state_dict(state)
        self.count = state["count"]
        if self.count:
            kept: Any = AutoModelForCausalLM.from_pretrained(checkpoint / _WEIGHTS, dtype=self.reference.dtype)
            self.reference.load_state_dict(kept.state_dict())
