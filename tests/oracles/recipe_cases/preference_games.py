"""Papers 30, 56, 68: definitions answer by answer and pair by pair."""

from __future__ import annotations

import math

import torch
from recipe_case import Case, batch, double
from torch import Tensor

BATCH = batch(sequences=6, seed=28)
ANSWERS = {
    "logprobs": BATCH["old_logprobs"], "reference_logprobs": BATCH["teacher_logprobs"],
    "target_logprobs": BATCH["base_logprobs"], "opponent_preference": double(0.1, 0.9, 0.5, 0.3, 0.8, 0.6),
    "mask": BATCH["mask"],
}  # fmt: skip
RATIOS = ("first_log_ratios", "second_log_ratios")
PAIRS = {
    "first_log_ratios": double(0.4, -1.0, 2.0), "second_log_ratios": double(-0.2, 0.3, 1.0),
    "first_preferences": double(0.7, 0.2, 0.9), "second_preferences": double(0.4, 0.5, 0.1),
}  # fmt: skip
PREFERENCES = ("first_preferences", "second_preferences")
OWN = ("chosen_logprobs", "rejected_logprobs")
INPO = {
    "chosen_logprobs": double(-9.0, -7.0), "rejected_logprobs": double(-8.0, -7.5),
    "reference_chosen_logprobs": double(-11.0, -7.7), "reference_rejected_logprobs": double(-9.2, -6.0),
    "old_chosen_logprobs": double(-9.9, -7.1), "old_rejected_logprobs": double(-8.1, -8.5),
}  # fmt: skip


def mirror_prox(logprobs: Tensor, reference_logprobs: Tensor, target_logprobs: Tensor, opponent_preference: Tensor,
                mask: Tensor, beta: float, eta: float) -> Tensor:  # fmt: skip
    losses = []
    for i, kept in enumerate(mask):
        own, reference, target = (x[i][kept].sum() for x in (logprobs, reference_logprobs, target_logprobs))
        pull = opponent_preference[i] - 0.5 + beta * (own - reference)
        if eta != math.inf:
            pull = pull + beta / eta * (own - target)
        losses.append(pull.detach() * own)
    return torch.stack(losses).mean()


def online_ipo(first_log_ratios: Tensor, second_log_ratios: Tensor, first_preferences: Tensor,
               second_preferences: Tensor, beta: float = 0.1) -> Tensor:  # fmt: skip
    wanted = (first_preferences - second_preferences) / beta
    return ((first_log_ratios - second_log_ratios) - wanted).pow(2).mean()


def inpo(chosen_logprobs: Tensor, rejected_logprobs: Tensor, reference_chosen_logprobs: Tensor,
         reference_rejected_logprobs: Tensor, old_chosen_logprobs: Tensor, old_rejected_logprobs: Tensor,
         eta: float = 7.5e-3, tau: float = 2.5e-3) -> Tensor:  # fmt: skip
    h = chosen_logprobs - rejected_logprobs
    h = h - tau / eta * (reference_chosen_logprobs - reference_rejected_logprobs)
    h = h - (eta - tau) / eta * (old_chosen_logprobs - old_rejected_logprobs)
    return (h - 1 / (2 * eta)).pow(2).mean()


CASES = [
    Case("mirror_prox_loss", ANSWERS, {"beta": 0.3, "eta": 0.6}, expected=mirror_prox, trained=("logprobs",),
         roles=("reference_logprobs", "target_logprobs")),
    Case("mirror_prox_loss", ANSWERS, {"beta": 0.3, "eta": math.inf}, expected=mirror_prox, trained=("logprobs",),
         roles=("logprobs", "reference_logprobs"), name="without-target"),
    Case("online_ipo_loss", PAIRS, expected=online_ipo, trained=RATIOS, roles=PREFERENCES),
    Case("online_ipo_loss", PAIRS, {"beta": 0.7}, expected=online_ipo, trained=RATIOS, roles=RATIOS, name="beta"),
    Case("inpo_loss", INPO, expected=inpo, trained=OWN, roles=("reference_chosen_logprobs", "old_chosen_logprobs")),
    Case("inpo_loss", INPO, {"eta": 0.3, "tau": 0.2}, expected=inpo, trained=OWN, roles=OWN, name="eta"),
]  # fmt: skip
