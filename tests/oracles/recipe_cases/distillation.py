"""Papers 7, 10, 12, 35, 36: the facts' golden rows, and definitions over batches with masks."""

from __future__ import annotations

import math

import torch
from recipe_case import Case, S, T, batch, pick, row
from torch import Tensor

ONE = {"logits": row(S), "teacher_logits": row(T)}
BATCH = batch()
BATCH["labels"] = BATCH["token_ids"].clone()
BATCH["labels"][1, 1] = -100
BOTH = pick(BATCH, "logits", "teacher_logits", "mask")
LABELLED = BOTH | pick(BATCH, "labels")
PROMPTS = BOTH | {"pass_rates": torch.tensor([0.25, 0.0, 0.625], dtype=torch.float64)}
STUDENT_AND_TEACHER = ("logits", "teacher_logits")


def forward_kl(s: Tensor, t: Tensor) -> Tensor:
    return (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum(-1)


def reverse_kl(s: Tensor, t: Tensor) -> Tensor:
    return forward_kl(t, s)


def entropy(s: Tensor) -> Tensor:
    return -(s.softmax(-1) * s.log_softmax(-1)).sum(-1)


def mean(x: Tensor, mask: Tensor) -> Tensor:
    return x[mask].sum() / max(int(mask.sum()), 1)


def by_sequence(x: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([mean(x[b], mask[b]) for b in range(len(x))]).mean()


def gere(logits: Tensor, teacher_logits: Tensor, mask: Tensor, temperature: float = 2.0) -> Tensor:
    return mean(forward_kl(logits / temperature, teacher_logits / temperature), mask)


def threshold(hidden: Tensor, base_hidden: Tensor, lower: Tensor, upper: Tensor, mask: Tensor) -> Tensor:
    """Unit by unit."""
    out = []
    for *at, d in torch.cartesian_prod(*(torch.arange(n) for n in hidden.shape)).tolist():
        if mask[tuple(at)]:
            h, base, low, high = hidden[(*at, d)], base_hidden[(*at, d)], lower[d], upper[d]
            if base <= low:
                out.append((h - low).relu())
            elif base >= high:
                out.append((high - h).relu())
            else:
                out.append((h - high).relu() + (low - h).relu())
    found = [x for x in out if x != 0]
    return torch.stack(found).mean() if found else hidden.sum() * 0


def entropy_aware(logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, *, mask: Tensor,
                  confidence_k: int = 16, temperature: float = 1.0, gamma: float | None = None) -> Tensor:  # fmt: skip
    valid = mask if labels is None else mask & (labels != -100)
    if gamma is None:
        gamma = min(max(1 - by_sequence(entropy(teacher_logits), valid).item() / math.log(confidence_k), 0.0), 1.0)
    s, t = logits / temperature, teacher_logits / temperature
    return temperature**2 * by_sequence(gamma * reverse_kl(s, t) + (1 - gamma) * forward_kl(s, t), valid)


def bidirectional(logits: Tensor, teacher_logits: Tensor, mask: Tensor, forward_weights: tuple[float, float],
                  reverse_weights: tuple[float, float], temperature: float = 1.0, temperature_squared: bool = True,
                  reduction: str = "mean") -> Tensor:  # fmt: skip
    s, t = logits / temperature, teacher_logits / temperature
    case = (entropy(t) <= entropy(s)).long()
    nu, delta = (torch.tensor(x, dtype=torch.float64)[case] for x in (forward_weights, reverse_weights))
    values = torch.where(mask, nu * forward_kl(s, t) + delta * reverse_kl(s, t), 0.0)
    values = values * temperature**2 if temperature_squared else values
    return {"mean": mean(values, mask), "sum": values.sum(), "none": values}[reduction]


def paced(logits: Tensor, teacher_logits: Tensor, pass_rates: Tensor, labels: Tensor | None = None, *, mask: Tensor,
          alpha: float = 1.0, beta: float = 1.0, kind: str = "forward_kl") -> Tensor:  # fmt: skip
    valid = mask if labels is None else mask & (labels != -100)
    divergence = forward_kl if kind == "forward_kl" else reverse_kl
    return mean((pass_rates**alpha * (1 - pass_rates) ** beta)[:, None] * divergence(logits, teacher_logits), valid)


def metrics(logits: Tensor, teacher_logits: Tensor, labels: Tensor, mask: Tensor, last: int) -> Tensor:
    valid = mask & (labels != -100)
    own = entropy(logits)
    logprob = logits.log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    ends = [own[b][valid[b]][-last:] for b in range(len(own))]
    per_token = [torch.where(valid, x, 0.0).reshape(-1) for x in (own, logprob, forward_kl(logits, teacher_logits))]
    return torch.cat([*per_token, torch.stack([x.sum() / max(len(x), 1) for x in ends])])


FKL, FKL_S = 0.4015350945, [0.4014323084, -0.3504621521, -0.0335192609, -0.0174508954]
FKL_T = [-0.3811044260, 0.3894787499, 0.0182736898, -0.0266480137]
RKL, RKL_S = 0.3671189964, [0.3309219614, -0.2430507488, -0.0365550558, -0.0513161568]
RKL_T = [-0.4014323084, 0.3504621521, 0.0335192609, 0.0174508954]
HIDDEN = {
    "hidden": BATCH["logits"], "base_hidden": BATCH["teacher_logits"], "mask": BATCH["mask"],
    "lower": torch.linspace(-1.5, -0.5, 7, dtype=torch.float64), "upper": torch.linspace(0.25, 1.0, 7).double(),
}  # fmt: skip

CASES = [
    Case("kd_loss", BOTH, {"temperature": 3.0}, roles=STUDENT_AND_TEACHER,
         expected=lambda logits, teacher_logits, mask, temperature: 9 * gere(
             logits, teacher_logits, mask, temperature)),
    Case("kd_loss", ONE, value=0.3555114245, name="golden",
         gradients={"logits": [0.3745644262, -0.3057786933, -0.0646494437, -0.0041362892]}),
    Case("gere_kd_loss", ONE, value=0.0888778561, name="golden",
         gradients={"logits": [0.0936411066, -0.0764446733, -0.0161623609, -0.0010340723]}),
    Case("gere_kd_loss", BOTH, expected=gere, roles=STUDENT_AND_TEACHER),
    Case("activation_threshold_loss", HIDDEN, expected=threshold, trained=("hidden",), roles=("hidden", "base_hidden"),
         reads="none"),
    Case("entropy_aware_kl", ONE, {"confidence_k": 4}, value=0.3953684365, name="golden",
         gradients={"logits": [0.3887983023, -0.3312162346, -0.0340632130, -0.0235188547]}),
    Case("entropy_aware_kl", ONE, {"confidence_k": 4, "temperature": 2.0}, value=0.3558061733, name="golden-T=2",
         gradients={"logits": [0.3767777738, -0.3002801272, -0.0666607785, -0.0098368680]}),
    Case("entropy_aware_kl", LABELLED, expected=entropy_aware, roles=STUDENT_AND_TEACHER),
    Case("entropy_aware_kl", BOTH, {"temperature": 1.5, "confidence_k": 5}, expected=entropy_aware, name="tempered"),
    Case("entropy_aware_kl", BOTH, {"gamma": 0.3}, expected=entropy_aware, name="gamma"),
    Case("bidirectional_kl", ONE, {"forward_weights": (1.0, 0.0), "reverse_weights": (0.0, 0.0)}, value=FKL,
         gradients={"logits": FKL_S, "teacher_logits": FKL_T}, trained=STUDENT_AND_TEACHER, name="golden-forward"),
    Case("bidirectional_kl", ONE, {"forward_weights": (0.0, 1.0), "reverse_weights": (1.0, 0.0)}, value=RKL,
         gradients={"logits": RKL_S, "teacher_logits": RKL_T}, trained=STUDENT_AND_TEACHER, name="golden-reverse"),
    Case("bidirectional_kl", BOTH, {"forward_weights": (1.0, 0.5), "reverse_weights": (0.25, 2.0), "temperature": 2.0},
         expected=bidirectional, trained=STUDENT_AND_TEACHER, roles=STUDENT_AND_TEACHER),
    Case("bidirectional_kl", BOTH, {"forward_weights": (1.0, 0.5), "reverse_weights": (0.25, 2.0), "temperature": 2.0,
         "temperature_squared": False, "reduction": "none"}, expected=bidirectional, name="none"),
    Case("bidirectional_kl", BOTH, {"forward_weights": (1.0, 0.5), "reverse_weights": (0.25, 2.0), "reduction": "sum"},
         expected=bidirectional, name="sum"),
    Case("paced_loss", ONE | {"pass_rates": torch.tensor([0.25], dtype=torch.float64)}, value=0.1875 * FKL,
         gradients={"logits": [0.1875 * x for x in FKL_S]}, name="golden"),
    Case("paced_loss", PROMPTS | pick(LABELLED, "labels"), {"alpha": 2.0}, expected=paced, roles=STUDENT_AND_TEACHER),
    Case("paced_loss", PROMPTS, {"kind": "reverse_kl", "beta": 0.5}, expected=paced, name="reverse"),
    Case("memorization_metrics", LABELLED, {"last": 2}, expected=metrics, trained=(), roles=STUDENT_AND_TEACHER),
]  # fmt: skip
