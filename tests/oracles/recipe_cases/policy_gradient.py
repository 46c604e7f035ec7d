"""Papers 53, 72, 107: the facts' golden rows, and definitions over batches with masks."""

from __future__ import annotations

import math
from typing import Any

import torch
from recipe_case import Case, S, T, Y, batch, logprob, pick, row
from torch import Tensor

BATCH = batch(sequences=6, seed=5)
# Two prompts of three answers, one of which has no wrong answer beside the first two.
BATCH |= {
    "groups": torch.tensor([4, 4, 4, 1, 1, 1]),
    "rewards": torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64),
    "token_scores": BATCH["teacher_logits"][..., 2].clone(),
    "reference_logprobs": BATCH["base_logprobs"],
}
SIGNED = BATCH | {"rewards": 2 * BATCH["rewards"] - 1}
# The policy that sampled is further away, on both sides of the clip.
FAR = BATCH | {"old_logprobs": BATCH["base_logprobs"]}
Q, P = (torch.tensor(x, dtype=torch.float64).softmax(-1) for x in (S, T))


def mean(x: Tensor, mask: Tensor) -> Tensor:
    return x[mask].mean() if mask.any() else x[mask].sum()


def oreal(logits: Tensor, token_ids: Tensor, rewards: Tensor, groups: Tensor, token_scores: Tensor, mask: Tensor,
          reference_logprobs: Tensor | None = None, negative_coef: float = 0.5, kl_coef: float = 0.01,
          scale_positive: bool = True, token_counts: Tensor | None = None) -> Tensor:  # fmt: skip
    """Equations 10 and 11, an answer and a token at a time."""
    logp = logprob(logits, token_ids)
    positive = negative = penalty = torch.zeros((), dtype=torch.float64)
    counts = [0, 0, 0]
    for i in range(len(rewards)):
        others = [rewards[j] for j in range(len(rewards)) if j != i and groups[j] == groups[i]]
        advantage = rewards[i] - sum(others) / len(others)
        seen = []
        for t in mask[i].nonzero()[:, 0].tolist():
            seen.append(token_scores[i, t])
            w = 2 * torch.sigmoid(sum(seen) / len(seen)) - 1
            if rewards[i] > 0:
                positive = positive - (advantage if scale_positive else 1) * max(w, 0) * logp[i, t]
            else:
                negative = negative - advantage * max(-w, 0) * logp[i, t]
            counts[0 if rewards[i] > 0 else 1] += 1
            counts[2] += 1
            if reference_logprobs is not None:
                x = reference_logprobs[i, t] - logp[i, t]
                penalty = penalty + x.exp() - x - 1
    n = counts if token_counts is None else token_counts
    return positive / n[0] + negative_coef * negative / n[1] + kl_coef * penalty / n[2]


