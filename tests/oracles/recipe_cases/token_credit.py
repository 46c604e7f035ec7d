"""Papers 27, 37, 47, 84: the facts' golden rows, and definitions over batches with masks."""

from __future__ import annotations

import math
from typing import Any

import torch
from recipe_case import B, Case, S, T, batch, logprob, pick
from torch import Tensor

BATCH = batch(sequences=6, seed=4)


def dgpo(logits: Tensor, reference_logits: Tensor, mask: Tensor, **options: Any) -> Tensor:
    tau = options.get("temperature", 1.0)
    q, p = (logits / tau).softmax(-1), (reference_logits / tau).softmax(-1)
    distance = 1 - (q * p).sqrt().sum(-1)
    entropy = -(q * q.log()).sum(-1) / math.log(q.shape[-1])
    score = distance * entropy ** options.get("power", 1.0) / options.get("credit_temperature", 0.5)
    out = torch.zeros_like(score)
    for row, kept in enumerate(mask):
        size = score[row, kept].exp()
        out[row, kept] = len(size) * size / size.sum()
    return out


def steer(old_logprobs: Tensor, old_entropy: Tensor, advantages: Tensor, mask: Tensor, logprobs: Tensor | None = None,
          minimum: float = 0.7, floor: float = 0.02, scheme: str = "exponential",
          bounds: tuple[float, float] = (0.8, 1.2)) -> Tensor:  # fmt: skip
    x = (old_logprobs if logprobs is None else logprobs).exp()
    a = advantages[:, None] if advantages.dim() == 1 else advantages
    change = (a / old_logprobs.exp() * x * (1 - x) * (x.log() + old_entropy)).abs()
    if scheme == "exponential":
        rate = -math.log(minimum) / max(change[mask].max().item(), floor)
        return torch.where(mask, (-rate * change).exp(), 0.0)
    low, high = change[mask].min(), change[mask].max()
    weight = bounds[1] - (change - low) / (high - low) * (bounds[1] - bounds[0])
    return torch.where(mask, weight, 0.0)


def conflicts(token_ids: Tensor, advantages: Tensor, groups: Tensor, mask: Tensor,
              require_run: bool = True) -> list[Tensor]:  # fmt: skip
    """Conflict tokens from the left and from the right, by comparing every pair of completions token by token."""
    sides = []
    for step in (1, -1):
        out = torch.zeros_like(mask)
        # The columns of each completion's tokens, in the order in which they are counted.
        columns = [row.nonzero()[:, 0].tolist()[::step] for row in mask]
        for i, a in enumerate(advantages.tolist()):
            for place, column in enumerate(columns[i]):
                found = set()
                for j, b in enumerate(advantages.tolist()):
                    same = groups[j] == groups[i] and place < len(columns[j])
                    if same and token_ids[j, columns[j][place]] == token_ids[i, column]:
                        found.add((b > 0) - (b < 0))
                if a != 0 and {1, -1} <= found:
                    out[i, column] = True
                elif require_run:
                    break
        sides.append(out)
    return sides


def conflict_weights(token_ids: Tensor, advantages: Tensor, groups: Tensor, mask: Tensor, positive: float = 2.0,
                     require_run: bool = True) -> Tensor:  # fmt: skip
    out = mask.double()
    for conflict in conflicts(token_ids, advantages, groups, mask, require_run):
        out = torch.where(conflict, out * (positive * (advantages > 0))[:, None], out)
    return out


def gtpo(logits: Tensor, token_ids: Tensor, rewards: Tensor, groups: Tensor, mask: Tensor,
         old_logprobs: Tensor | None = None, initial_entropy: Tensor | None = None, entropy_coef: float = 0.1,
         entropy_threshold: float = math.log(2), per_conflict_mean: bool = False, positive: float = 2.0,
         require_run: bool = True, temperature: float = 1.0) -> Tensor:  # fmt: skip
    q = (logits / temperature).softmax(-1)
    entropy = -(q * q.log()).sum(-1).detach()
    lp = logprob(logits / temperature, token_ids)
    ratio = (lp - (lp.detach() if old_logprobs is None else old_logprobs)).exp()
    advantages = torch.stack(
        [(r - rewards[groups == g].mean()) / (rewards[groups == g].std() + 1e-4)
         for r, g in zip(rewards, groups, strict=True)]
    )  # fmt: skip
    weights = conflict_weights(token_ids, advantages, groups, mask, positive, require_run)
    left, right = conflicts(token_ids, advantages, groups, mask, require_run)
    total = logits.new_zeros(())
    for i, kept in enumerate(mask):
        mean = entropy[i, kept].mean()
        if mean > entropy_threshold and (initial_entropy is None or initial_entropy[i] <= entropy_threshold):
            continue
        share = max(int((left | right)[i].sum()), 1) if per_conflict_mean else 1
        total = total - (advantages[i] - entropy_coef * mean) * (ratio * weights)[i, kept].mean() / share
    return total / len(rewards)


def process(advantages: Tensor, old_logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor, eta: float = 200.0,
            step_length: int = 256, step_ends: Tensor | None = None) -> Tensor:  # fmt: skip
    out = torch.zeros_like(old_logprobs)
    for row, kept in enumerate(mask):
        columns = kept.nonzero()[:, 0].tolist()
        for place, column in enumerate(columns):
            end = place
            while end < len(columns) - 1 and not (
                (end + 1) % step_length == 0 if step_ends is None else step_ends[row, columns[end]]
            ):
                end += 1
            moved = (old_logprobs - reference_logprobs)[row, columns[end:]].sum()
            a = advantages[row] if advantages.dim() == 1 else advantages[row, column]
            out[row, column] = a - moved / eta
    return out


