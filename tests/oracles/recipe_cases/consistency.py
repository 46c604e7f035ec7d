"""Papers 80, 87: golden rows, and definitions row by row."""

from __future__ import annotations

import math

import torch
from recipe_case import B, Case, S, T, batch, double, pick, row
from torch import Tensor

BATCH = batch(seed=12)
KEPT = torch.tensor([True, False, True, True, True])
BOTH = pick(BATCH, "logits", "mask") | {"other_logits": BATCH["teacher_logits"]}
GOLDEN = {"logits": row(S), "other_logits": row(T)}
VIEWS = {
    "original": BATCH["logits"][0], "augmented": BATCH["teacher_logits"][0], "mixed": BATCH["old_logits"][1],
    "interpolated": BATCH["base_logits"][1], "mask": KEPT,
}  # fmt: skip
IMAGES = ("original", "augmented", "mixed", "interpolated")
FREQUENCIES = torch.linspace(-1, 1, 7, dtype=torch.float64).log_softmax(-1)


def mean(values: list[Tensor], count: float) -> Tensor:
    return sum(values, torch.zeros((), dtype=torch.float64)) / max(count, 1)


def kl(first: Tensor, second: Tensor) -> Tensor:
    """KL of softmaxes, the first's first."""
    return (first.softmax(-1) * (first.softmax(-1).log() - second.softmax(-1).log())).sum()


def square(logits: Tensor, other_logits: Tensor, mask: Tensor, reduction: str = "mean") -> Tensor:
    values = ((logits.softmax(-1) - other_logits.softmax(-1)) ** 2).sum(-1) / logits.shape[-1]
    if reduction == "none":
        return torch.where(mask, values, 0.0)
    return mean(list(values[mask]), int(mask.sum()))


def semixup(original: Tensor, augmented: Tensor, mixed: Tensor, interpolated: Tensor, mask: Tensor,
            weights: tuple[float, float, float] = (2.0, 4.0, 2.0), distance: str = "mse") -> Tensor:  # fmt: skip
    def apart(a: Tensor, b: Tensor) -> Tensor:
        if distance == "mse":
            return ((a.softmax(-1) - b.softmax(-1)) ** 2).sum() / len(a)
        return kl(b, a) / len(a)

    values = [
        weights[0] * apart(v, z) + weights[1] * apart(m, i) + weights[2] * (apart(z, m) + apart(m, v))
        for z, v, m, i, kept in zip(original, augmented, mixed, interpolated, mask, strict=True) if kept
    ]  # fmt: skip
    return mean(values, len(values))


def mutual(logits: Tensor, other_logits: Tensor, mask: Tensor | None = None, temperature: float = 0.1,
           double_softmax: bool = False) -> Tensor:  # fmt: skip
    mask = torch.ones(logits.shape[:-1], dtype=torch.bool) if mask is None else mask
    values = []
    for s, t in zip(logits[mask] / temperature, other_logits[mask] / temperature, strict=True):
        q, p = s.softmax(-1), t.softmax(-1)
        values.append((q * (q.softmax(-1).log() - p.softmax(-1).log())).sum() if double_softmax else kl(s, t))
    return mean(values, len(values))


def spread(logits: Tensor, mask: Tensor | None = None, temperature: float = 0.1, coef: float = 2.0) -> Tensor:
    rows = (logits / temperature).softmax(-1).reshape(-1, logits.shape[-1])
    rows = rows if mask is None else rows[mask.reshape(-1)]
    m = sum(rows) / len(rows)
    return coef * (math.log(len(m)) + (m * m.log()).sum())


def local(logits: Tensor, log_frequencies: Tensor, mask: Tensor, temperature: float = 0.05, margin: float = 0.4,
          normalizer: float | None = None) -> Tensor:  # fmt: skip
    values = [
        -((z / temperature).softmax(-1) * (z / temperature + margin * log_frequencies).softmax(-1).log()).sum()
        for z in logits[mask]
    ]
    return mean(values, mask.numel() if normalizer is None else normalizer)