def token_reward(token_scores: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    out = []
    for scores, reward, kept in zip(token_scores, rewards, mask, strict=True):
        chance = scores[kept].mean().sigmoid()
        out.append(-reward * chance.log() - (1 - reward) * (1 - chance).log())
    return torch.stack(out).mean()


def topr(logits: Tensor, token_ids: Tensor, rewards: Tensor, old_logprobs: Tensor, mask: Tensor,
         level: str = "sequence_sum", baseline: float = 0.0) -> Tensor:  # fmt: skip
    logp = logprob(logits, token_ids)
    out = []
    for i, reward in enumerate(rewards - baseline):
        moved = (logp - old_logprobs).detach()[i][mask[i]]
        moved = {"sequence_sum": moved.sum(), "sequence": moved.mean(), "token": moved}[level]
        weight = torch.ones_like(moved) if reward >= 0 else moved.exp().clamp(0, 1)
        out.append(-(weight * reward * logp[i][mask[i]]).mean())
    return torch.stack(out).mean()


def covariance(logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return (logp - mean(logp, mask)).detach() * (advantages - mean(advantages, mask))


def clip_cov(logits: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor, mask: Tensor,
             bounds: tuple[float, float] = (1.0, 5.0), clip_low: float = 1.0, clip_high: float = 1.0,
             fraction: float = 1.0) -> Tensor:  # fmt: skip
    """Where as many are wanted as there are tokens, no chance is left."""
    logp = logprob(logits, token_ids)
    advantages = advantages[:, None].expand_as(logp)
    ratio, cov = (logp - old_logprobs).exp(), covariance(logp, advantages, mask)
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    dropped = (cov > bounds[0]) & (cov < bounds[1]) & ~(clipped > plain)
    return mean(torch.where(dropped, 0.0, torch.maximum(plain, clipped)), mask)


def kl_cov(logits: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor, mask: Tensor,
           percent: float = 0.2, kl_coef: float = 1.0) -> Tensor:  # fmt: skip
    logp = logprob(logits, token_ids)
    advantages = advantages[:, None].expand_as(logp)
    cov, count = covariance(logp, advantages, mask), max(int(int(mask.sum()) * percent / 100), 1)
    chosen = mask & (cov >= cov[mask].topk(count).values[-1])
    moved = logp - old_logprobs
    return mean(-advantages * moved.exp() + kl_coef * torch.where(chosen, moved.abs(), 0.0), mask)


def entropy_change(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    advantages = advantages[:, None].expand_as(logprobs)
    return -torch.cov(torch.stack([logprobs[mask], advantages[mask]]), correction=0)[0, 1]


OREAL = ("logits", "token_ids", "rewards", "groups", "token_scores", "mask")
POLICY = ("logits", "token_ids", "advantages", "old_logprobs", "mask")
K3, K3_GRADIENT = 1.0450299452, [1.5706623968, -1.8614271133, 0.0781986761, 0.2125660403]
ROW: dict[str, Any] = {"logits": row(S), "token_ids": torch.tensor([[Y]])}
ONE = torch.ones(1, dtype=torch.float64)
LOGPROB = Q.log()[Y].item()
SCORE = [q.item() - (v == Y) for v, q in enumerate(Q)]


def golden_topr(level: str, log_ratio: float, weight: float) -> Case:
    """The facts' weights of a wrong answer, on their row: −w·R·ℓ with R = −1."""
    return Case(
        "topr_loss", ROW | {"rewards": -ONE, "old_logprobs": (Q.log()[Y] - log_ratio).reshape(1, 1)},
        {"level": level}, value=weight * LOGPROB, gradients={"logits": [-weight * x for x in SCORE]},
        name=f"golden-{level}-{log_ratio}", reads="R0" if level == "token" else None,
    )  # fmt: skip


CASES = [
    Case("oreal_loss", pick(BATCH, *OREAL, "reference_logprobs"), expected=oreal,
         roles=("token_scores", "reference_logprobs")),
    Case("oreal_loss", pick(BATCH, *OREAL), {"kl_coef": 0.0, "negative_coef": 2.0, "scale_positive": False},
         expected=oreal, name="equation-11"),
    Case("oreal_loss", pick(BATCH, *OREAL, "reference_logprobs") | {"token_counts": torch.tensor([20, 30, 50])},
         {"kl_coef": 0.5}, expected=oreal, name="counts-of-all-ranks"),
    # Scores of 0 leave the KL alone.
    Case("oreal_loss", ROW | {"rewards": ONE, "groups": torch.tensor([0]), "token_scores": torch.zeros(1, 1).double(),
                              "reference_logprobs": P.log()[Y].reshape(1, 1)},
         {"kl_coef": 1.0}, value=K3, gradients={"logits": K3_GRADIENT}, name="golden-k3"),
    Case("token_reward_loss", pick(BATCH, "token_scores", "rewards", "mask"), expected=token_reward,
         trained=("token_scores",), reads="none"),
    Case("topr_loss", pick(SIGNED, "logits", "token_ids", "rewards", "old_logprobs", "mask"), expected=topr),
    Case("topr_loss", pick(SIGNED, "logits", "token_ids", "rewards", "old_logprobs", "mask"),
         {"level": "sequence", "baseline": 0.5}, expected=topr, name="as-in-verl"),
    Case("topr_loss", pick(SIGNED, "logits", "token_ids", "rewards", "old_logprobs", "mask"),
         {"level": "token", "baseline": -0.5}, expected=topr, name="as-in-roll", reads="R0"),
    golden_topr("sequence_sum", -1.0, math.exp(-1)),
    golden_topr("sequence", 2.0, 1.0),
    golden_topr("token", -5.0, math.exp(-5)),
    Case("clip_cov_loss", pick(FAR, *POLICY), {"fraction": 1.0, "bounds": (0.2, 2.0)}, expected=clip_cov),
    Case("clip_cov_loss", pick(FAR, *POLICY),
         {"fraction": 1.0, "bounds": (-0.5, 2.0), "clip_low": 0.1, "clip_high": 0.3}, expected=clip_cov,
         name="narrow-clip"),
    Case("kl_cov_loss", pick(FAR, *POLICY), expected=kl_cov),
    Case("kl_cov_loss", pick(FAR, *POLICY), {"percent": 30.0, "kl_coef": 2.0}, expected=kl_cov, name="30-percent"),
    Case("entropy_change", {"logprobs": BATCH["old_logprobs"]} | pick(BATCH, "advantages", "mask"),
         expected=entropy_change, trained=()),
]  # fmt: skip
