"""Papers 6, 9, 45: golden rows, and definitions turn by turn and class by class."""

from __future__ import annotations

import math

import torch
from recipe_case import Case, S, T, batch, double, pick, row
from torch import Tensor

BATCH = batch(3, 6, 7)
TURNS = torch.tensor([[0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1], [-1, 0, 0, 2, 2, -1]])
TALK = pick(BATCH, "logits", "mask") | {"reference_logits": BATCH["teacher_logits"], "turns": TURNS}
TOP = BATCH["teacher_logits"].log_softmax(-1).topk(3)
API = pick(BATCH, "logits", "mask") | {"turns": TURNS, "topk_ids": TOP.indices, "topk_logprobs": TOP.values}
STEP = {"logits": BATCH["logits"], "tangent": BATCH["teacher_logits"] - BATCH["base_logits"]}


def kl(q: Tensor, p: Tensor) -> Tensor:
    return (q * (q.log() - p.log())).sum(-1)


def by_turn(values: Tensor, turns: Tensor, count: int, mask: Tensor) -> Tensor:
    out = torch.zeros(len(values), count, dtype=torch.float64)
    for b in range(len(values)):
        for turn in range(count):
            chosen = values[b][(turns[b] == turn) & mask[b]]
            out[b, turn] = chosen.mean() if len(chosen) else 0.0
    return out


def divergence(q: Tensor, p: Tensor, kind: str) -> Tensor:
    m = (q + p) / 2
    return {"reverse_kl": kl(q, p), "forward_kl": kl(p, q), "js": (kl(q, m) + kl(p, m)) / 2}[kind]


def drift(logits: Tensor, reference_logits: Tensor, turns: Tensor, mask: Tensor, count: int,
          kind: str = "reverse_kl") -> Tensor:  # fmt: skip
    return by_turn(divergence(logits.softmax(-1), reference_logits.softmax(-1), kind), turns, count, mask)


def api_drift(logits: Tensor, turns: Tensor, topk_ids: Tensor, topk_logprobs: Tensor, mask: Tensor, count: int,
              tail: str, kind: str = "reverse_kl") -> Tensor:  # fmt: skip
    q, p = logits.softmax(-1).gather(-1, topk_ids), topk_logprobs.exp()
    if tail == "bucket":
        q, p = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (q, p))
    else:
        q, p = (x / x.sum(-1, keepdim=True) for x in (q, p))
    return by_turn(divergence(q, p, kind), turns, count, mask)


def intervention(logits: Tensor, original_logits: Tensor, mask: Tensor) -> Tensor:
    q, p = logits.softmax(-1), original_logits.softmax(-1)
    bits = -(q * q.log2()).sum(-1)
    return torch.cat([torch.where(mask, x, 0.0).reshape(-1) for x in (kl(p, q), bits)])


def range_and_variance(logits: Tensor, tangent: Tensor) -> Tensor:
    q = logits.softmax(-1)
    variance = (q * tangent**2).sum(-1) - (q * tangent).sum(-1) ** 2
    return torch.cat([x.reshape(-1) for x in (tangent.max(-1).values - tangent.min(-1).values, variance)])


def radius(logit_range: Tensor, gap: Tensor) -> Tensor:
    return (gap**2 + math.pi**2) ** 0.5 / logit_range


ROLES = ("logits", "reference_logits")
CHANGED = pick(BATCH, "logits", "mask") | {"original_logits": BATCH["teacher_logits"]}
CASES = [
    Case("turn_divergence", TALK, {"count": 3}, expected=drift, trained=(), roles=ROLES),
    Case("turn_divergence", TALK, {"count": 4, "kind": "forward_kl"}, expected=drift, trained=(), name="forward"),
    Case("turn_divergence", TALK, {"count": 3, "kind": "js"}, expected=drift, trained=(), name="js"),
    Case("topk_turn_divergence", API, {"count": 3, "tail": "bucket"}, expected=api_drift, trained=()),
    Case("topk_turn_divergence", API, {"count": 4, "tail": "renormalize", "kind": "forward_kl"}, expected=api_drift,
         trained=(), name="renormalized"),
    Case("intervention_divergence", CHANGED, expected=intervention, trained=(), roles=("logits", "original_logits")),
    # The code's 0.4015350667 has 1e-8 inside of its logarithms.
    Case("intervention_divergence", {"logits": row(S), "original_logits": row(T)},
         value=[0.4015350945, 0.8782811753 / math.log(2)], trained=(), name="golden"),
    Case("logit_range_and_variance", STEP, expected=range_and_variance, trained=(), roles=("logits", "tangent")),
    Case("logit_range_and_variance", {"logits": row(S), "tangent": row(T)}, value=[2.0, 0.2103713913], trained=(),
         name="golden"),
    Case("step_radius", {"logit_range": double(2.0), "gap": double(1.3)},
         value=[1.6999709116], trained=(), name="golden"),
    Case("step_radius", {"logit_range": BATCH["logits"][0].abs(), "gap": BATCH["teacher_logits"][0]},
         expected=radius, trained=()),
]  # fmt: skip
