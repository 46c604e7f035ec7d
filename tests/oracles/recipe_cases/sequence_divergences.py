"""Papers 8, 11, 25, 32: definitions sample by sample."""

from __future__ import annotations

import math

import torch
from recipe_case import Case, S, T, batch, double, pick, row
from torch import Tensor

BATCH = batch(seed=14)
SAMPLES = {
    "sequence_logprobs": double(-3.0, -2.2, -4.5, -1.0, -2.5), "target_scores": double(-2.5, -4.0, -3.0, -7.0, -2.0),
    "proposal_logprobs": double(-3.3, -2.0, -4.0, -1.2, -2.4), "log_z": double(0.4)[0],
    "mask": torch.tensor([True, True, False, True, True]),
}  # fmt: skip
SCORED = pick(SAMPLES, "sequence_logprobs", "target_scores", "log_z")
RATIOS = {"log_ratio": BATCH["logits"][..., 0] / 3, "mask": BATCH["mask"]}


def slope(name: str, t: Tensor, alpha: float) -> Tensor:
    """f' of the paper's table, by t itself."""
    return {
        "js": math.log(2) - (1 + 1 / t).log(), "forward_kl": -1 / t, "reverse_kl": t.log() + 1,
        "tvd": 0.5 * torch.sign(t - 1), "forward_chi2": 1 - t**-2.0, "reverse_chi2": 2 * (t - 1),
        "alpha": (1 - t**-alpha) / alpha, "hellinger": -0.5 * t**-0.5, "jeffreys": t.log() - 1 / t,
    }[name]  # fmt: skip


def rewards(sequence_logprobs: Tensor, target_scores: Tensor, log_z: Tensor, divergence: str = "js",
            alpha: float = 0.5, log_t_clamp: float = math.inf) -> Tensor:  # fmt: skip
    t = sequence_logprobs.exp() / (target_scores.exp() / log_z.exp())
    return -slope(divergence, t.clamp(math.exp(-log_t_clamp), math.exp(log_t_clamp)), alpha)


def dpg(sequence_logprobs: Tensor, target_scores: Tensor, log_z: Tensor, proposal_logprobs: Tensor, mask: Tensor,
        divergence: str = "js", alpha: float = 0.5, baseline: float = 0.0, log_t_clamp: float = math.inf,
        normalizer: float | None = None) -> Tensor:  # fmt: skip
    reward = rewards(sequence_logprobs.detach(), target_scores, log_z, divergence, alpha, log_t_clamp)
    weight = sequence_logprobs.detach().exp() / proposal_logprobs.exp() * (reward - baseline)
    kept = -(weight * sequence_logprobs)[mask]
    return kept.sum() / (normalizer or max(len(kept), 1))


def log_z(target_scores: Tensor, proposal_logprobs: Tensor, log_z: Tensor, count: float = 0) -> Tensor:
    kept = target_scores.exp() / proposal_logprobs.exp()
    total = count + len(kept)
    return torch.stack([((kept.sum() + count * log_z.exp()) / total).log(), torch.tensor(total).double()])


def implicit(log_ratio: Tensor, mask: Tensor, beta: float = 1.0, kind: str = "total_variation",
             floor: float | None = None, normalizer: float | None = None) -> Tensor:  # fmt: skip
    values = []
    for u in beta * log_ratio[mask]:
        if floor is not None and u < floor:
            at = torch.tensor(floor, dtype=torch.float64, requires_grad=True)
            value = phi(kind, at)
            values.append(value.detach() + torch.autograd.grad(value, at)[0] * (u - floor))
        else:
            values.append(phi(kind, u))
    return -sum(values, torch.zeros(())) / (normalizer or max(len(values), 1))


def phi(kind: str, u: Tensor) -> Tensor:
    return {
        "total_variation": lambda: u, "hellinger": lambda: u / (1 + u), "chi2": lambda: 2 * (torch.sqrt(1 + u) - 1),
        "iq_chi2": lambda: u - u * u / 4,
    }[kind]()  # fmt: skip


DIVERGENCES = ("forward_kl", "reverse_kl", "tvd", "forward_chi2", "reverse_chi2", "alpha", "hellinger", "jeffreys")
TEXTS = ("sequence_logprobs",)
POSTERIOR = {"reference_logits": BATCH["logits"], "rewards": BATCH["teacher_logits"]}
assert {x < -0.4 for x in (RATIOS["log_ratio"][RATIOS["mask"]] * 0.7).tolist()} == {True, False}

CASES = [
    Case("f_dpg_loss", SAMPLES, expected=dpg, trained=TEXTS, roles=("target_scores", "proposal_logprobs")),
    *(Case("f_dpg_loss", SAMPLES, {"divergence": name, "baseline": 0.3}, expected=dpg, trained=TEXTS, name=name)
      for name in DIVERGENCES),
    Case("f_dpg_loss", SAMPLES, {"divergence": "forward_kl", "log_t_clamp": 0.5, "normalizer": 3.0}, expected=dpg,
         trained=TEXTS, name="clamped"),
    Case("f_dpg_loss", SAMPLES, {"divergence": "alpha", "alpha": 0.2}, expected=dpg, trained=TEXTS, name="alpha-.2"),
    Case("f_dpg_rewards", SCORED, expected=rewards, trained=()),
    Case("f_dpg_rewards", SCORED, {"divergence": "reverse_kl", "log_t_clamp": 1.0}, expected=rewards, trained=(),
         name="clamped"),
    Case("running_log_z", pick(SAMPLES, "target_scores", "proposal_logprobs", "log_z"), {"count": 6},
         expected=log_z, trained=(), name="later"),
    Case("acceptance_kl", {"rate": double(0.25, 1.0)}, value=[math.log(4), 0.0], trained=()),
    Case("posterior_logits", POSTERIOR, {"beta": 0.7}, trained=(), roles=("reference_logits", "rewards"),
         expected=lambda reference_logits, rewards, beta: reference_logits + rewards / beta),
    Case("posterior_logits", {"reference_logits": row(T), "rewards": row(S)}, {"beta": 2.0}, trained=(),
         value=[[[t + s / 2 for t, s in zip(T, S, strict=True)]]], name="golden"),
    Case("implicit_reward_loss", RATIOS, {"beta": 0.7}, expected=implicit, trained=("log_ratio",)),
    Case("implicit_reward_loss", RATIOS, {"beta": 0.7, "kind": "hellinger", "floor": -0.4}, expected=implicit,
         trained=("log_ratio",), name="hellinger"),
    Case("implicit_reward_loss", RATIOS, {"beta": 0.7, "kind": "chi2", "floor": -0.4, "normalizer": 20.0},
         expected=implicit, trained=("log_ratio",), name="chi2"),
    Case("implicit_reward_loss", RATIOS, {"kind": "iq_chi2"}, expected=implicit, trained=("log_ratio",), name="iq"),
]  # fmt: skip
