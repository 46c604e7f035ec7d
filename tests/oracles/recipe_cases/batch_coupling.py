"""Papers 15, 57, 60, 62: the facts' golden rows, and definitions row by row."""

from __future__ import annotations

import torch
from recipe_case import B, Case, S, T, batch, double, pick
from torch import Tensor

BATCH = batch(seed=11)
KEPT = torch.tensor([True, False, True, True, True])
ROWS = {"logits": BATCH["logits"][0], "teacher_logits": BATCH["teacher_logits"][0], "mask": KEPT}
GOLDEN = {
    "logits": torch.stack([double(*S), double(*B)]),
    "teacher_logits": torch.stack([double(*T), double(*T[::-1])]),
}


def sinkhorn(logits: Tensor, teacher_logits: Tensor, mask: Tensor, temperature: float = 2.0, epsilon: float = 0.1,
             iterations: int = 20, weight: float = 1e-3) -> Tensor:  # fmt: skip
    if not mask.any():
        return logits.sum() * 0
    q, p = ((x[mask] / temperature).softmax(-1) for x in (logits, teacher_logits))
    cost = torch.stack([torch.stack([(a - b).abs().sum() for b in p]) for a in q])
    plan = (-cost / epsilon).exp()
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return weight * (plan * cost).sum()


def dro(losses: Tensor, temperature: float, mask: Tensor) -> Tensor:
    weights = [(x / temperature).exp() for x in losses[mask]]
    return temperature * (sum(weights) / len(weights)).log() if weights else losses.sum() * 0


def targets(logits: Tensor, power: float = 1.0, frequency_power: float = 0.5, frequencies: Tensor | None = None,
            mask: Tensor | None = None) -> Tensor:  # fmt: skip
    mask = torch.ones(logits.shape[:-1], dtype=torch.bool) if mask is None else mask
    p = logits.softmax(-1)
    f = sum(p[mask]) if frequencies is None else frequencies
    raised = p**power / f**frequency_power
    return torch.where(mask[..., None], (raised / raised.sum(-1, keepdim=True)).log(), 0.0)


def soft(logits: Tensor, target_logprobs: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    values = -(target_logprobs.exp() * (logits / temperature).softmax(-1).log()).sum(-1)
    return values[mask].sum() / max(int(mask.sum()), 1)


def marginal(logits: Tensor, log_prior: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    q = (logits / temperature).softmax(-1).reshape(-1, logits.shape[-1])
    q = q if mask is None else q[mask.reshape(-1)]
    m = sum(q) / len(q)
    return sum(m[k] * (m[k].log() - log_prior[k]) for k in range(len(m)))


def repri(support_logits: Tensor, support_labels: Tensor, query_logits: Tensor, log_prior: Tensor, query_mask: Tensor,
          weights: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Tensor:  # fmt: skip
    labelled = [(z.softmax(-1)[y]).log() for z, y in zip(support_logits, support_labels, strict=True) if y >= 0]
    queries = [-(z.softmax(-1) * z.softmax(-1).log()).sum() for z in query_logits[query_mask]]
    first, second, third = weights
    return (
        -first * sum(labelled) / len(labelled)
        + second * marginal(query_logits, log_prior, query_mask)
        + third * sum(queries) / len(queries)
    )


PRIOR = torch.linspace(-1, 1, 7, dtype=torch.float64).log_softmax(-1)
LOSSES = {"losses": double(0.3, 2.0, 0.1, 1.4, 3.0), "mask": KEPT}
IMAGES = pick(BATCH, "logits", "mask")
MARGINAL = IMAGES | {"log_prior": PRIOR}
SOFT = IMAGES | {"target_logprobs": BATCH["teacher_logits"].log_softmax(-1)}
PIXELS = {
    "support_logits": BATCH["logits"][0], "support_labels": torch.tensor([1, 0, -100, 6, 2]), "log_prior": PRIOR,
    "query_logits": BATCH["logits"][1], "query_mask": KEPT,
}  # fmt: skip

CASES = [
    Case("sinkd_loss", GOLDEN, {"weight": 1.0}, value=0.9110336309, name="golden",
         gradients={"logits": [[0.2416711395, -0.0980726689, -0.0542142626, -0.0893842080],
                               [0.1339517229, 0.0863677753, -0.1238584446, -0.0964610536]]},
         trained=("logits", "teacher_logits")),
    Case("sinkd_loss", ROWS, {"weight": 1.0, "epsilon": 0.2, "iterations": 1, "temperature": 0.7}, expected=sinkhorn,
         trained=("logits", "teacher_logits"), roles=("logits", "teacher_logits")),
    Case("dro_loss", LOSSES, {"temperature": 0.7}, expected=dro, trained=("losses",)),
    Case("frequency_sharpened_targets", IMAGES, expected=targets, trained=()),
    Case("frequency_sharpened_targets", IMAGES | {"frequencies": PRIOR.exp()}, {"power": 2.0, "frequency_power": 1.0},
         expected=targets, trained=(), name="code"),
    Case("soft_cross_entropy", SOFT, {"temperature": 2.0}, expected=soft),
    Case("marginal_kl", {"logits": GOLDEN["logits"], "log_prior": double(*T).log_softmax(-1)}, value=0.2258697738,
         gradients={"logits": [[0.1025425487, -0.0980043244, 0.0068536162, -0.0113918404],
                               [0.0794876743, -0.1310832859, 0.0598331652, -0.0082375536]]}, name="golden"),
    Case("marginal_kl", MARGINAL, {"temperature": 0.5}, expected=marginal),
    Case("repri_loss", PIXELS, {"weights": (1.0, 2.0, 0.5)}, expected=repri,
         trained=("support_logits", "query_logits")),
    Case("repri_loss", PIXELS, expected=repri, trained=("support_logits", "query_logits"), name="defaults"),
]  # fmt: skip
