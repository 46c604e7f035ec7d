"""Papers 13, 16, 29, 33, 51: the facts' golden rows, and definitions over batches with masks."""

from __future__ import annotations

import math
from typing import Any

import torch
from recipe_case import B, Case, S, T, Y, batch, logprob, pick, row
from torch import Tensor

IDS = torch.tensor([[Y]])
ONE = {
    "logits": row(S), "token_ids": IDS, "advantages": torch.ones(1).double(), "old_logprobs": logprob(row(B), IDS),
    "teacher_logprobs": logprob(row(T), IDS),
}  # fmt: skip
NO_REWARD = {"advantages": torch.zeros(1).double()}
FKL, FKL_GRADIENT = 0.4015350945, [0.4014323084, -0.3504621521, -0.0335192609, -0.0174508954]
RKL, RKL_GRADIENT = 0.3671189964, [0.3309219614, -0.2430507488, -0.0365550558, -0.0513161568]
K2_GRADIENT = [0.8285867133, -0.9819766342, 0.0412529033, 0.1121370175]
BATCH = batch(seed=1)
SAMPLED = pick(BATCH, "logits", "token_ids", "advantages", "old_logprobs", "mask")
TAUGHT = SAMPLED | pick(BATCH, "teacher_logprobs")
KEPT = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 1, 1, 1]]) > 0
# Key spans, error spans, and both where the mask is False.
SPANS = torch.tensor([[1, 1, 0, 0, 1], [0, 2, 2, 0, 2], [0, 0, 0, 1, 2]])
ROUTED = SAMPLED | pick(BATCH, "teacher_logits") | {"spans": SPANS}
ANSWERS = batch(sequences=6, seed=3)


def ppo(log_ratio: Tensor, advantages: Tensor, low: float, high: float, dual: float = math.inf) -> Tensor:
    ratio, a = log_ratio.exp(), advantages[:, None]
    loss = torch.maximum(-ratio * a, -ratio.clamp(1 - low, 1 + high) * a)
    return loss if dual == math.inf else torch.where(a < 0, torch.minimum(loss, -dual * a), loss)


