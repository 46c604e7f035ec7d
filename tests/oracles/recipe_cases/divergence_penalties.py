"""Papers 22, 31, 42: the facts' golden rows, and definitions over batches with masks."""

from __future__ import annotations

import math

import torch
from recipe_case import Case, S, T, Y, batch, double, logprob, pick, row
from torch import Tensor

IDS = torch.tensor([[Y]])
STORED = {"logits": row(S), "token_ids": IDS, "reference_logprobs": logprob(row(T), IDS)}
ONE = {
    "logits": row(S), "reference_logits": row(T), "token_ids": IDS, "advantages": double(0.0), "power": double(1.0),
    "old_logprobs": logprob(row(S), IDS),
}  # fmt: skip
NO_ENTROPY = {"kl_coef": 1.0, "entropy_coef": 0.0}
BATCH = batch(sequences=6, seed=22)
ANSWERS = pick(BATCH, "logits", "token_ids", "mask")
SAMPLED = ANSWERS | {"reference_logprobs": BATCH["teacher_logprobs"]}
RAPO = ANSWERS | pick(BATCH, "advantages", "old_logprobs") | {
    "reference_logits": BATCH["teacher_logits"], "power": double(0.2, 1.0, 0.5, 0.7, 0.05, 0.4),
}  # fmt: skip
BESIDE = pick(BATCH, "logits", "mask") | {"reference_logits": BATCH["base_logits"]}
CHI2, CHI2_GRADIENT = 0.7824190426, [0.7358248545, -0.4661683575, -0.0897350568, -0.1799214402]
RATIOS = double(-12.5, -10.0, -0.3, 0.0, 0.7, 10.0, 11.0)


def dph(logits: Tensor, token_ids: Tensor, reference_logprobs: Tensor, mask: Tensor, coef: float,
        generator: str = "forward_kl", alpha: float = 0.2) -> Tensor:  # fmt: skip
    u = (logprob(logits, token_ids) - reference_logprobs).exp()
    if generator == "forward_kl":
        f = u - 1 - u.log()
    elif generator == "js":
        f = u * u.log() - (u + 1) * ((u + 1) / 2).log()
    else:
        f = (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1))
    return coef * f[mask].mean()


def rapo(logits: Tensor, reference_logits: Tensor, token_ids: Tensor, advantages: Tensor, power: Tensor,
         old_logprobs: Tensor, mask: Tensor, kl_coef: float, entropy_coef: float, kl: str = "full",
         clip: float = 0.2) -> Tensor:  # fmt: skip
    q = logits.log_softmax(-1)
    target = reference_logits.softmax(-1) ** power[:, None, None]
    target = (target / target.sum(-1, keepdim=True)).log()
    logp = logprob(logits, token_ids)
    ratio = (logp - old_logprobs).exp()
    if kl == "full":
        penalty = (target.exp() * (target - q)).sum(-1)
    else:
        u = (target.gather(-1, token_ids[..., None])[..., 0] - logp).exp()
        penalty = u * u.log() - u + 1
        penalty = ratio * penalty if kl == "f3_is" else penalty
    a = advantages[:, None]
    policy = torch.maximum(-ratio * a, -ratio.clamp(1 - clip, 1 + clip) * a)
    per_token = policy + kl_coef * penalty + entropy_coef * (q.exp() * q).sum(-1)
    return torch.stack([per_token[i][mask[i]].mean() for i in range(len(mask))]).mean()


def chi2(logits: Tensor, reference_logits: Tensor, mask: Tensor, coef: float, root: str = "batch",
         floor: float = 1e-4) -> Tensor:  # fmt: skip
    q, p = logits.softmax(-1), reference_logits.softmax(-1)
    value = ((q - p).square() / p).sum(-1)[mask]
    if root == "token":
        return coef * value.clamp(min=floor).sqrt().mean()
    return coef * (value.mean().clamp(min=floor).sqrt() if root == "batch" else value.mean())


def estimates(log_ratio: Tensor, bound: float = 10.0) -> tuple[Tensor, Tensor]:
    def held(x: Tensor) -> Tensor:
        return torch.where(x >= bound, math.exp(bound) * (1 + x - bound) - 1, x.clamp(max=bound).exp() - 1)

    return log_ratio + held(-log_ratio), held(log_ratio) + held(-log_ratio)


def sqrt_chi2(log_ratio: Tensor, mask: Tensor, coef: float, floor: float = 1e-4) -> Tensor:
    return coef * estimates(log_ratio)[1][mask].mean().clamp(min=floor).sqrt()


def occupancy(scores: Tensor, coef: float, kind: str = "sqrt_chi2") -> Tensor:
    if kind == "kl":
        return coef * scores
    excess = scores.exp() - 1
    if kind == "chi2":
        return coef * excess
    ordered, left_out = sorted(excess.tolist()), len(excess) // 100
    kept = ordered[left_out : len(ordered) - left_out]
    mean = sum(kept) / len(kept)
    return coef * excess / (math.sqrt(mean) if mean > 0 else 1.0)


