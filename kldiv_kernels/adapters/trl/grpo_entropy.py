"""GRPOConfig's entropy bonus: its coefficient, which TRL's adaptive mode moves towards a target entropy."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kldiv_kernels.adapters.trl.grpo_metrics import Batch


def coefficient(trainer: Any) -> float:
    """The coefficient of this optimiser step: 0 while the adaptive mode finds the entropy high enough."""
    if trainer.use_adaptive_entropy and not trainer._last_world_entropy <= trainer.args.entropy_target:
        return 0.0
    value: float = trainer.entropy_coef
    return value


def loss_without_bonus(batch: Batch, weight: float) -> Tensor:
    """The loss, to which the bonus added −weight·(mean entropy)."""
    total, count = batch.entropy_of_kept
    loss: Tensor = batch.out.loss.detach() + weight * total / count.clamp(min=1)
    return loss


def update(trainer: Any, batch: Batch, metrics: Any) -> None:
    """After a micro-batch in training: gathers entropy, and at the end of the step moves the coefficient.

    The attributes are the trainer's own, so that its state is TRL's.
    """
    end_of_step = trainer.accelerator.sync_gradients
    if trainer.use_adaptive_entropy:
        gathered, args = trainer._entropy_window_stats, trainer.args
        now = batch.entropy_of_kept.detach()
        trainer._entropy_window_stats = now if gathered is None else gathered + now
        if end_of_step:
            total, count = trainer.accelerator.reduce(trainer._entropy_window_stats, reduction="sum")
            mean = (total / count.clamp(min=1)).item()
            if mean <= args.entropy_target:
                trainer.entropy_coef = min(trainer.entropy_coef + args.entropy_coef_delta, args.entropy_coef_max)
            else:
                trainer.entropy_coef = max(trainer.entropy_coef - args.entropy_coef_delta, args.entropy_coef_min)
            trainer._last_world_entropy, trainer._entropy_window_stats = mean, None
    if end_of_step:
        metrics["entropy_coef"].append(trainer.entropy_coef)