# A prompt with two right and two wrong answers, of two lengths, one with a hole; one with two of each sign alone.
IDS = torch.tensor([
    [5, 7, 9, 9, 1], [5, 8, 4, 9, 1], [5, 7, 3, 1, 0], [2, 8, 4, 9, 1], [5, 7, 9, 9, 1], [5, 7, 9, 9, 1],
])  # fmt: skip
KEPT = torch.tensor([
    [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 0, 1, 1], [1, 1, 1, 1, 1], [1, 0, 1, 1, 1],
])  # fmt: skip
CONFLICTS = {
    "token_ids": IDS, "advantages": torch.tensor([1.0, -1.0, -0.5, 0.7, 1.0, 0.0], dtype=torch.float64),
    "groups": torch.tensor([3, 3, 3, 3, 1, 1]), "mask": KEPT.bool(),
}  # fmt: skip
GTPO = {
    "logits": batch(sequences=6, vocab=10, seed=5)["logits"], "token_ids": IDS,
    "rewards": torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.5], dtype=torch.float64),
    "groups": torch.tensor([3, 3, 3, 3, 1, 1]), "mask": KEPT.bool(),
}  # fmt: skip
INITIAL = torch.tensor([0.1, 3.0, 0.1, 3.0, 0.1, 3.0], dtype=torch.float64)
OLD = pick(BATCH, "old_logprobs", "mask")
ENTROPY = {"old_entropy": -(BATCH["old_logits"].softmax(-1) * BATCH["old_logits"].log_softmax(-1)).sum(-1)}
STEER = OLD | ENTROPY | pick(BATCH, "advantages")
BY_TOKEN = {"advantages": torch.linspace(-1.0, 1.2, 30, dtype=torch.float64).reshape(6, 5)}
PROCESS = pick(BATCH, "advantages", "old_logprobs", "mask") | {"reference_logprobs": BATCH["base_logprobs"]}
DGPO = {"logits": BATCH["logits"], "reference_logits": BATCH["teacher_logits"], "mask": BATCH["mask"]}


def tensor(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def golden_steer(name: str, weights: list[float], **options: Any) -> Case:
    """The facts' row: three tokens with Ω = 0.0190325164, −0.1264241118, −0.2375532329."""
    return Case(
        "steer_weights",
        {"old_logprobs": tensor(-0.1, -1, -3), "old_entropy": tensor(0.3, 1.2, 2.5), "advantages": tensor(1, -1, 0.5),
         "mask": torch.tensor([[True, True, True]])},
        options, value=[weights], trained=(), name=f"golden-{name}",
    )  # fmt: skip


CASES = [
    Case("gtpo_loss", GTPO, {"entropy_threshold": 1.75}, expected=gtpo),
    Case("gtpo_loss", GTPO, {"entropy_threshold": 1.9, "per_conflict_mean": True, "positive": 1.5, "temperature": 1.3},
         expected=gtpo, name="as-in-the-code"),
    Case("gtpo_loss", GTPO | {"initial_entropy": INITIAL, "old_logprobs": torch.full((6, 5), -2.0).double()},
         {"entropy_coef": 0.3, "require_run": False}, expected=gtpo, name="initial-entropy-and-ratio"),
    Case("conflict_weights",
         {"token_ids": torch.tensor([[5, 7, 9, 0], [5, 8, 4, 9]]), "advantages": tensor(1, -1)[0],
          "groups": torch.tensor([0, 0]), "mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()},
         value=[[2, 1, 2, 0], [0, 1, 1, 0]], trained=(), name="golden"),
    Case("conflict_weights", CONFLICTS, {"positive": 3.0}, expected=conflict_weights, trained=()),
    Case("conflict_weights", CONFLICTS, {"require_run": False}, expected=conflict_weights, trained=(), name="no-run"),
    Case("dgpo_weights", {"logits": torch.tensor([[S, B]], dtype=torch.float64),
                          "reference_logits": torch.tensor([[T, T]], dtype=torch.float64),
                          "mask": torch.tensor([[True, True]])},
         value=[[1.0080413043, 0.9919586957]], trained=(), name="golden"),
    Case("dgpo_weights", DGPO, expected=dgpo, trained=(), roles=("logits", "reference_logits")),
    Case("dgpo_weights", DGPO, {"credit_temperature": 0.1, "power": 0.5, "temperature": 2.0}, expected=dgpo,
         trained=(), name="options", roles=("logits", "reference_logits")),
    golden_steer("exponential", [0.9822808360, 0.8880249998, 0.8], minimum=0.8),
    golden_steer("linear", [1.2, 1.0034207519, 0.8], scheme="linear"),
    Case("steer_weights", STEER, expected=steer, trained=(), roles=("old_logprobs", "old_entropy")),
    Case("steer_weights", STEER | BY_TOKEN | {"logprobs": BATCH["teacher_logprobs"]}, {"floor": 50.0, "minimum": 0.01},
         expected=steer, trained=(), name="current-policy", roles=("old_logprobs", "logprobs")),
    Case("steer_weights", STEER, {"scheme": "linear", "bounds": (0.5, 1.5)}, expected=steer, trained=(), name="linear"),
    Case("process_advantages", PROCESS, {"eta": 2.0, "step_length": 2}, expected=process, trained=(),
         roles=("old_logprobs", "reference_logprobs")),
    Case("process_advantages", PROCESS | BY_TOKEN | {"step_ends": (torch.arange(30) % 4 == 1).reshape(6, 5)},
         {"eta": 1.0}, expected=process, trained=(), name="given-ends"),
]  # fmt: skip
