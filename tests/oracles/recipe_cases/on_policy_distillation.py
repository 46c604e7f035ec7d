"""Papers 3, 14, 34, 46, 49: the facts' golden rows, and definitions over batches with masks."""

from __future__ import annotations

from typing import Any

import torch
from recipe_case import B, Case, S, T, Y, batch, logprob, pick, row
from torch import Tensor

ONE = {"logits": row(S), "teacher_logits": row(T), "token_ids": torch.tensor([[Y]])}
# Of row S, the tokens of softmax: the vOPD rows' gradients are adv·(1[v = y] − q)'s negative.
BATCH = batch()


def js(s: Tensor, t: Tensor, beta: float) -> Tensor:
    q, p = s.softmax(-1), t.softmax(-1)
    m = (beta * p + (1 - beta) * q).log()
    return (beta * p * (p.log() - m) + (1 - beta) * q * (q.log() - m)).sum(-1)


def reverse_kl(s: Tensor, t: Tensor) -> Tensor:
    return (s.softmax(-1) * (s.log_softmax(-1) - t.log_softmax(-1))).sum(-1)


def mean(x: Tensor, mask: Tensor) -> Tensor:
    return x[mask].mean() if mask.any() else x[mask].sum()


def vopd_advantages(logits: Tensor, teacher_logits: Tensor, token_ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    tau = options.get("temperature", 1.0)
    s, t = logits.detach() / tau, teacher_logits / tau
    out = logprob(t, token_ids) - logprob(s, token_ids)
    if options.get("baseline", "full") == "full":
        out = out + reverse_kl(s, t)
    elif options["baseline"] == "top_k":
        ids = s.topk(options["k"]).indices
        out = out + reverse_kl(s.gather(-1, ids), t.gather(-1, ids))
    elif "reward_clip" in options:
        clip = torch.tensor(options["reward_clip"]).double()
        out = out.clamp_min((clip.log() / (1 - clip)).item())
    return torch.where(mask, out, 0.0)


def vopd(logits: Tensor, teacher_logits: Tensor, token_ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    tau = options.pop("kd_temperature", 1.0)
    advantages = vopd_advantages(logits, teacher_logits, token_ids, mask, **options, temperature=tau)
    return mean(-advantages * logprob(logits, token_ids), mask)


def tcod(logits: Tensor, token_ids: Tensor, old_logprobs: Tensor, teacher_logprobs: Tensor, turns: Tensor,
         mask: Tensor, window: int) -> Tensor:  # fmt: skip
    advantages = (teacher_logprobs - old_logprobs) * (turns < window)
    ratio = (logprob(logits, token_ids) - old_logprobs).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return mean(torch.where(advantages < 0, torch.minimum(loss, -3 * advantages), loss), mask & (turns >= 0))


def scope_weights(old_logprobs: Tensor, teacher_logprobs: Tensor, correct: Tensor, groups: Tensor, mask: Tensor,
                  temperature: float = 1.0, scale_by_count: bool = False, sign: float = -1.0) -> Tensor:  # fmt: skip
    out = torch.zeros_like(old_logprobs)
    for i in range(len(groups)):
        peers = [j for j in range(len(groups)) if groups[j] == groups[i] and correct[j] == correct[i]]
        own = old_logprobs if correct[i] else teacher_logprobs
        power = sign if correct[i] else 1.0
        size = {j: (power * own[j][mask[j]].mean() / temperature).exp() for j in peers}
        weight = size[i] / sum(size.values()) * (len(peers) if scale_by_count else 1)
        out[i] = weight if correct[i] else weight * (teacher_logprobs[i] - old_logprobs[i])
    return torch.where(mask, out, 0.0)


def scope(logits: Tensor, token_ids: Tensor, correct: Tensor, groups: Tensor, old_logprobs: Tensor,
          teacher_logprobs: Tensor, mask: Tensor, weight_temperature: float) -> Tensor:  # fmt: skip
    weights = scope_weights(old_logprobs, teacher_logprobs, correct, groups, mask, weight_temperature)
    ratio = (logprob(logits, token_ids) - old_logprobs).exp()
    return -(ratio * weights)[mask].sum() / len(groups.unique())


def gopd(logits: Tensor, teacher_logits: Tensor, base_logits: Tensor, mask: Tensor, extrapolation: float) -> Tensor:
    q = logits.log_softmax(-1)
    target = extrapolation * teacher_logits.log_softmax(-1) + (1 - extrapolation) * base_logits.log_softmax(-1)
    return mean((q.exp() * (q - target)).sum(-1), mask)


def tsd_kd(logits: Tensor, teacher_logits: Tensor, mask: Tensor, k: int, opener: float, entropy_fraction: float,
           prefix: bool = False, entropy_coef: float = 1.0) -> Tensor:  # fmt: skip
    q, p = logits.softmax(-1), teacher_logits.softmax(-1)
    entropy, theirs = (-(x * x.log()).sum(-1) for x in (q, p))
    ranking, direct, count = [], [], int(entropy_fraction * int(mask.sum()))
    for b, t in mask.nonzero().tolist():
        spent = entropy[b, : t + 1][mask[b, : t + 1]].sum() - entropy[b, t]
        if spent < opener * entropy[b][mask[b]].sum():
            ids = logits[b, t].topk(k).indices
            z = logits[b, t][ids[teacher_logits[b, t][ids].argsort(descending=True)]]
            of_rest = [(z[: j + 1] if prefix else z[j:]).logsumexp(0) - z[j] for j in range(k)]
            ranking.append(torch.stack(of_rest).sum())
        gate = torch.sigmoid((entropy - theirs)[b, t].detach())
        direct.append(gate * js(logits[b, t], teacher_logits[b, t], 0.9))
    uncertain = entropy[mask].topk(max(count, 1)).values
    return 0.1 * torch.stack(ranking).mean() + torch.stack(direct).mean() + entropy_coef * uncertain.mean()


OLD_AND_TEACHER = pick(BATCH, "old_logprobs", "teacher_logprobs")
SEQUENCES = batch(sequences=6, seed=3)
SCOPE = pick(SEQUENCES, "old_logprobs", "teacher_logprobs", "correct", "groups", "mask")
TURNS = torch.tensor([[-1, 0, 0, 1, 2], [0, 0, 1, 1, 2], [0, 1, 1, 2, 2]])
STUDENT = pick(BATCH, "logits", "teacher_logits", "token_ids", "mask")
H_STUDENT = [-0.3805649828, 0.1527515387, 0.0871141654, 0.1406992786]
GATED_JS, GATED_JS_GRADIENT = 0.0143161136, [0.0128640932, -0.0095929504, -0.0014037594, -0.0018673834]
RANKING = {
    False: (1.9332837233, [0.6169218023, -0.8357483724, 0.0, 0.2188265701]),
    True: (2.5077689902, [0.5536992005, 0.3466771514, 0.0, -0.9003763519]),
}


def golden_tsd_kd(prefix: bool) -> Case:
    """The sum of three of the facts' rows."""
    value, gradient = RANKING[prefix]
    parts = zip(gradient, GATED_JS_GRADIENT, H_STUDENT, strict=True)
    return Case(
        "tsd_kd_loss", {"logits": row(S), "teacher_logits": row(T), "mask": torch.tensor([[True]])},
        {"k": 3, "prefix": prefix}, value=0.1 * value + GATED_JS + 0.8782811753,
        gradients={"logits": [0.1 * a + b + c for a, b, c in parts]}, name=f"golden-prefix={prefix}",
        roles=("logits", "teacher_logits"),
    )  # fmt: skip


CASES = [
    Case("vopd_loss", STUDENT, expected=vopd, roles=("logits", "teacher_logits")),
    Case("vopd_loss", ONE, value=2.8261243111, name="golden",
         gradients={"logits": [1.0892778844, -1.2909275679, 0.0542319525, 0.1474177310]}),
    Case("vopd_loss", ONE, {"baseline": "top_k", "k": 2}, value=2.9010962626, name="golden-top-2",
         gradients={"logits": [1.1181744507, -1.3251735345, 0.0556706278, 0.1513284560]}),
    Case("vopd_loss", STUDENT, {"baseline": "top_k", "k": 3, "kd_temperature": 2.0}, expected=vopd, name="top-3"),
    Case("vopd_loss", STUDENT, {"baseline": "none", "reward_clip": 0.5}, expected=vopd, name="clipped"),
    Case("vopd_advantages", STUDENT, {"temperature": 0.7}, expected=vopd_advantages, trained=(),
         roles=("logits", "teacher_logits")),
    Case("tcod_loss", pick(BATCH, "logits", "token_ids", "mask") | OLD_AND_TEACHER | {"turns": TURNS}, {"window": 2},
         expected=tcod, roles=("old_logprobs", "teacher_logprobs")),
    Case("scope_advantages", SCOPE, {"temperature": 0.5}, expected=scope_weights, trained=(),
         roles=("old_logprobs", "teacher_logprobs")),
    Case("scope_advantages", SCOPE, {"scale_by_count": True, "sign": 1.0}, expected=scope_weights, trained=(),
         name="as-in-the-code"),
    Case("scope_loss", SCOPE | pick(SEQUENCES, "logits", "token_ids"), {"weight_temperature": 2.0}, expected=scope,
         roles=("old_logprobs", "teacher_logprobs")),
    Case("gopd_advantages", pick(BATCH, "old_logprobs", "teacher_logprobs", "base_logprobs"), {"extrapolation": 1.5},
         expected=lambda old_logprobs, teacher_logprobs, base_logprobs, extrapolation: (
             1.5 * teacher_logprobs - 0.5 * base_logprobs - old_logprobs), trained=(),
         roles=("base_logprobs", "teacher_logprobs")),
    Case("gopd_loss", {"logits": row(S), "teacher_logits": row(T), "base_logits": row(B)}, value=0.3931803409,
         gradients={"logits": [0.3527736739, -0.2777861501, -0.0266286747, -0.0483588491]}, name="golden",
         roles=("teacher_logits", "base_logits")),
    Case("gopd_loss", pick(BATCH, "logits", "teacher_logits", "base_logits", "mask"), {"extrapolation": 0.5},
         expected=gopd, roles=("logits", "teacher_logits")),
    Case("tsd_kd_loss", pick(BATCH, "logits", "teacher_logits", "mask"),
         {"k": 3, "opener": 0.4, "entropy_fraction": 0.3}, expected=tsd_kd, roles=("logits", "teacher_logits")),
    Case("tsd_kd_loss", pick(BATCH, "logits", "teacher_logits", "mask"),
         {"k": 4, "opener": 0.4, "entropy_fraction": 0.3, "prefix": True, "entropy_coef": 0.2}, expected=tsd_kd,
         name="prefix"),
    *(golden_tsd_kd(prefix) for prefix in (False, True)),
]  # fmt: skip
