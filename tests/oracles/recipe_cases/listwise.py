"""Papers 26, 48, 82: the facts' golden rows, and definitions place by place and prompt by prompt."""

from __future__ import annotations

import math

import torch
from recipe_case import Case, S, T, batch, double, pick, row
from torch import Tensor

ROW = {"logits": row(S)[0], "teacher_logits": row(T)[0]}
BATCH = batch(sequences=5, tokens=4, vocab=9, seed=27)
CLASSES = pick(BATCH, "logits", "teacher_logits", "mask") | {"labels": BATCH["token_ids"]}
ROLES = ("logits", "teacher_logits")
GROUPS = torch.tensor([4, 4, 4, -1, -1, 7])
SCORES = double(0.3, -0.8, 1.1, 0.2, 0.4, -0.5)
ADVANTAGES = double(1.2, -7.0, 0.4, 0.9, -0.9, 0.3)
IN_GROUPS = {"scores": SCORES, "advantages": ADVANTAGES, "groups": GROUPS}
CANDIDATES = {
    "sequence_logprobs": double(-9.0, -8.2, -12.0, -3.0, -4.5, -2.0),
    "anchor_logprobs": double(-9.5, -8.0, -11.0, -3.5, -4.0, -2.5), "targets": double(0.7, 0.3, 0.0, 0.4, 0.6, 1.0),
    "groups": GROUPS,
}  # fmt: skip
REWARDS = {"rewards": double(1.0, 0.0, 0.5, 2.0, 2.0, 3.0), "groups": GROUPS}
DRAWN = torch.Generator().manual_seed(6)
VELOCITIES = {
    name: torch.randn(6, 2, 3, generator=DRAWN, dtype=torch.float64) for name in ("velocities", "reference_velocities")
}


def pld(logits: Tensor, teacher_logits: Tensor, labels: Tensor, mask: Tensor, weight_temperature: float = 4.0,
        k: int | None = None) -> Tensor:  # fmt: skip
    losses = []
    for s, t, y in zip(logits[mask], teacher_logits[mask], labels[mask].tolist(), strict=True):
        order = [y, *sorted((v for v in range(len(t)) if v != y), key=lambda v: -t[v].item())]
        weights = (t / weight_temperature).softmax(-1)
        loss = torch.zeros((), dtype=torch.float64)
        for place in range(len(order) if k is None else k):
            behind = torch.stack([s[v] for v in order[place:]])
            loss = loss + weights[order[place]] * (behind.logsumexp(-1) - s[order[place]])
        losses.append(loss)
    return torch.stack(losses).mean()


def members(groups: Tensor) -> list[list[int]]:
    return [[i for i, g in enumerate(groups.tolist()) if g == group] for group in sorted(set(groups.tolist()))]


def crd(scores: Tensor, advantages: Tensor, groups: Tensor, beta: float = 1.0, clip: float = 5.0,
        form: str = "mse") -> Tensor:  # fmt: skip
    a = advantages.clamp(-clip, clip) / (2 * clip) + 0.5
    losses = []
    for of_prompt in members(groups):
        r_mean, a_mean = scores[of_prompt].mean().detach(), a[of_prompt].mean()
        for i in of_prompt:
            x, wanted = beta * (scores[i] - r_mean), a[i] - a_mean
            if form == "mse":
                losses.append((x - wanted) ** 2)
            else:
                chance, target = x.sigmoid(), wanted.sigmoid()
                losses.append(-target * chance.log() - (1 - target) * (1 - chance).log())
    return clip / beta * torch.stack(losses).mean()


def anchor(velocities: Tensor, reference_velocities: Tensor, advantages: Tensor | None = None, kl_coef: float = 0.1,
           clip: float = 5.0) -> Tensor:  # fmt: skip
    losses, least = [], 1e-4 / kl_coef
    for i, (own, other) in enumerate(zip(velocities, reference_velocities, strict=True)):
        weight = torch.ones(())
        if advantages is not None:
            weight = least + (1 - least) * (advantages[i].clamp(-clip, clip) / (2 * clip) + 0.5)
        losses.append(weight * (own - other).square().mean())
    return kl_coef * torch.stack(losses).mean()


def adpo(sequence_logprobs: Tensor, anchor_logprobs: Tensor, targets: Tensor, groups: Tensor,
         tau: float | Tensor = 0.8) -> Tensor:  # fmt: skip
    u = (sequence_logprobs - anchor_logprobs) / tau
    losses = [-(targets[i] * u[i].log_softmax(-1)).sum() for i in members(groups)]
    return torch.stack(losses).mean()


