"""Papers 79, 94: the facts' golden rows, and definitions class by class over batches with masks."""

from __future__ import annotations

import math

import torch
from recipe_case import Case, S, T, batch, pick, row
from torch import Tensor

from recipe_cases.classifier import GOLDEN, ROWS, STUDENT_AND_TEACHER, by_row, others, rows

FEATURES = batch(vocab=4, seed=8)
CLASSES = {
    "features": FEATURES["logits"], "teacher_features": FEATURES["teacher_logits"] * 1.2,
    "class_means": batch(7, 2, 4, seed=9)["logits"][:, 0], "labels": ROWS["labels"], "mask": ROWS["mask"],
}  # fmt: skip


def kl(t: Tensor, s: Tensor) -> Tensor:
    return (t.softmax(-1) * (t.softmax(-1).log() - s.softmax(-1).log())).sum()


def dkd(logits: Tensor, teacher_logits: Tensor, labels: Tensor, mask: Tensor, alpha: float = 1.0, beta: float = 8.0,
        temperature: float = 4.0, reduction: str = "mean", normalizer: float | None = None) -> Tensor:  # fmt: skip
    terms = {}
    for i in rows(labels, mask):
        s, t, c = logits[i] / temperature, teacher_logits[i] / temperature, int(labels[i])
        p, q = t.softmax(-1)[c], s.softmax(-1)[c]
        binary = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        terms[i] = temperature**2 * (alpha * binary + beta * kl(others(t, c), others(s, c)))
    return by_row(terms, labels, reduction, normalizer)


def direction(features: Tensor, teacher_features: Tensor, class_means: Tensor, labels: Tensor, mask: Tensor,
              reduction: str = "mean", normalizer: float | None = None) -> Tensor:  # fmt: skip
    terms = {}
    for i in rows(labels, mask):
        mean = class_means[int(labels[i])]
        longest = max(features[i].square().sum().sqrt(), teacher_features[i].square().sum().sqrt().detach())
        terms[i] = 1 - (features[i] * mean).sum() / mean.square().sum().sqrt() / longest
    return by_row(terms, labels, reduction, normalizer)


def kdpp(logits: Tensor, teacher_logits: Tensor, labels: Tensor, features: Tensor, teacher_features: Tensor,
         class_means: Tensor, mask: Tensor, kd_coef: float = 1.0, nd_coef: float = 2.0, temperature: float = 4.0,
         normalizer: float | None = None) -> Tensor:  # fmt: skip
    terms = {}
    for i in rows(labels, mask):
        divergence = temperature**2 * kl(teacher_logits[i] / temperature, logits[i] / temperature)
        terms[i] = kd_coef * divergence - logits[i].softmax(-1)[int(labels[i])].log()
    directions = direction(features, teacher_features, class_means, labels, mask, "mean", normalizer)
    return by_row(terms, labels, "mean", normalizer) + nd_coef * directions


def matching(logits: Tensor, target_logits: Tensor, mask: Tensor, reduction: str = "mean",
             normalizer: float | None = None) -> Tensor:  # fmt: skip
    places = [tuple(x) for x in mask.nonzero().tolist()]
    terms = {i: sum((logits[i][k] - target_logits[i][k]) ** 2 for k in range(logits.shape[-1])) for i in places}
    return by_row(terms, mask, reduction, normalizer)


def margin(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    terms = {}
    for i in rows(labels, mask):
        q = logits[i].softmax(-1)[int(labels[i])]
        terms[i] = (q / (1 - q)).log()
    return by_row(terms, labels, "none")


def klom(margins: Tensor, other_margins: Tensor, bins: int, pseudocount: float) -> Tensor:
    out = []
    for x, other in zip(margins.T.tolist(), other_margins.T.tolist(), strict=True):
        low, width = min(x + other), (max(x + other) - min(x + other)) / bins
        p, q = ([pseudocount] * bins for _ in range(2))
        for values, histogram in ((x, p), (other, q)):
            for value in values:
                histogram[min(int((value - low) / width), bins - 1)] += 1
        terms = [a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True) if a > 0]
        out.append(sum(terms))
    return torch.tensor(out, dtype=torch.float64)


MATCHING = {"logits": ROWS["logits"], "target_logits": ROWS["teacher_logits"], "mask": ROWS["mask"]}
MODELS = {"margins": FEATURES["logits"][:, 0], "other_margins": FEATURES["teacher_logits"].reshape(-1, 4)}

CASES = [
    Case("dkd_loss", GOLDEN, value=1.8001854431, name="golden", reads="R0+f",
         gradients={"logits": [2.5444708237, -0.2654764774, -1.5869157201, -0.6920786262]}),
    Case("dkd_loss", ROWS, {"alpha": 0.5, "beta": 2.0, "temperature": 1.5}, expected=dkd, reads="R0+f",
         roles=STUDENT_AND_TEACHER),
    Case("dkd_loss", ROWS, {"normalizer": 5.0}, expected=dkd, name="normalizer", reads="R0+f"),
    Case("norm_direction_loss", CLASSES, expected=direction, trained=("features",), reads="none",
         roles=("features", "teacher_features")),
    Case("norm_direction_loss", CLASSES, {"reduction": "none"}, expected=direction, trained=("features",),
         reads="none", name="none"),
    Case("kdpp_loss", ROWS | CLASSES, expected=kdpp, trained=("logits", "features"), roles=STUDENT_AND_TEACHER),
    Case("kdpp_loss", ROWS | CLASSES, {"kd_coef": 0.0, "normalizer": 7.0}, expected=kdpp,
         trained=("logits", "features"), name="no-distillation"),
    Case("logit_matching_loss", MATCHING, expected=matching, reads="none"),
    Case("logit_matching_loss", MATCHING, {"reduction": "none"}, expected=matching, reads="none", name="none"),
    Case("target_margin", pick(ROWS, "logits", "labels", "mask"), expected=margin),
    Case("target_margin", {"logits": row(S), "labels": torch.tensor([[1]])}, name="golden",
         value=[[0.5 - math.log(sum(math.exp(x) for x in (2.0, -1.0, 0.0)))]]),
    Case("klom", MODELS, {"bins": 4, "pseudocount": 0.5}, expected=klom, trained=(), reads="none"),
    Case("klom", {"margins": row(S)[0, 0], "other_margins": row(T)[0, 0]}, {"bins": 2, "pseudocount": 0.0},
         expected=lambda margins, other_margins, **options: klom(
             margins[:, None], other_margins[:, None], **options)[0], trained=(), reads="none", name="one-example"),
]  # fmt: skip
