"""Papers 1, 81: the facts' golden rows, and definitions over batches with masks."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from recipe_case import B, Case, S, T, Y, batch, double, logprob, pick, row
from torch import Tensor

from kldiv_kernels.recipes.schedules import SafeController

IDS = torch.tensor([[Y]])
ONE = {
    "logits": row(S), "token_ids": IDS, "advantages": double(0.0), "old_logprobs": logprob(row(B), IDS),
    "reference_logprobs": logprob(row(T), IDS),
}  # fmt: skip
BATCH = batch(sequences=6, tokens=9, seed=23)
SAMPLED = pick(BATCH, "logits", "token_ids", "advantages", "old_logprobs", "mask")
# Far below, so that the KL is above the limit.
SAFE = SAMPLED | {"reference_logprobs": BATCH["teacher_logprobs"] - 2}
SPINE = {"low_coef": 0.4, "high_coef": 0.7}
WANTED = {"low_coef": 0.1, "high_coef": 0.2}


def tight() -> SafeController:
    controller = SafeController(threshold=0.2, momentum=0.4, penalty_coef=0.7, bounds=(0.05, 0.6))
    controller.record(0.9)
    return controller


def entropies(logits: Tensor) -> Tensor:
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def ppo(log_ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    ratio, a = log_ratio.exp(), advantages[:, None]
    return torch.maximum(-ratio * a, -ratio.clamp(1 - clip, 1 + clip) * a)


def safe(logits: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor, reference_logprobs: Tensor,
         mask: Tensor, controller: SafeController, rollout_entropy: float | None = None, entropy_coef: float = 0.01,
         clip: float = 0.2, detach_penalty: bool = True, normalizer: float | None = None) -> Tensor:  # fmt: skip
    logp, entropy, count = logprob(logits, token_ids), entropies(logits), normalizer or mask.sum()
    kl = (logp - reference_logprobs)[mask].mean()
    kl = kl.detach() if detach_penalty else kl
    held = entropy[mask].mean().item() if rollout_entropy is None else rollout_entropy
    moved = 0.4 * 0.54 + 0.6 * kl
    penalty = 0.7 * (moved - 0.2).clamp(min=0) ** 2 * max(0.5, 2.0 / (held + 0.1))
    loss = (ppo(logp - old_logprobs, advantages, clip) - entropy_coef * entropy)[mask].sum() / count
    return loss + penalty * mask.sum() / count


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float = 0.2, huber: float = 0.5) -> Tensor:
    def h(x: Tensor) -> Tensor:
        return torch.where(x.abs() <= huber, x.square() / 2, huber * (x.abs() - huber / 2))

    held = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    return (h(values - returns) + h(held - returns)).mean() / 2


def otsu(values: list[float]) -> float:
    """The cut between two of a hundred bins with the least variance inside both sides; the middle of several."""
    low, high = min(values), max(values)
    if low == high:
        return low
    places = [min(int((x - low) / (high - low) * 100), 99) for x in values]
    spreads = {}
    for cut in range(100):
        sides = [[x for x in places if x <= cut], [x for x in places if x > cut]]
        spreads[cut] = sum(len(side) * statistics.pvariance(side) for side in sides if side)
    best = [cut for cut, spread in spreads.items() if spread <= min(spreads.values()) + 1e-9]
    return low + (high - low) / 100 * (sum(best) / len(best) + 1)


def quantile(values: list[float], level: float) -> float:
    ordered, position = sorted(values), level * (len(values) - 1)
    below, above = ordered[math.floor(position)], ordered[math.ceil(position)]
    return below + (above - below) * (position - math.floor(position))


def spine(logits: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor, mask: Tensor, low_coef: float,
          high_coef: float, reference_logits: Tensor | None = None, kl_coef: float = 0.0, threshold: str = "top",
          fraction: float = 0.2, band: tuple[float, float] = (0.1, 0.5), clip: float = 0.2) -> Tensor:  # fmt: skip
    entropy, policy = entropies(logits), ppo(logprob(logits, token_ids) - old_logprobs, advantages, clip)
    chosen, beyond = [], []
    for i, kept in enumerate(mask):
        own = {t: entropy[i, t].item() for t in kept.nonzero()[:, 0].tolist()}
        if threshold == "top":
            wanted = max(int(fraction * len(own)), 1)
            places = sorted(own, key=lambda t: -own[t])[:wanted]
            low, high = (quantile([own[t] for t in places], level) for level in band)
        else:
            cut = otsu(list(own.values()))
            places = [t for t in own if own[t] >= cut]
            high = statistics.median(own[t] for t in places)
            low = max(0.0, high - max(1e-6, 1.4826 * statistics.median(abs(own[t] - high) for t in places)))
        for t in places:
            chosen.append((i, t))
            h = entropy[i, t]
            # A bound that is the entropy of a token, as quantiles are, has that token inside.
            if h < low:
                beyond.append(low_coef * (low - h))
            elif h > high:
                beyond.append(high_coef * (h - high))
    count = mask.sum()
    loss = sum(policy[place] for place in chosen) / count
    loss = loss + sum(beyond) / (len(chosen) if threshold == "top" else count)
    if reference_logits is not None:
        q, p = logits.log_softmax(-1), reference_logits.log_softmax(-1)
        kl = (q.exp() * (q - p)).sum(-1)
        loss = loss + kl_coef * sum(kl[place] for place in chosen) / len(chosen)
    return loss


def band(entropy: Tensor, selected: Tensor, low: Any, high: Any, low_coef: float, high_coef: float) -> Tensor:
    out = torch.zeros_like(entropy)
    for i, t in selected.nonzero().tolist():
        h = entropy[i, t]
        if h < low[i]:
            out[i, t] = low_coef * (low[i] - h)
        if h > high[i]:
            out[i, t] = high_coef * (h - high[i])
    return out


KL_CASES = SPINE | {"kl_coef": 0.3, "clip": 0.1}
REFERENCE = SAMPLED | {"reference_logits": BATCH["teacher_logits"]}
CASES = [
    Case("safe_loss", SAFE, {"controller": tight()}, expected=safe, roles=("old_logprobs", "reference_logprobs")),
    Case("safe_loss", SAFE, {"controller": tight(), "detach_penalty": False, "clip": 0.1, "entropy_coef": 0.1},
         expected=safe, roles=("old_logprobs", "reference_logprobs"), reads="R0+f", name="gradient"),
    Case("safe_loss", SAFE, {"controller": tight(), "detach_penalty": False, "rollout_entropy": 4.4,
         "normalizer": 60.0}, expected=safe, reads="R0+f", name="over-ranks"),
    Case("safe_loss", ONE, {"controller": SafeController(), "entropy_coef": 1.0}, value=-0.8782811753,
         gradients={"logits": [0.3805649828, -0.1527515387, -0.0871141654, -0.1406992786]}, name="golden"),
    Case("soft_min", {"values": torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]]).double()}, {"temperature": 0.4},
         expected=lambda values, temperature: -temperature * (-values / temperature).exp().mean(-1).log(),
         trained=("values",), reads="none"),
    Case("safe_value_loss", {"values": double(0.1, 0.9, -1.4, 2.0), "old_values": double(0.2, 0.1, -1.0, 1.95),
         "returns": double(0.0, 1.0, 0.4, 0.1)}, expected=value_loss, trained=("values",), reads="none"),
    Case("spine_loss", SAMPLED, SPINE | {"fraction": 0.5}, expected=spine),
    Case("spine_loss", SAMPLED, SPINE | {"fraction": 1.0, "band": (0.3, 0.4)}, expected=spine, name="all"),
    Case("spine_loss", SAMPLED, SPINE | {"threshold": "otsu"}, expected=spine, name="otsu"),
    Case("spine_loss", REFERENCE, KL_CASES | {"fraction": 0.5}, expected=spine, name="kl",
         roles=("logits", "reference_logits")),
    Case("spine_loss", REFERENCE, KL_CASES | {"threshold": "otsu"}, expected=spine, name="otsu-kl",
         roles=("logits", "reference_logits")),
    Case("entropy_band", {"entropy": entropies(BATCH["logits"]), "selected": BATCH["mask"],
         "low": double(0.9, 1.0, 1.1, 1.2, 0.2, 0.4), "high": double(1.2, 1.3, 1.4, 1.5, 0.6, 0.9)}, WANTED,
         expected=band, trained=("entropy",), reads="none"),
]  # fmt: skip