def targets(rewards: Tensor, groups: Tensor, temperature: float = 0.5) -> Tensor:
    out = torch.zeros_like(rewards)
    for i in members(groups):
        own = rewards[i]
        spread = own.std() if len(i) > 1 and own.std() > 0 else 1.0
        out[i] = ((own - own.mean()) / spread / temperature).softmax(-1)
    return out


def warm(mean_logprobs: Tensor, rewards: Tensor, groups: Tensor, vocab_size: int, tau: float = 0.8,
         bounds: tuple[float, float] = (0.05, 5.0)) -> Tensor:  # fmt: skip
    out = torch.zeros_like(rewards)
    for of_prompt in members(groups):
        low, high = rewards[of_prompt].min().item(), rewards[of_prompt].max().item()
        for i in of_prompt:
            h = -mean_logprobs[i].item() / math.log(vocab_size)
            r = (rewards[i].item() - low) / (high - low) if high > low else 0.0
            out[i] = min(max(tau * (1 + 0.5 * h + 0.5 * (1 - h) * (1 - r)), bounds[0]), bounds[1])
    return out


LIKE = {"mean_logprobs": double(-0.1, -2.0, -4.0, -0.5, -0.7, -1.0)} | REWARDS
CASES = [
    Case("pld_loss", CLASSES, expected=pld, roles=ROLES),
    Case("pld_loss", CLASSES, {"weight_temperature": 0.7}, expected=pld, name="weights"),
    *(
        Case("pld_loss", CLASSES, {"weight_temperature": 1.5, "k": k}, expected=pld, roles=ROLES, reads="R1",
             name=f"first-{k}")
        for k in (1, 3, 9)
    ),
    Case("pld_loss", ROW | {"labels": torch.tensor([1])}, {"weight_temperature": 1.0}, value=1.0255819480,
         gradients={"logits": [0.3131592165, -0.4282732618, 0.0614978975, 0.0536161477]}, name="golden"),
    Case("pld_loss", ROW | {"labels": torch.tensor([0])}, {"weight_temperature": 1.0}, value=0.4486900776,
         gradients={"logits": [-0.0894827653, -0.1818573777, 0.1035135663, 0.1678265767]}, name="golden-wrong-teacher"),
    Case("pld_loss", ROW | {"labels": torch.tensor([0])}, value=0.3530990474, name="golden-4",
         gradients={"logits": [-0.0805448363, -0.0987381496, 0.1064099830, 0.0728730029]}),
    Case("pld_loss", ROW | {"labels": torch.tensor([0])}, {"k": 4}, value=0.3530990474, name="golden-first-4",
         gradients={"logits": [-0.0805448363, -0.0987381496, 0.1064099830, 0.0728730029]}, reads="R1"),
    Case("centered_reward_loss", IN_GROUPS, expected=crd, trained=("scores",), roles=("scores", "advantages")),
    Case("centered_reward_loss", IN_GROUPS, {"form": "bce", "beta": 0.4, "clip": 2.0}, expected=crd, name="bce",
         trained=("scores",), roles=("scores", "advantages")),
    Case("velocity_anchor", VELOCITIES, expected=anchor, trained=("velocities",)),
    Case("velocity_anchor", VELOCITIES | {"advantages": ADVANTAGES}, {"kl_coef": 0.01, "clip": 2.0}, expected=anchor,
         trained=("velocities",), name="adaptive"),
    Case("adpo_loss", CANDIDATES, expected=adpo, trained=("sequence_logprobs",),
         roles=("sequence_logprobs", "anchor_logprobs")),
    Case("adpo_loss", CANDIDATES | {"tau": double(0.5, 0.8, 1.2, 0.7, 2.0, 1.0)}, expected=adpo, name="tau",
         trained=("sequence_logprobs",)),
    Case("reward_targets", REWARDS, expected=targets, trained=()),
    Case("reward_targets", REWARDS, {"temperature": 2.0}, expected=targets, trained=(), name="flat"),
    Case("adaptive_tau", LIKE, {"vocab_size": 11}, expected=warm, trained=()),
    Case("adaptive_tau", LIKE, {"vocab_size": 11, "tau": 1.5, "bounds": (1.6, 2.1)}, expected=warm, trained=(),
         name="bounds"),
]  # fmt: skip
