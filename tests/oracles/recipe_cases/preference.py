"""Papers 5, 59, 70, 92: the facts' golden rows, and definitions pair by pair over batches with masks."""

from __future__ import annotations

import torch
from recipe_case import B, Case, S, T, batch, logprob, pick
from torch import Tensor

# The preferred answer is s with token 1, the other b with token 0, the reference t.
PAIR = {
    "logits": torch.tensor([[S], [B]]).double(), "reference_logits": torch.tensor([[T], [T]]).double(),
    "labels": torch.tensor([[1], [0]]),
}  # fmt: skip
ONES = torch.ones(2, 1, dtype=torch.float64)
BATCH = batch(sequences=6, seed=25)
GIVEN = pick(BATCH, "logits", "mask") | {"reference_logits": BATCH["teacher_logits"], "labels": BATCH["token_ids"]}
DRAWN = torch.Generator().manual_seed(5)
WEIGHTS = {
    name: torch.rand(6, 5, generator=DRAWN, dtype=torch.float64) - less
    for name, less in (("ratio_weights", 0.0), ("kl_weights", 0.2))
}  # fmt: skip
PHRASES = torch.tensor([[0, 1, 1, 0, 2], [3, 0, 0, 1, 1], [0, 0, 1, 1, 0], [1, 1, 0, 0, 2], [0, 2, 1, 1, 1], [1] * 5])
ONLINE = batch(sequences=4, tokens=6, seed=26)
SAMPLES = {
    "online_logprobs": ONLINE["old_logprobs"], "online_reference_logprobs": ONLINE["teacher_logprobs"],
    "online_mask": ONLINE["mask"],
}  # fmt: skip
ROLES = ("logits", "reference_logits")


