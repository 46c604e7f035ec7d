"""Papers 23, 54, 55, 66: the facts' golden rows, and definitions pair by pair."""

from __future__ import annotations

import math

import torch
from recipe_case import Case, double
from torch import Tensor

PAIRS = {"chosen_log_ratios": double(0.8, -1.3, 0.1, -0.4), "rejected_log_ratios": double(-0.5, -0.2, 2.0, 0.6)}
BOTH = ("chosen_log_ratios", "rejected_log_ratios")
ONE = {"chosen_log_ratios": double(0.3), "rejected_log_ratios": double(-0.4)}
ERRORS = {
    "chosen_errors": double(0.5, 1.2, 0.3), "rejected_errors": double(0.7, 0.9, 0.2),
    "reference_chosen_errors": double(0.6, 1.0, 0.1), "reference_rejected_errors": double(0.4, 1.1, 0.25),
}  # fmt: skip


def logistic(z: Tensor, smoothing: float = 0.0) -> Tensor:
    return (1 - smoothing) * (1 + (-z).exp()).log() + smoothing * (1 + z.exp()).log()


def slope(log_ratio: Tensor, divergence: str, alpha: float) -> Tensor:
    """f' of u, by its formula in u."""
    u = log_ratio.exp()
    return {
        "reverse_kl": u.log(), "forward_kl": -1 / u, "js": (2 * u / (1 + u)).log(), "alpha": (1 - u**-alpha) / alpha,
    }[divergence]  # fmt: skip


def f_dpo(chosen_log_ratios: Tensor, rejected_log_ratios: Tensor, beta: float, divergence: str = "reverse_kl",
          alpha: float = 0.5, log_ratio_clamp: float = math.inf) -> Tensor:  # fmt: skip
    chosen, rejected = (
        slope(x.clamp(-log_ratio_clamp, log_ratio_clamp), divergence, alpha)
        for x in (chosen_log_ratios, rejected_log_ratios)
    )
    return logistic(beta * (chosen - rejected)).mean()


def genarm(chosen_logprobs: Tensor, rejected_logprobs: Tensor, beta: float = 0.05,
           label_smoothing: float = 0.0) -> Tensor:  # fmt: skip
    return logistic(beta * (chosen_logprobs - rejected_logprobs), label_smoothing).mean()


def xpo(chosen_log_ratios: Tensor, rejected_log_ratios: Tensor, reference_sample_logprobs: Tensor, alpha: float = 1e-5,
        beta: float = 0.1, link: str = "logistic") -> Tensor:  # fmt: skip
    z = chosen_log_ratios - rejected_log_ratios
    pair = logistic(beta * z) if link == "logistic" else (z - 1 / (2 * beta)) ** 2
    return pair.mean() + alpha * reference_sample_logprobs.mean()


def diffusion_dpo(chosen_errors: Tensor, rejected_errors: Tensor, reference_chosen_errors: Tensor,
                  reference_rejected_errors: Tensor, beta: float) -> Tensor:  # fmt: skip
    inside = (chosen_errors - reference_chosen_errors) - (rejected_errors - reference_rejected_errors)
    return logistic(-beta / 2 * inside).mean()


def reward_weighted(errors: Tensor, rewards: Tensor) -> Tensor:
    return torch.stack([e * r.exp() for e, r in zip(errors, rewards, strict=True)]).mean()


SAMPLE = {"reference_sample_logprobs": double(-9.0, -14.0, -3.0, -7.0)}
BOTH_LOGPROBS, BOTH_ERRORS = ("chosen_logprobs", "rejected_logprobs"), ("chosen_errors", "rejected_errors")
LOGPROBS = {"chosen_logprobs": double(-12.0, -7.5, -9.0), "rejected_logprobs": double(-8.0, -9.5, -30.0)}
GOLDEN = {"reverse_kl": 0.6587595555, "forward_kl": 0.6563017045, "js": 0.6753749678}
RATED = {"errors": double(0.5, 1.5, 0.1), "rewards": double(0.3, -1.0, 2.0)}
CHOICES = [("reverse_kl", {}), ("forward_kl", {}), ("js", {}), ("alpha", {"alpha": 0.3}), ("alpha", {"alpha": 0.7})]
THREE = (*BOTH, "reference_sample_logprobs")
CASES = [
    *(
        Case("f_dpo_loss", PAIRS, {"beta": 0.4, "divergence": name} | alpha | clamp, expected=f_dpo, trained=BOTH,
             roles=BOTH, name="-".join([name, *map(str, alpha.values()), *clamp]))
        for name, alpha in CHOICES for clamp in ({}, {"log_ratio_clamp": 0.9})
    ),
    *(
        Case("f_dpo_loss", ONE, {"beta": 0.1, "divergence": name}, value=value, trained=BOTH, name=f"golden-{name}")
        for name, value in GOLDEN.items()
    ),
    Case("f_dpo_loss", ONE, {"beta": 0.1, "divergence": "alpha", "alpha": 0.3}, value=0.6581862454, trained=BOTH,
         name="golden-alpha"),
    Case("genarm_loss", LOGPROBS, expected=genarm, trained=BOTH_LOGPROBS, roles=BOTH_LOGPROBS),
    Case("genarm_loss", LOGPROBS, {"beta": 0.5, "label_smoothing": 0.1}, expected=genarm, trained=BOTH_LOGPROBS,
         name="smoothed"),
    Case("xpo_loss", PAIRS | SAMPLE, {"alpha": 0.02}, expected=xpo, trained=THREE, roles=BOTH),
    Case("xpo_loss", PAIRS | SAMPLE, {"alpha": 0.02, "link": "ipo", "beta": 0.3}, expected=xpo, trained=THREE,
         roles=BOTH, name="ipo"),
    Case("diffusion_dpo_loss", ERRORS, {"beta": 3.0}, expected=diffusion_dpo, roles=BOTH_ERRORS, trained=BOTH_ERRORS),
    Case("reward_weighted_loss", RATED, expected=reward_weighted, trained=("errors",), roles=("errors", "rewards")),
]  # fmt: skip