SCORES = torch.randn(250, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1
CASES = [
    Case("dph_loss", SAMPLED, {"coef": 0.3}, expected=dph),
    Case("dph_loss", SAMPLED, {"coef": 0.3, "generator": "js"}, expected=dph, name="js"),
    Case("dph_loss", SAMPLED, {"coef": 0.3, "generator": "alpha"}, expected=dph, name="alpha"),
    Case("dph_loss", SAMPLED, {"coef": 0.3, "generator": "alpha", "alpha": 0.7}, expected=dph, name="alpha-0.7"),
    Case("dph_loss", STORED, {"coef": 1.0}, value=0.4782025570, name="golden",
         gradients={"logits": [0.4890151145, -0.5795427424, 0.0243466289, 0.0661809990]}),
    Case("dph_loss", STORED, {"coef": 1.0, "generator": "js"}, value=0.1902179244, name="golden-js",
         gradients={"logits": [0.1646560335, -0.1951375456, 0.0081977412, 0.0222837709]}),
    Case("dph_loss", STORED, {"coef": 1.0, "generator": "alpha"}, value=0.3493404453, name="golden-alpha",
         gradients={"logits": [0.2905618159, -0.3443513025, 0.0144662210, 0.0393232656]}),
    # u = e^4: f is 48.6, which is held at 10.
    Case("dph_loss", STORED | {"reference_logprobs": logprob(row(S), IDS) - 4}, {"coef": 1.0}, value=10.0,
         gradients={"logits": [0.0] * 4}, name="held"),
    Case("rapo_loss", RAPO, {"kl_coef": 0.3, "entropy_coef": 0.05}, expected=rapo,
         roles=("logits", "reference_logits")),
    *(
        Case("rapo_loss", RAPO, {"kl_coef": 0.3, "entropy_coef": 0.05, "kl": kl, "clip": 0.1}, expected=rapo,
             roles=("logits", "reference_logits"), reads="R1", name=kl)
        for kl in ("f3", "f3_is")
    ),
    Case("rapo_loss", ONE | {"power": double(0.5)}, NO_ENTROPY, value=0.3843004690, name="golden",
         gradients={"logits": [0.4127395283, -0.2233735951, -0.1051093111, -0.0842566221]}),
    Case("rapo_loss", ONE, NO_ENTROPY, value=0.4015350945, name="golden-1",
         gradients={"logits": [0.4014323084, -0.3504621521, -0.0335192609, -0.0174508954]}),
    Case("rapo_loss", ONE, {"kl_coef": 0.0, "entropy_coef": 1.0}, value=-0.8782811753, name="golden-entropy",
         gradients={"logits": [0.3805649828, -0.1527515387, -0.0871141654, -0.1406992786]}),
    Case("rapo_loss", ONE, NO_ENTROPY | {"kl": "f3"}, value=1.5359336595, reads="R1", name="golden-f3",
         gradients={"logits": [2.6613287700, -3.1540002103, 0.1324997574, 0.3601716829]}),
    Case("chi2_penalty", BESIDE, {"coef": 0.3}, expected=chi2, roles=("logits", "reference_logits")),
    Case("chi2_penalty", BESIDE, {"coef": 0.3, "root": "token", "floor": 0.5}, expected=chi2, name="token",
         roles=("logits", "reference_logits")),
    Case("chi2_penalty", BESIDE, {"coef": 0.3, "root": "none"}, expected=chi2, name="none",
         roles=("logits", "reference_logits")),
    Case("chi2_penalty", {"logits": row(S), "reference_logits": row(T)}, {"coef": 1.0}, value=0.8845445397,
         gradients={"logits": [0.4159343151, -0.2635075661, -0.0507238770, -0.1017028720]}, name="golden"),
    Case("chi2_penalty", {"logits": row(S), "reference_logits": row(T)}, {"coef": 1.0, "root": "none"}, value=CHI2,
         gradients={"logits": CHI2_GRADIENT}, name="golden-none"),
    Case("chi2_estimate", {"log_ratio": RATIOS}, expected=lambda log_ratio: torch.cat(estimates(log_ratio)),
         trained=("log_ratio",), reads="none"),
    Case("sqrt_chi2_penalty", {"log_ratio": RATIOS / 5, "mask": RATIOS.abs() != 0.7}, {"coef": 0.3},
         expected=sqrt_chi2, trained=("log_ratio",), reads="none"),
    *(
        Case("occupancy_reward_penalty", {"scores": scores}, {"coef": 0.7, "kind": kind}, expected=occupancy,
             trained=(), name=f"{kind}-{len(scores)}")
        for kind in ("sqrt_chi2", "chi2", "kl") for scores in (SCORES, SCORES[:9] - 2)
    ),
]  # fmt: skip