def parts(logits: Tensor, reference_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Δ and KL(p‖q) of each token."""
    q, p = logits.log_softmax(-1), reference_logits.log_softmax(-1)
    return logprob(logits, labels) - logprob(reference_logits, labels), (p.exp() * (p - q)).sum(-1)


def dpo(z: Tensor, beta: float) -> Tensor:
    return (1 + (-beta * z).exp()).log()


def tdpo(logits: Tensor, reference_logits: Tensor, labels: Tensor, mask: Tensor, version: int = 2, alpha: float = 0.5,
         beta: float = 0.1) -> Tensor:  # fmt: skip
    delta, kl = parts(logits, reference_logits, labels)
    pairs, out = len(labels) // 2, []
    for w in range(pairs):
        l = w + pairs  # noqa: E741
        m_w, m_l, k_w, k_l = (x[i][mask[i]].sum() for x in (delta, kl) for i in (w, l))
        z = m_w - m_l - (k_l - k_w) if version == 1 else m_w - m_l - alpha * (k_l - k_w.detach())
        out.append(dpo(z, beta))
    return torch.stack(out).mean()


def sparsepo(logits: Tensor, reference_logits: Tensor, labels: Tensor, ratio_weights: Tensor, kl_weights: Tensor,
             mask: Tensor, beta: float = 0.1, ratio_l1: float = 1e-3, kl_l1: float = 1e-3) -> Tensor:  # fmt: skip
    delta, kl = parts(logits, reference_logits, labels)
    pairs, out = len(labels) // 2, []
    for w in range(pairs):
        places = [(i, mask[i]) for i in (w, w + pairs)]
        u_w, u_l = ((ratio_weights[i] * delta[i])[kept].sum() for i, kept in places)
        d_w, d_l = ((kl_weights[i] * -kl[i])[kept].sum() for i, kept in places)
        sizes = sum(
            ratio_l1 * ratio_weights[i][kept].abs().sum() + kl_l1 * kl_weights[i][kept].abs().sum()
            for i, kept in places
        )
        out.append(dpo((u_w - u_l) - (d_w - d_l), beta) + sizes)
    return torch.stack(out).mean()


def mapo(activations: Tensor, mask: Tensor) -> Tensor:
    out = torch.zeros_like(activations)
    for i, kept in enumerate(mask):
        own = activations[i][kept]
        own = (own - own.mean()) / own.std()
        out[i, kept] = (own - own.min()) / (own.max() - own.min())
    return out


def rrpo(logits: Tensor, reference_logits: Tensor, labels: Tensor, phrases: Tensor, mask: Tensor, beta: float = 0.1,
         alpha: float = 0.01) -> Tensor:  # fmt: skip
    delta, kl = parts(logits, reference_logits, labels)
    pairs, out = len(labels) // 2, []
    for w in range(pairs):
        margin = torch.zeros((), dtype=torch.float64)
        for phrase in range(1, int(phrases.max()) + 1):
            for i, sign in ((w, 1), (w + pairs, -1)):
                margin = margin + sign * delta[i][mask[i] & (phrases[i] == phrase)].sum()
        out.append(dpo(margin, beta) + alpha * kl[w][mask[w]].sum())
    return torch.stack(out).mean()


def hypo(logits: Tensor, reference_logits: Tensor, labels: Tensor, online_logprobs: Tensor,
         online_reference_logprobs: Tensor, online_mask: Tensor, mask: Tensor | None = None, beta: float = 0.1,
         kl_coef: float = 1e-4) -> Tensor:  # fmt: skip
    mask = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
    pull = []
    for own, other, kept in zip(online_logprobs, online_reference_logprobs, online_mask, strict=True):
        pull.append((own - other)[kept].sum().detach() * own[kept].sum())
    return tdpo(logits, reference_logits, labels, mask, alpha=0.0, beta=beta) + kl_coef * torch.stack(pull).mean()


S_TDPO2 = [0.0378091817, -0.0448085063, 0.0018824083, 0.0051169163]
B_TDPO2 = [0.0347123778, -0.0198047128, -0.0080899402, -0.0068177247]
S_TDPO1 = [0.0163623937, -0.0260327254, 0.0036509435, 0.0060193882]
B_TDPO1 = [0.0366473583, -0.0269770265, -0.0036509435, -0.0060193882]
S_SPARSE = [0.0131482519, -0.0171992104, 0.0013451556, 0.0027058029]
B_SPARSE = [0.0168278823, -0.0096009377, -0.0039218449, -0.0033050997]
SPARSE = GIVEN | WEIGHTS
WHOLE = pick(GIVEN, "logits", "reference_logits", "labels")
MASKS = ("logits", "ratio_weights", "kl_weights")
CASES = [
    Case("tdpo_loss", GIVEN, expected=tdpo, roles=ROLES),
    Case("tdpo_loss", GIVEN, {"alpha": 1.3, "beta": 0.7}, expected=tdpo, name="alpha"),
    Case("tdpo_loss", GIVEN, {"version": 1, "beta": 0.7}, expected=tdpo, name="1"),
    Case("tdpo_loss", PAIR, value=0.7602463116, gradients={"logits": [S_TDPO2, B_TDPO2]}, name="golden"),
    Case("tdpo_loss", PAIR, {"version": 1}, value=0.7552300938, gradients={"logits": [S_TDPO1, B_TDPO1]},
         name="golden-1"),
    Case("sparsepo_loss", SPARSE, {"beta": 0.8}, expected=sparsepo, roles=ROLES, trained=MASKS),
    Case("sparsepo_loss", SPARSE, {"ratio_l1": 0.02, "kl_l1": 0.3}, expected=sparsepo, trained=MASKS,
         roles=("ratio_weights", "kl_weights"), name="l1"),
    Case("sparsepo_loss", PAIR | {"ratio_weights": ONES / 2, "kl_weights": ONES / 4}, {"ratio_l1": 0.0, "kl_l1": 0.0},
         value=0.7261694520, gradients={"logits": [S_SPARSE, B_SPARSE]}, trained=MASKS, name="golden"),
    Case("mapo_weights", {"activations": BATCH["old_logits"][..., 0], "mask": BATCH["mask"]}, expected=mapo,
         trained=()),
    Case("rrpo_loss", GIVEN | {"phrases": PHRASES}, expected=rrpo, roles=ROLES),
    Case("rrpo_loss", GIVEN | {"phrases": PHRASES}, {"alpha": 0.2, "beta": 0.9}, expected=rrpo, name="alpha"),
    # The same answer twice: log 2, and the KL's row.
    Case("rrpo_loss", {"logits": torch.tensor([[S], [S]]).double(), "reference_logits": PAIR["reference_logits"],
         "labels": torch.tensor([[1], [1]]), "phrases": torch.tensor([[0], [0]])}, {"alpha": 1.0},
         value=0.4015350945 + 0.6931471806, name="golden",
         gradients={"logits": [[0.4014323084, -0.3504621521, -0.0335192609, -0.0174508954], [0.0] * 4]}),
    # The mask of the pairs says nothing of the online answers.
    Case("hypo_loss", GIVEN | SAMPLES, {"kl_coef": 0.0}, expected=hypo, roles=ROLES),
    Case("hypo_loss", WHOLE | SAMPLES, {"kl_coef": 0.3, "beta": 0.5}, expected=hypo, name="online",
         trained=("logits", "online_logprobs"), roles=("online_logprobs", "online_reference_logprobs")),
]  # fmt: skip