def over_sequences(x: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([x[i][mask[i]].mean() for i in range(len(x))]).mean()


def trrd(logits: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor, teacher_logprobs: Tensor,
         mask: Tensor, alpha: float = 0.5, teacher_clamp: float = 1.0, reference_logprobs: Tensor | None = None,
         kl_coef: float = 0.0) -> Tensor:  # fmt: skip
    logp = logprob(logits, token_ids)
    to_teacher = (logp - teacher_logprobs).clamp(-teacher_clamp, teacher_clamp)
    loss = ppo(alpha * (logp - old_logprobs) + (1 - alpha) * to_teacher, advantages, 0.2, 0.28)
    if reference_logprobs is not None:
        x = reference_logprobs - logp
        loss = loss + kl_coef * (x.exp() - 1 - x)
    return over_sequences(loss, mask)


def kdrl(logits: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor, teacher_logprobs: Tensor,
         mask: Tensor, kd_coef: float = 5e-3, keep_mask: Tensor | None = None, kd_normalizer: Any = "kept",
         normalizer: float | None = None, kl_estimator: str = "k2") -> Tensor:  # fmt: skip
    logp = logprob(logits, token_ids)
    kept = mask if keep_mask is None else mask & keep_mask
    total = mask.sum() if normalizer is None else normalizer
    apart = logp - teacher_logprobs
    distilled = (apart.square() / 2 if kl_estimator == "k2" else (-apart).exp() - 1 + apart)[kept].sum()
    count = {"kept": kept.sum(), "tokens": total}.get(kd_normalizer, kd_normalizer)
    return ppo(logp - old_logprobs, advantages, 0.2, 0.2)[mask].sum() / total + kd_coef * distilled / count


def kdrl_mask(correct: Tensor, groups: Tensor, mask: Tensor, keep: str = "response") -> Tensor:
    hopeless = [not any(correct[j] for j in range(len(groups)) if groups[j] == g) for g in groups]
    wrong = ~correct if keep == "response" else torch.tensor(hopeless)
    return (mask & wrong[:, None]).double()


def span_kl(logits: Tensor, teacher_logits: Tensor, kind: str, clip: float | None) -> Tensor:
    q, p = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    terms = p.exp() * (p - q) if kind == "forward_kl" else q.exp() * (q - p)
    return (terms if clip is None else terms.clamp(max=clip)).sum(-1)


def trace(logits: Tensor, teacher_logits: Tensor, token_ids: Tensor, advantages: Tensor, spans: Tensor,
          old_logprobs: Tensor, mask: Tensor, kl_coef: float, initial_coef: float = 0.5,
          entry_clip: float | None = None, clip_high: float = 0.28) -> Tensor:  # fmt: skip
    terms = ppo(logprob(logits, token_ids) - old_logprobs, advantages, 0.2, clip_high)
    key, error = (span_kl(logits, teacher_logits, kind, entry_clip) for kind in ("forward_kl", "reverse_kl"))
    answers = []
    for i in range(len(spans)):
        y, loss = mask[i].sum().double(), torch.zeros(()).double()
        for kind, kl in ((1, key), (2, error)):
            inside = mask[i] & (spans[i] == kind)
            if inside.any():
                loss = loss + kl_coef * (inside.sum() / y) * kl[i][inside].mean()
        weight = 1 - kl_coef / initial_coef * (spans[i] > 0).double()
        answers.append(loss + (weight * terms[i])[mask[i]].sum() / y)
    return torch.stack(answers).mean()


def skill_sd(logits: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor, teacher_logprobs: Tensor,
             mask: Tensor, kd_coef: float = 1e-3) -> Tensor:  # fmt: skip
    logp = logprob(logits, token_ids)
    apart, log_ratio = logp - teacher_logprobs, logp - old_logprobs
    loss = ppo(log_ratio, advantages, 0.2, 0.2) + kd_coef * log_ratio.exp() * ((-apart).exp() - 1 + apart)
    return loss[mask].mean()


def calibrl(logits: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor, expert_logprobs: Tensor,
            correct: Tensor, mask: Tensor, hinge_coef: float = 0.1, slope: float = 0.5,
            dual_clip: float = 3.0) -> Tensor:  # fmt: skip
    logp = logprob(logits, token_ids)
    against = torch.where(correct, -1.0, 1.0)[:, None] * (logp - expert_logprobs)
    hinge = advantages.abs()[:, None] * torch.where(against > 0, against, slope * against)
    return (ppo(logp - old_logprobs, advantages, 0.2, 0.2, dual_clip) + hinge_coef * hinge)[mask].mean()


CALIBRL = SAMPLED | {"expert_logprobs": BATCH["base_logprobs"], "correct": BATCH["correct"]}
HINGE = {"log_ratio": torch.tensor([[-0.7, 0.7], [-0.7, 0.7]], dtype=torch.float64),
         "advantages": torch.tensor([0.8, -0.8], dtype=torch.float64),
         "correct": torch.tensor([True, False])}  # fmt: skip
ON_SPAN = {"logits": row(S), "teacher_logits": row(T), "token_ids": IDS, "advantages": ONE["advantages"],
           "old_logprobs": ONE["old_logprobs"]}  # fmt: skip
CASES = [
    Case("trrd_loss", TAUGHT, expected=trrd, roles=("old_logprobs", "teacher_logprobs")),
    Case("trrd_loss", TAUGHT | {"reference_logprobs": BATCH["base_logprobs"]},
         {"alpha": 0.3, "teacher_clamp": 0.4, "kl_coef": 0.2}, expected=trrd, name="kl"),
    Case("trrd_loss", TAUGHT | {"reference_logprobs": BATCH["base_logprobs"]},
         {"alpha": 0.3, "teacher_clamp": math.inf, "kl_coef": 0.2}, expected=trrd, name="no-clamp", reads="R0",
         roles=("old_logprobs", "teacher_logprobs")),
    Case("trrd_loss", ONE, value=-0.4980285835, name="golden",
         gradients={"logits": [0.1768250294, -0.2095592946, 0.0088035998, 0.0239306654]}),
    Case("trrd_loss", ONE, {"teacher_clamp": math.inf}, value=-0.4581642810, name="golden-no-clamp", reads="R0",
         gradients={"logits": [0.3253424206, -0.3855705746, 0.0161978453, 0.0440303086]}),
    Case("trrd_loss", ONE | {"advantages": -ONE["advantages"]}, value=0.8, gradients={"logits": [0.0] * 4},
         name="golden-clipped"),
    Case("kdrl_loss", TAUGHT, {"kd_coef": 0.3}, expected=kdrl, roles=("old_logprobs", "teacher_logprobs")),
    Case("kdrl_loss", TAUGHT | {"keep_mask": KEPT}, {"kd_coef": 0.3}, expected=kdrl, name="kept"),
    Case("kdrl_loss", TAUGHT | {"keep_mask": KEPT}, {"kd_coef": 0.3, "kd_normalizer": "tokens"}, expected=kdrl,
         name="over-all"),
    Case("kdrl_loss", TAUGHT | {"keep_mask": KEPT}, {"kd_coef": 0.3, "kd_normalizer": 7.0, "normalizer": 40.0},
         expected=kdrl, name="over-ranks"),
    Case("kdrl_loss", TAUGHT | {"keep_mask": KEPT}, {"kd_coef": 0.3, "kl_estimator": "k3"}, expected=kdrl, name="k3"),
    Case("kdrl_loss", ONE | NO_REWARD, {"kd_coef": 1.0}, value=0.6807803366, gradients={"logits": K2_GRADIENT},
         name="golden"),
    Case("kdrl_mask", pick(ANSWERS, "correct", "groups", "mask"), expected=kdrl_mask, trained=()),
    Case("kdrl_mask", pick(ANSWERS, "correct", "groups", "mask"), {"keep": "group"}, expected=kdrl_mask, trained=(),
         name="group"),
    Case("trace_loss", ROUTED, {"kl_coef": 0.2}, expected=trace, roles=("logits", "teacher_logits")),
    Case("trace_loss", ROUTED, {"kl_coef": 0.3, "initial_coef": 0.4, "entry_clip": 0.05, "clip_high": 0.1},
         expected=trace, name="clipped"),
    Case("trace_loss", ON_SPAN | {"spans": torch.tensor([[1]])}, {"kl_coef": 0.5}, value=FKL / 2, name="golden-key",
         gradients={"logits": [x / 2 for x in FKL_GRADIENT]}),
    Case("trace_loss", ON_SPAN | {"spans": torch.tensor([[2]])}, {"kl_coef": 0.5}, value=RKL / 2, name="golden-error",
         gradients={"logits": [x / 2 for x in RKL_GRADIENT]}),
    *(
        Case("clipped_divergence_rows", pick(BATCH, "logits", "teacher_logits", "mask"), {"kind": kind, "clip": clip},
             expected=lambda logits, teacher_logits, mask, kind, clip: torch.where(
                 mask, span_kl(logits, teacher_logits, kind, clip), 0.0),
             roles=("logits", "teacher_logits"), name=f"{kind}-{clip}")
        for kind in ("forward_kl", "reverse_kl") for clip in (0.02, 0.3)
    ),
    Case("clipped_divergence_rows", {"logits": row(S), "teacher_logits": row(T)}, {"kind": "forward_kl"},
         value=[[-0.1422876202]], name="golden-forward_kl",
         gradients={"logits": [0.0400575851, 0.0778111096, -0.0515110489, -0.0663576459]}),
    Case("clipped_divergence_rows", {"logits": row(S), "teacher_logits": row(T)}, {"kind": "reverse_kl"},
         value=[[-0.1744941360]], name="golden-reverse_kl",
         gradients={"logits": [-0.0464447537, -0.0368012019, 0.0094654386, 0.0737805169]}),
    Case("skill_sd_loss", TAUGHT, {"kd_coef": 0.3}, expected=skill_sd, roles=("old_logprobs", "teacher_logprobs")),
    Case("skill_sd_loss", ONE | NO_REWARD | {"old_logprobs": logprob(row(S), IDS)}, {"kd_coef": 1.0},
         value=1.0450299452, gradients={"logits": K2_GRADIENT}, name="golden"),
    Case("calibrl_loss", CALIBRL, expected=calibrl, roles=("old_logprobs", "expert_logprobs")),
    Case("calibrl_loss", CALIBRL, {"hinge_coef": 0.7, "slope": 0.2, "dual_clip": 1.1}, expected=calibrl,
         name="dual-clip"),
    # The gradients of the facts' table, −0.8, −0.4, 0.4 and 0.8, times the ramp.
    Case("leaky_hinge", HINGE, value=[[0.56, -0.28], [-0.28, 0.56]],
         gradients={"log_ratio": [[-0.8, -0.8], [1.2, 3.2]]}, trained=("log_ratio",), reads="none", name="golden"),
]  # fmt: skip
