"""Papers 2, 20, 28: the facts' golden rows, and definitions over batches with masks."""

from __future__ import annotations

import math

import torch
from recipe_case import B, Case, S, T, Y, batch, double, logprob, pick, row
from torch import Tensor

IDS = torch.tensor([[Y]])
ONE = {
    "logits": row(S), "token_ids": IDS, "advantages": double(0.0), "old_logprobs": logprob(row(B), IDS),
    "reference_logprobs": logprob(row(T), IDS),
}  # fmt: skip
K2, K2_GRADIENT = 0.6807803366, [0.8285867133, -0.9819766342, 0.0412529033, 0.1121370175]
K3, K3_GRADIENT = 1.0450299452, [1.5706623968, -1.8614271133, 0.0781986761, 0.2125660403]
BATCH = batch(sequences=6, seed=21)
POLICY = pick(BATCH, "logits", "token_ids", "advantages", "old_logprobs", "mask")
POLICY |= {"reference_logprobs": BATCH["base_logprobs"]}
ACCURACY = double(0.25, 0.25, 1.0, 0.0, 0.75, 0.5)
LENGTHS = torch.tensor([30, 100, 55, 10, 70, 41])
CORRECT = torch.tensor([True, False, True, False, False, True])
GROUPS = torch.tensor([3, 3, 3, 3, 9, 3])


