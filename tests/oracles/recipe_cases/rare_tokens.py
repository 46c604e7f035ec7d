"""Paper 83: the facts' golden rows, and definitions over batches with masks."""

from __future__ import annotations

import torch
from recipe_case import Case, S, T, Y, batch, double, logprob, pick, row
from torch import Tensor

IDS = torch.tensor([[Y]])
BATCH = batch(sequences=6, tokens=9, seed=24)
SAMPLED = pick(BATCH, "logits", "token_ids", "old_logprobs", "mask") | {"advantages": double(-1, 1, -0.5, -2, 0, -0.1)}
OLD = SAMPLED | pick(BATCH, "old_logits")
DROPPED = torch.arange(54).reshape(6, 9) % 4 == 1
PROXY = SAMPLED | {"proxy_logprobs": torch.where(DROPPED, -torch.inf, BATCH["old_logprobs"] + 0.2)}


def proxy(old_logits: Tensor, kappa: float) -> Tensor:
    """The proxy's probabilities, which are not normalised, and their sum."""
    p = old_logits.softmax(-1)
    return torch.where(p >= kappa * p.amax(-1, keepdim=True), p, 0.0)


def min_p(old_logits: Tensor, token_ids: Tensor, mask: Tensor, kappa: float = 0.02) -> Tensor:
    kept = proxy(old_logits, kappa)
    mass = kept.sum(-1)
    own = (kept.gather(-1, token_ids[..., None])[..., 0] / mass).log()
    return torch.cat([torch.where(mask, x, 0.0).flatten() for x in (own, mass.log())])


def policy(logp: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    ratio, a = (logp - old_logprobs).exp(), advantages[:, None]
    return torch.maximum(-ratio * a, -ratio.clamp(0, 10) * a)


def lp_reg(logits: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor, proxy_logprobs: Tensor,
           mask: Tensor, beta: float = 1.0, fraction: float = 0.01) -> Tensor:  # fmt: skip
    logp = logprob(logits, token_ids)
    loss = policy(logp, old_logprobs, advantages)[mask].sum()
    negative = [(i, t) for i, t in mask.nonzero().tolist() if advantages[i] < 0]
    wanted = int(len(negative) * fraction)
    rarest = sorted(negative, key=lambda place: logp[place].item())[:wanted] if wanted > 1 else []
    for place in rarest:
        d = proxy_logprobs[place] - logp[place]
        if d > 0:
            loss = loss + beta * (d.exp() - d - 1).clamp(-10, 10)
    return loss / mask.sum()


def lp_reg_full(logits: Tensor, old_logits: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor,
                mask: Tensor, kappa: float = 0.02, beta: float = 1.0, fraction: float = 0.01) -> Tensor:  # fmt: skip
    logp, kept = logprob(logits, token_ids), proxy(old_logits, kappa)
    target = kept / kept.sum(-1, keepdim=True)
    kl = (torch.xlogy(target, target) - target * logits.log_softmax(-1)).sum(-1)
    places = [tuple(place) for place in mask.nonzero().tolist()]
    rarest = sorted(places, key=lambda place: logp[place].item())[: max(int(len(places) * fraction), 1)]
    loss = policy(logp, old_logprobs, advantages)[mask].sum()
    for i, t in rarest:
        if advantages[i] < 0 and kept[i, t, token_ids[i, t]] > 0:
            loss = loss + beta * kl[i, t]
    return loss / mask.sum()


ROW = {"logits": row(S), "old_logits": row(T), "token_ids": IDS}
# −A·ρ is 1 with the gradient of ℓ; the KL's own gradient is the facts' row less that.
Q = torch.tensor(S).double().softmax(-1)
KL_GRADIENT = double(0.3786009625, -0.3881046778, 0.0353537934, -0.0258500781)
OF_RATIO = torch.eye(4).double()[Y] - Q
CASES = [
    Case("lp_reg_loss", PROXY, {"fraction": 0.7}, expected=lp_reg, roles=("old_logprobs", "proxy_logprobs")),
    Case("lp_reg_loss", PROXY, {"fraction": 0.5, "beta": 0.4}, expected=lp_reg, name="fewer"),
    Case("lp_reg_loss", PROXY, expected=lp_reg, name="none"),
    Case("lp_reg_full_loss", OLD, {"fraction": 0.5, "kappa": 0.2, "beta": 0.6}, expected=lp_reg_full, reads="torch",
         roles=("logits", "old_logits")),
    Case("lp_reg_full_loss", ROW | {"advantages": double(-1.0), "old_logprobs": logprob(row(S), IDS)}, {"kappa": 0.2},
         value=1.4532694039, gradients={"logits": (KL_GRADIENT + OF_RATIO).tolist()}, reads="torch", name="golden"),
    Case("min_p_proxy", pick(OLD, "old_logits", "token_ids", "mask"), {"kappa": 0.1}, expected=min_p, trained=(),
         reads="torch"),
    Case("min_p_proxy", {"old_logits": row(T), "token_ids": IDS}, {"kappa": 0.2}, trained=(), reads="torch",
         value=[-0.6041306053, -0.0713596568], name="golden"),
]  # fmt: skip
