"""What GRPOTrainer logs, under TRL's names and as the same means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import nanmax, nanmin

from kldiv_kernels.parallel import Group
from kldiv_kernels.policy import CLIPPED, PolicyLoss, PolicyOptions, highest_entropy, level_log_ratio, ratio_bounds

_TRL_NAMES = {"entropy": "entropy", "kl": "kl", "exact_kl": "kl"}
# With the smallest or largest of a mean over the tokens of each sequence.
_EXTREMES = {
    "clip_ratio/low_mean": ("clip_ratio/low_min", nanmin),
    "clip_ratio/high_mean": ("clip_ratio/high_max", nanmax),
}


@dataclass(frozen=True)
class Batch:
    """One call of policy_loss, its mask [B, T] and its batch_group."""

    out: PolicyLoss
    options: PolicyOptions
    inputs: Mapping[str, Any]
    mask: Tensor
    batch_group: Group | None = None

    @property
    def entropy_of_kept(self) -> Tensor:
        """[2]: the sum of the entropies that the bonus acts on, and their number."""
        if self.options.entropy_quantile < 1:
            quantile = self.options.entropy_quantile
            kept = highest_entropy(self.out.entropy, self.mask != 0, quantile, self.batch_group)
            return torch.stack([torch.where(kept, self.out.entropy, 0.0).sum(), kept.sum()])
        tokens = self.out.metrics["tokens"]
        return torch.stack([self.out.metrics["entropy"] * tokens, tokens])

    @property
    def log_ratio(self) -> Tensor:
        """[B, T], 0 where masked, and everywhere on-policy."""
        old = self.inputs.get("old_per_token_logps")
        if old is None:
            return torch.zeros(self.mask.shape, device=self.mask.device)
        return torch.where(self.mask != 0, self.out.logprob - old, 0.0)

    @property
    def ratio(self) -> Tensor:
        """[B, 1] at a sequence level with one advantage a sequence, else [B, T]: what the clip bounds."""
        level = level_log_ratio(self.log_ratio, self.mask, self.options)
        one = self.options.importance_level != "token" and self.inputs["advantages"].dim() == 1
        return (level[:, :1] if one else level).exp()

    @property
    def advantages(self) -> Tensor:
        advantages: Tensor = self.inputs["advantages"]
        return advantages[:, None] if advantages.dim() == 1 else advantages


def log(trainer: Any, batch: Batch, metrics: Any) -> None:
    """Appends this call's means over all processes to `metrics`, the lists that TRL averages when it logs."""
    count, local = batch.out.metrics["tokens"], {}
    for name, value in batch.out.metrics.items():
        if name in _TRL_NAMES:
            local[_TRL_NAMES[name]] = torch.stack([value * count, count])
        elif name.startswith("clip_fraction_") and batch.options.loss_type != "cispo":
            local[name.replace("clip_fraction_", "clip_ratio/") + "_mean"] = torch.stack([value * count, count])
    # In place of those means, with what else TRL makes of them.
    for name, value in _of_loss_type(trainer, batch).items():
        # One value a sequence is a mean over sequences, as in TRL.
        per_sequence = value.shape[1] == 1
        weight = torch.ones_like(value) if per_sequence else (batch.mask != 0).to(value.dtype)
        local[name] = torch.stack([(value * weight).sum(), weight.sum()])
        if name in _EXTREMES:
            extreme, of = _EXTREMES[name]
            # A sequence without tokens gives NaN, which neither extreme looks at.
            metrics[extreme].append(of(trainer.accelerator.gather((value * weight).sum(-1) / weight.sum(-1))).item())
    totals = trainer.accelerator.reduce(torch.stack(list(local.values())).float(), reduction="sum")
    for name, mean in zip(local, (totals[:, 0] / totals[:, 1].clamp(min=1)).tolist(), strict=True):
        metrics[name].append(mean)


def _of_loss_type(trainer: Any, batch: Batch) -> dict[str, Tensor]:
    """Per token, or per sequence [B, 1]."""
    options, advantages = batch.options, batch.advantages
    if options.loss_type in CLIPPED:
        low, high = ratio_bounds(options)
        # TRL looks at the ratio after its other bound.
        ratio = batch.ratio.clamp(max=options.delta)
        below, above = (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)
        return {
            "clip_ratio/low_mean": below.float(), "clip_ratio/high_mean": above.float(),
            "clip_ratio/region_mean": (below | above).float(),
        }  # fmt: skip
    if options.loss_type == "cispo":
        above = (batch.ratio > ratio_bounds(options)[1]) & (advantages > 0)
        return {"cispo_clip_ratio": above.float()}
    if options.loss_type == "vespo":
        phi = trainer.get_gamma_weights(
            advantages, batch.log_ratio, batch.mask, batch.inputs.get("importance_sampling_ratio"),
            *options.vespo_positive, *options.vespo_negative,
        )  # fmt: skip
        return {"vespo/phi_seq_mean": phi}
    return {}