def legogcd(logits: Tensor, other_logits: Tensor, labels: Tensor, log_frequencies: Tensor, known_classes: int,
            teacher_temperature: float, temperature: float = 0.1, supervised_weight: float = 0.35,
            entropy_coef: float = 2.0, local_coef: float = 2.0, threshold: float = 0.7,
            local_temperature: float = 0.05, margin: float = 0.4, double_softmax: bool = False) -> Tensor:  # fmt: skip
    cluster, label, chosen = [], [], []
    for view, other in ((logits, other_logits), (other_logits, logits)):
        for z, z_other, y in zip(view, other, labels.tolist(), strict=True):
            q, p = (z / temperature).softmax(-1), (z_other.detach() / teacher_temperature).softmax(-1)
            cluster.append(-(p * q.log()).sum())
            if y >= 0:
                label.append(-q[y].log())
            chosen.append(y < 0 and q.max().item() >= threshold and int(q.argmax()) < known_classes)
    assert 0 < sum(chosen) < len(chosen) - len(label), "rows of each kind"
    both = torch.cat([logits, other_logits])
    unsupervised = (
        mean(cluster, len(cluster)) + spread(both, None, temperature, entropy_coef)
        + mutual(logits, other_logits, None, temperature, double_softmax)
    )  # fmt: skip
    reward = local(both, log_frequencies, torch.tensor(chosen), local_temperature, margin)
    supervised = supervised_weight * mean(label, len(label))
    return (1 - supervised_weight) * unsupervised + supervised + local_coef * reward


LEGO = {
    "logits": BATCH["logits"][0] / 3, "other_logits": BATCH["logits"][0] / 3 + BATCH["teacher_logits"][1] / 9,
    "labels": torch.tensor([3, -100, -100, 0, -100]), "log_frequencies": FREQUENCIES,
}  # fmt: skip
TRAINED = ("logits", "other_logits")

CASES = [
    Case("softmax_mse", GOLDEN, value=0.0713499232, trained=TRAINED, name="golden",
         gradients={"logits": [0.0620507406, -0.0457214580, -0.0045992695, -0.0117300131],
                    "other_logits": [-0.0710191577, 0.0742313292, -0.0008682945, -0.0023438769]}),
    Case("softmax_mse", BOTH, expected=square, trained=TRAINED),
    Case("softmax_mse", BOTH, {"reduction": "none"}, expected=square, trained=TRAINED, name="none"),
    Case("semixup_loss", VIEWS, expected=semixup, trained=IMAGES),
    Case("semixup_loss", VIEWS, {"distance": "kl", "weights": (1.0, 3.0, 0.5)}, expected=semixup, trained=IMAGES,
         reads="R1", name="kl"),
    Case("mutual_kl", GOLDEN, {"temperature": 1.0}, value=0.3671189964, trained=TRAINED, reads="R0", name="golden",
         gradients={"logits": [0.3309219614, -0.2430507488, -0.0365550558, -0.0513161568],
                    "other_logits": [-0.4014323084, 0.3504621521, 0.0335192609, 0.0174508954]}),
    Case("mutual_kl", BOTH, {"temperature": 0.7}, expected=mutual, trained=TRAINED, reads="R0", roles=TRAINED),
    Case("mutual_kl", BOTH, {"double_softmax": True, "temperature": 0.7}, expected=mutual, trained=TRAINED,
         name="code"),
    Case("mean_entropy_maximisation", pick(BOTH, "logits", "mask"), {"temperature": 1.0}, expected=spread),
    Case("local_entropy", {"logits": row(S), "log_frequencies": double(*B).log_softmax(-1)}, {"temperature": 0.5},
         value=0.2920519816, gradients={"logits": [-0.4179841155, 0.2597122397, 0.0268223068, 0.1314495690]},
         reads="R1", name="golden"),
    Case("local_entropy", pick(BOTH, "logits", "mask") | {"log_frequencies": FREQUENCIES}, {"temperature": 0.7},
         expected=local, reads="R1"),
    Case("local_entropy", pick(BOTH, "logits", "mask") | {"log_frequencies": FREQUENCIES},
         {"temperature": 0.7, "normalizer": 3.0}, expected=local, reads="R1", name="normalizer"),
    Case("legogcd_loss", LEGO, {"known_classes": 4, "teacher_temperature": 0.07}, expected=legogcd, trained=TRAINED),
    Case("legogcd_loss", LEGO, {"known_classes": 5, "teacher_temperature": 0.3, "temperature": 0.3,
         "threshold": 0.4, "double_softmax": True}, expected=legogcd, trained=TRAINED, name="code"),
]  # fmt: skip