def ppo(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    ratio, a = log_ratio.exp(), advantages[:, None]
    return torch.maximum(-ratio * a, -ratio.clamp(1 - low, 1 + high) * a)


def k3(logp: Tensor, reference: Tensor) -> Tensor:
    return (reference - logp).exp() - 1 - (reference - logp)


def over_sequences(x: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([x[i][mask[i]].mean() for i in range(len(x))]).mean()


def prorl(logits: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor, reference_logprobs: Tensor,
          mask: Tensor, version: int = 1, kl_coef: float = 1e-4, clip_high: float = 0.4) -> Tensor:  # fmt: skip
    logp = logprob(logits, token_ids)
    x = reference_logprobs - logp
    if version == 1:
        x = x.clamp(-20, 20)
        kl = (x.exp() - 1 - x).clamp(-10, 10)
    else:
        kl = x.clamp(-10, 10).square() / 2
    return (ppo(logp - old_logprobs, advantages, 0.2, clip_high) + kl_coef * kl)[mask].mean()


def dads(advantages: Tensor, accuracy: Tensor, sharpness: float = math.e) -> Tensor:
    out = []
    for a, accurate in zip(advantages.tolist(), accuracy.tolist(), strict=True):
        d = 1 - accurate
        out.append(1 - math.exp(-sharpness * (1 - d)) if a > 0 and 0 < d < 1 else 1.0)
    return double(*out)


def apo(logits: Tensor, token_ids: Tensor, advantages: Tensor, accuracy: Tensor, old_logprobs: Tensor,
        reference_logprobs: Tensor, mask: Tensor, kl_coef: float = 1e-3, clip: float = 0.2,
        sequence_count: float | None = None, normalizer: float | None = None) -> Tensor:  # fmt: skip
    logp = logprob(logits, token_ids)
    policy = ppo(logp - old_logprobs, advantages, clip, clip)[mask].sum() / (normalizer or mask.sum())
    kl, weights = k3(logp, reference_logprobs), dads(advantages, accuracy)
    answers = [w * kl[i][mask[i]].mean() for i, w in enumerate(weights)]
    return policy + kl_coef * sum(answers) / (sequence_count or len(answers))


def stcr(advantages: Tensor, lengths: Tensor, correct: Tensor, groups: Tensor, base: float = 1.00001) -> Tensor:
    out = advantages.tolist()
    for i, length in enumerate(lengths.tolist()):
        right = [lengths[j].item() for j in range(len(out)) if correct[j] and groups[j] == groups[i]]
        if right and not correct[i] and length > sum(right) / len(right):
            out[i] *= 1 + (1 - base ** -(length - sum(right) / len(right)))
    return double(*out)


def fg_expo(logits: Tensor, token_ids: Tensor, advantages: Tensor, accuracy: Tensor, old_logprobs: Tensor,
            reference_logprobs: Tensor, mask: Tensor, kl_coef: float = 0.02) -> Tensor:  # fmt: skip
    logp = logprob(logits, token_ids)
    coef = kl_coef * 0.5 * (math.tanh(accuracy.mean().item()) + 1)
    return over_sequences(ppo(logp - old_logprobs, advantages, 0.2, 0.2) + coef * k3(logp, reference_logprobs), mask)


def difficulty(pass_rates: Tensor, averages: Tensor | None = None, centre: float = 0.5, width: float = 0.35,
               momentum: float = 0.9) -> Tensor:  # fmt: skip
    now = []
    for i, p in enumerate(pass_rates.tolist()):
        before = 0.5 if averages is None else averages[i].item()
        now.append(before if math.isnan(p) else momentum * before + (1 - momentum) * p)
    return double(*(math.exp(-((p - centre) ** 2) / (2 * width**2)) for p in now), *now)


HARD = {"accuracy": ACCURACY}
CASES = [
    Case("prorl_loss", POLICY, {"kl_coef": 0.3}, expected=prorl, roles=("old_logprobs", "reference_logprobs")),
    Case("prorl_loss", POLICY, {"kl_coef": 0.3, "version": 2, "clip_high": 0.1}, expected=prorl, name="2"),
    Case("prorl_loss", ONE, {"kl_coef": 1.0}, value=K3, gradients={"logits": K3_GRADIENT}, name="golden"),
    Case("prorl_loss", ONE, {"kl_coef": 1.0, "version": 2}, value=K2, gradients={"logits": K2_GRADIENT},
         name="golden-2"),
    # Far from the reference: the estimate is held at 10, and k2's logarithm at 10.
    Case("prorl_loss", ONE | {"reference_logprobs": ONE["reference_logprobs"] + 9}, {"kl_coef": 1.0}, value=10.0,
         gradients={"logits": [0.0] * 4}, name="held"),
    Case("prorl_loss", ONE | {"reference_logprobs": ONE["reference_logprobs"] + 9}, {"kl_coef": 1.0, "version": 2},
         value=50.0, gradients={"logits": [0.0] * 4}, name="held-2"),
    Case("apo_loss", POLICY | HARD, {"kl_coef": 0.4}, expected=apo, roles=("old_logprobs", "reference_logprobs")),
    Case("apo_loss", POLICY | HARD, {"kl_coef": 0.4, "clip": 0.05, "sequence_count": 11.0, "normalizer": 40.0},
         expected=apo, name="over-ranks"),
    Case("apo_loss", ONE | {"accuracy": double(0.5)}, {"kl_coef": 1.0}, value=K3, gradients={"logits": K3_GRADIENT},
         name="golden"),
    Case("dads_weights", {"advantages": BATCH["advantages"], "accuracy": ACCURACY}, expected=dads, trained=()),
    Case("stcr_advantages", {"advantages": -ACCURACY - 0.1, "lengths": LENGTHS, "correct": CORRECT, "groups": GROUPS},
         {"base": 1.01}, expected=stcr, trained=()),
    Case("fg_expo_loss", POLICY | {"accuracy": CORRECT.double()}, {"kl_coef": 0.4}, expected=fg_expo,
         roles=("old_logprobs", "reference_logprobs")),
    Case("fg_expo_loss", ONE | {"accuracy": torch.tensor(0.5).double()}, {"kl_coef": 2 / (math.tanh(0.5) + 1)},
         value=K3, gradients={"logits": K3_GRADIENT}, name="golden"),
    Case("difficulty_sampling_weights", {"pass_rates": double(0.0, 1.0, math.nan, 0.6)}, expected=difficulty,
         trained=()),
    Case("difficulty_sampling_weights", {"pass_rates": double(0.2, math.nan, 0.9),
         "averages": double(0.4, 0.1, 0.8)}, {"centre": 0.6, "width": 0.2, "momentum": 0.5}, expected=difficulty,
         trained=(), name="later"),
]  # fmt: skip
