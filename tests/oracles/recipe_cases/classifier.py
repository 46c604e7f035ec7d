"""Papers 44, 50: the facts' golden rows, and definitions class by class over batches with masks."""

from __future__ import annotations

import torch
from recipe_case import Case, S, T, batch, pick, row
from torch import Tensor

BATCH = batch(seed=7)
BATCH["labels"] = BATCH["token_ids"].clone()
BATCH["labels"][1, 1] = -100
ROWS = pick(BATCH, "logits", "teacher_logits", "labels", "mask")
WEAK = pick(BATCH, "logits", "labels", "mask") | {"weak_logits": BATCH["teacher_logits"]}
GOLDEN = {"logits": row(S), "teacher_logits": row(T), "labels": torch.tensor([[1]])}
STUDENT_AND_TEACHER = ("logits", "teacher_logits")


def by_row(
    terms: dict[tuple[int, ...], Tensor], mask: Tensor, reduction: str, normalizer: float | None = None
) -> Tensor:
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for place, term in terms.items():
        out = out.index_put(tuple(torch.tensor([i]) for i in place), term[None])
    if reduction == "none":
        return out
    return out.sum() if reduction == "sum" else out.sum() / (normalizer or max(len(terms), 1))


def rows(labels: Tensor, mask: Tensor | None) -> list[tuple[int, ...]]:
    mask = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
    return [tuple(x) for x in (mask & (labels != -100)).nonzero().tolist()]


def others(x: Tensor, c: int) -> Tensor:
    return torch.cat([x[:c], x[c + 1 :]])


def nkd(logits: Tensor, teacher_logits: Tensor, labels: Tensor, mask: Tensor | None = None, gamma: float = 1.5,
        non_target_temperature: float = 1.0, reduction: str = "mean",
        normalizer: float | None = None) -> Tensor:  # fmt: skip
    terms = {}
    for i in rows(labels, mask):
        s, t, c = logits[i], teacher_logits[i].detach(), int(labels[i])
        p, q = t.softmax(-1), s.softmax(-1)
        p_others = (others(t, c) / non_target_temperature).softmax(-1)
        q_others = (others(s, c) / non_target_temperature).softmax(-1)
        terms[i] = -p[c] * q[c].log() - gamma * non_target_temperature**2 * (p_others * q_others.log()).sum()
    return by_row(terms, labels, reduction, normalizer)


def uskd(logits: Tensor, weak_logits: Tensor, labels: Tensor, mask: Tensor, alpha: float = 1.0, beta: float = 0.1,
         mu: float = 0.005, code_ranking: bool = False, reduction: str = "mean") -> Tensor:  # fmt: skip
    places = rows(labels, mask)
    squares = [logits[i].detach().softmax(-1)[int(labels[i])] ** 2 for i in places]
    terms = {}
    for i, square in zip(places, squares, strict=True):
        q, w, c = logits[i].softmax(-1), weak_logits[i].softmax(-1), int(labels[i])
        weight = square + 1 - sum(squares) / len(squares)
        second = q.log() / (1 - q[c].log()) if code_ranking else q / (1 - q[c])
        score = (w / (1 - w[c]) + second).tolist()
        zipf = torch.tensor([1 / (1 + sum(other > x for other in score)) for x in score], dtype=torch.float64)
        zipf = others(zipf, c) / others(zipf, c).sum()
        smooth = torch.full_like(w, 0.1 / len(w)).detach()
        smooth[c] += 0.9
        terms[i] = (
            -alpha * weight * q[c].log()
            - beta * (zipf * (others(q, c) / others(q, c).sum()).log()).sum()
            - mu * (smooth * w.log()).sum()
        )
    return by_row(terms, labels, reduction)


def ofa(logits: Tensor, teacher_logits: Tensor, labels: Tensor, mask: Tensor | None = None, eps: float = 1.0,
        temperature: float = 1.0, reduction: str = "mean", normalizer: float | None = None) -> Tensor:  # fmt: skip
    terms = {}
    for i in rows(labels, mask):
        p, q = (teacher_logits[i].detach() / temperature).softmax(-1), (logits[i] / temperature).softmax(-1)
        label = torch.zeros_like(p)
        label[int(labels[i])] = 1
        terms[i] = -(((p + label) ** eps - label) * q.log()).sum()
    return by_row(terms, labels, reduction, normalizer)


CASES = [
    Case("nkd_loss", GOLDEN, value=2.5171247905, name="golden",
         gradients={"logits": [0.6842692461, -0.4282732618, -0.1293596875, -0.1266362968]}),
    Case("nkd_loss", GOLDEN, {"gamma": 3.5, "non_target_temperature": 3.0}, value=35.5460247141, name="golden-cifar",
         gradients={"logits": [1.4227352955, -0.4282732618, -0.6702343192, -0.3242277146]}),
    Case("nkd_loss", ROWS, {"non_target_temperature": 2.0}, expected=nkd, roles=STUDENT_AND_TEACHER),
    Case("nkd_loss", ROWS, {"reduction": "none"}, expected=nkd, name="none"),
    Case("nkd_loss", ROWS, {"normalizer": 5.0}, expected=nkd, name="normalizer"),
    Case("uskd_loss", WEAK, {"beta": 0.5, "mu": 0.2}, expected=uskd, trained=("logits", "weak_logits"), reads="torch",
         roles=("logits", "weak_logits")),
    Case("uskd_loss", WEAK, {"alpha": 0.1, "code_ranking": True, "reduction": "sum"}, expected=uskd,
         trained=("logits", "weak_logits"), reads="torch", name="code"),
    Case("ofa_loss", GOLDEN, {"eps": 1.5}, value=1.7812039005, name="golden",
         gradients={"logits": [0.5963652587, -0.6821730504, 0.0201543976, 0.0656533941]}),
    Case("ofa_loss", GOLDEN, value=1.5394339768, name="golden-soft-cross-entropy", reads="R0",
         gradients={"logits": [0.4014323084, -0.3504621521, -0.0335192609, -0.0174508954]}),
    Case("ofa_loss", ROWS, {"eps": 1.5, "temperature": 2.0}, expected=ofa, roles=STUDENT_AND_TEACHER),
    Case("ofa_loss", ROWS, {"eps": 0.5, "reduction": "none"}, expected=ofa, name="none"),
    Case("ofa_loss", ROWS, {"temperature": 0.7, "normalizer": 9.0}, expected=ofa, name="plain", reads="R0"),
]  # fmt: skip
