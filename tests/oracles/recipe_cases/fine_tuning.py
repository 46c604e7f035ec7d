"""Papers 58, 74, 103: the facts' golden rows, and definitions over batches with masks."""

from __future__ import annotations

import torch
from recipe_case import Case, S, T, Y, batch, logprob, pick, row
from torch import Tensor

ONE = {"logits": row(S), "labels": torch.tensor([[Y]])}
BATCH = batch(seed=1)
BATCH["labels"] = BATCH["token_ids"].clone()
BATCH["labels"][1, 1] = -100
LABELLED = pick(BATCH, "logits", "labels", "mask")
ANCHORED = LABELLED | {"reference_logits": BATCH["base_logits"]}
ACTIONS = pick(BATCH, "logits", "mask") | {
    "clone_logits": BATCH["base_logits"], "action_values": BATCH["teacher_logits"]
}  # fmt: skip
SUB_TOKENS = {
    "coarse_logits": BATCH["logits"], "fine_logits": BATCH["teacher_logits"][..., :5], "coarse_labels": BATCH["labels"],
    "fine_labels": torch.where(BATCH["token_ids"] == 2, -100, BATCH["token_ids"] % 5), "mask": BATCH["mask"],
}  # fmt: skip


def mean(x: Tensor, mask: Tensor) -> Tensor:
    return x[mask].sum() / max(int(mask.sum()), 1)


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1)


def dft(logits: Tensor, labels: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    own = logprob(logits / temperature, labels.clamp_min(0))
    return mean(-own.detach().exp() * own, mask & (labels != -100))


def asft(logits: Tensor, reference_logits: Tensor, labels: Tensor, mask: Tensor, kl_coef: float = 0.05,
         kind: str = "reverse_kl") -> Tensor:  # fmt: skip
    pair = (logits, reference_logits) if kind == "reverse_kl" else (reference_logits, logits)
    return dft(logits, labels, mask) + kl_coef * mean(kl(*pair), mask & (labels != -100))


def demonstrations(logits: Tensor, clone_logits: Tensor, action_values: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    return mean(kl_coef * kl(logits, clone_logits) - (logits.softmax(-1) * action_values).sum(-1), mask)


def sub_tokens(coarse_logits: Tensor, fine_logits: Tensor, coarse_labels: Tensor, fine_labels: Tensor,
               mask: Tensor) -> Tensor:  # fmt: skip
    pairs = ((coarse_logits, coarse_labels), (fine_logits, fine_labels))
    return sum(mean(-logprob(x, y.clamp_min(0)), mask & (y != -100)) for x, y in pairs) / 2


CASES = [
    Case("asft_loss", ANCHORED, expected=asft, roles=("logits", "reference_logits")),
    Case("asft_loss", ANCHORED, {"kl_coef": 0.4, "kind": "forward_kl"}, expected=asft, name="forward",
         roles=("logits", "reference_logits")),
    Case("asft_loss", ONE | {"reference_logits": row(T)}, value=0.3102664942, name="golden",
         gradients={"logits": [0.1290576741, -0.1454925210, 0.0037738687, 0.0126609782]}),
    Case("asft_loss", ONE | {"reference_logits": row(T)}, {"kind": "forward_kl"}, value=0.3119872991,
         gradients={"logits": [0.1325831914, -0.1508630911, 0.0039256585, 0.0143542412]}, name="golden-forward"),
    Case("dft_loss", ONE, value=0.2919105444, name="golden",
         gradients={"logits": [0.1125115760, -0.1333399835, 0.0056016215, 0.0152267860]}),
    Case("dft_loss", LABELLED, {"temperature": 0.8}, expected=dft),
    Case("demonstration_regularized_loss", ACTIONS, {"kl_coef": 0.5}, expected=demonstrations,
         roles=("clone_logits", "action_values")),
    Case("two_vocabulary_cross_entropy", SUB_TOKENS, expected=sub_tokens, trained=("coarse_logits", "fine_logits")),
]  # fmt: skip
