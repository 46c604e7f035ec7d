r"""The policy term of every loss type, per token [B, T], in plain PyTorch; gradients by autograd and `policy_slopes`.

Notation: π policy, μ the anchor (old) policy, A advantage, m mask, sg[·] no gradient;
d_t = log π(y_t) − log μ(y_t), and w_t = d_t (token), Σ d m / Σ m (sequence) or Σ d m (sequence_sum); r = exp(w).

    grpo, bnpo, dr_grpo, dapo, luspo, gspo   −min(min(r, delta)·A, clip(r, low, high)·A)             [PPO, GSPO]
        with dual clip, where A < 0          min(that, −dual_clip·A)
    cispo                                    −sg[clip(r, low, high)]·A·log π                          [MiniMax-M1]
    sapo                                     −(4/τ)·sigmoid(τ(r − 1))·A,  τ by the sign of A
    vespo                                    −sg[φ]·A·log π,  log φ = λ + kL − λe^L,
                                             L = Σ d m + Σ log off-policy weight
    gmpo                                     −A·exp(Σ d' m / Σ m),  d' = d clipped to [−clip_low, clip_high] against A
    reinforce                                −A·log π
    topr                                     −sg[1 where A ≥ 0, else min(r, 1)]·A·log π               [arXiv 2503.14286]
    dppo_tv, dppo_kl                         −sg[min(r, delta)]·A·log π where the sampled token's probability has not
                                             moved too far in the direction of A                      [arXiv 2602.04879]

Where a ratio overflows, the value and the gradient are those of the formula: a bound holds, and what it cuts off has
the gradient 0; A = 0 makes the term 0.

Sources: TRL 1.16 `GRPOTrainer._compute_loss` and `experimental.gmpo`, verl `core_algos`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kldiv_kernels.parallel import Group, largest, summed
from kldiv_kernels.policy.options import CLIPPED, PolicyOptions, bounds
from kldiv_kernels.policy.sequences import SequenceSums, rows
from kldiv_kernels.policy.slopes import exp, sigmoid, times, with_slope

# TRL's limits of the log of VESPO's sequence weight: 1e-8 to e^20, and of a token's contribution to it.
_VESPO_LOW, _VESPO_HIGH = math.log(1e-8), 20.0
# Keeps the binary KL of DPPO finite where a probability rounds to 1 (verl).
_ALMOST_ZERO = 1e-8


@dataclass(frozen=True)
class Tokens:
    """What a policy term is made of, each [B, T] and finite where the mask is False.

    `logprob` and the log-ratios carry the gradient; `log_ratio` is d, `level_log_ratio` is w, clamped. sums: those of
    `summands`. batch_group: the ranks whose tokens a selection is made of.
    """

    logprob: Tensor
    anchor: Tensor
    advantages: Tensor
    mask: Tensor
    log_ratio: Tensor
    level_log_ratio: Tensor
    sums: SequenceSums
    batch_group: Group | None = None


@dataclass(frozen=True)
class PolicyTerm:
    """The loss of each token and, by name, where its gradient was clipped away (bool [B, T])."""

    per_token: Tensor
    clipped: dict[str, Tensor] = field(default_factory=dict)


def summands(
    log_ratio: Tensor, advantages: Tensor, mask: Tensor, options: PolicyOptions, log_weight: Tensor | None = None
) -> dict[str, Tensor]:
    """What the term sums over the tokens of a sequence, by name, each [B, T]; `log_weight`: see `policy_term`."""
    found = {"tokens": mask}
    if options.importance_level != "token":
        found["log_ratio"] = log_ratio * mask
    if options.loss_type == "gmpo":
        found["gmpo"] = _against(log_ratio, advantages, options) * mask
    if options.loss_type == "vespo":
        contributions = log_ratio.detach().clamp(-20.0, 20.0)
        if log_weight is not None:
            contributions = contributions + log_weight.clamp(_VESPO_LOW, _VESPO_HIGH)
        found["vespo"] = contributions * mask
    return found


def level_log_ratio(
    log_ratio: Tensor, mask: Tensor, options: PolicyOptions, sums: SequenceSums | None = None
) -> Tensor:
    """w [B, T]: the log-ratio at the importance level, clamped. `sums`: its own and the tokens'; None: of rows."""
    if options.importance_level != "token":
        if sums is None:
            sums = rows(mask).sums({"tokens": mask, "log_ratio": log_ratio * mask})
        total = sums.at("log_ratio")
        if options.importance_level == "sequence":
            total = total / sums.at("tokens").clamp_min(1)
        log_ratio = total.expand_as(log_ratio)
    low, high = bounds(options.log_ratio_clamp)
    return log_ratio if low == -math.inf and high == math.inf else log_ratio.clamp(low, high)


def ratio_bounds(options: PolicyOptions) -> tuple[float, float]:
    if options.clip_absolute:
        return options.clip_low, options.clip_high
    return 1 - options.clip_low, 1 + options.clip_high


def policy_term(tokens: Tokens, options: PolicyOptions) -> PolicyTerm:
    """The term of `options.loss_type`."""
    if options.loss_type in CLIPPED:
        return clipped_surrogate(tokens, options)
    if options.loss_type == "vespo":
        return vespo(tokens, options)
    return {
        "cispo": cispo, "sapo": sapo, "gmpo": gmpo, "reinforce": reinforce, "topr": topr, "dppo_tv": dppo,
        "dppo_kl": dppo,
    }[options.loss_type](tokens, options)  # fmt: skip


def surrogate(
    log_ratio: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = math.inf,
    delta: float = math.inf,
) -> PolicyTerm:
    """PPO's surrogate −min(min(r, delta)·A, clip(r, 1 − clip_low, 1 + clip_high)·A) per token, r = exp(log_ratio).

    Where A < 0 it is at most −dual_clip·A. log_ratio carries the gradient, the advantages get none; of one shape.

    >>> surrogate(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])).per_token
    tensor([-1.0000, -1.2000])
    """
    return _surrogate(log_ratio, advantages, (1 - clip_low, 1 + clip_high), dual_clip, delta)


def _surrogate(
    log_ratio: Tensor, advantages: Tensor, bounds: tuple[float, float], dual_clip: float, delta: float
) -> PolicyTerm:
    ratio, (low, high) = exp(log_ratio), bounds
    unclipped = ratio.clamp(max=delta) if delta < math.inf else ratio
    loss = -torch.min(times(unclipped, advantages), times(ratio.clamp(low, high), advantages))
    clipped = {"low": (ratio < low) & (advantages < 0), "high": (ratio > high) & (advantages > 0)}
    if dual_clip < math.inf:
        most = -dual_clip * advantages
        clipped["dual"] = (advantages < 0) & (loss > most)
        loss = torch.where(advantages < 0, torch.min(loss, most), loss)
    return PolicyTerm(loss, clipped)


def clipped_surrogate(tokens: Tokens, options: PolicyOptions) -> PolicyTerm:
    of_ratio = _surrogate(
        tokens.level_log_ratio, tokens.advantages, ratio_bounds(options), options.dual_clip, options.delta
    )
    loss, clipped = of_ratio.per_token, of_ratio.clipped
    if options.cov_selection == "clip":
        chosen = clip_cov(tokens, options, clipped["low"] | clipped["high"])
        loss = torch.where(chosen, 0.0, loss)
        clipped["cov"] = chosen
    if options.cov_selection == "kl":
        chosen = kl_cov(tokens, options)
        loss = loss + options.cov_kl_coef * torch.where(chosen, tokens.log_ratio.abs(), 0.0)
    return PolicyTerm(loss, clipped)


def covariance(tokens: Tokens) -> Tensor:
    """(A − mean A)(log π − mean log π) over the batch's tokens: how much a token's update lowers the entropy."""
    both = torch.stack([tokens.advantages, tokens.logprob.detach()])
    found = torch.stack([*(both * tokens.mask).flatten(1).sum(1), tokens.mask.sum().to(both.dtype)])
    totals = summed(found, tokens.batch_group)
    advantages, logprob = (both - (totals[:2] / totals[2].clamp_min(1))[:, None, None]).unbind()
    return advantages * logprob


def clip_cov(tokens: Tokens, options: PolicyOptions, already: Tensor) -> Tensor:
    """Clip-Cov (arXiv 2505.22617): a random `cov_fraction` of the tokens, among those with a high covariance that the
    ratio's clip has left alone; at least one if there is one."""
    low, high = options.cov_bounds
    cov = covariance(tokens)
    candidates = tokens.mask & ~already & (cov > low) & (cov < high)
    return _largest(torch.rand_like(cov), candidates, tokens, options.cov_fraction)


def kl_cov(tokens: Tokens, options: PolicyOptions) -> Tensor:
    """KL-Cov (arXiv 2505.22617): the `cov_fraction` of the tokens with the highest covariance; at least one."""
    return _largest(covariance(tokens), tokens.mask, tokens, options.cov_fraction)


def _largest(key: Tensor, candidates: Tensor, tokens: Tokens, fraction: float) -> Tensor:
    """The candidates with the largest keys, `fraction` of the batch's tokens: by rank, so that no count leaves the
    device."""
    count = summed(tokens.mask.sum(), tokens.batch_group)
    wanted = (count.double() * fraction).floor().clamp_min(1)
    if tokens.batch_group is not None:
        return largest(key, candidates, wanted.long(), tokens.batch_group)
    order = torch.where(candidates, key, -torch.inf).reshape(-1).argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return (rank < wanted).reshape(key.shape) & candidates


def score(tokens: Tokens, weight: Tensor) -> Tensor:
    """−weight·A·log π, of which log π alone has a gradient."""
    return -times(tokens.logprob, times(weight, tokens.advantages))


def cispo(tokens: Tokens, options: PolicyOptions) -> PolicyTerm:
    low, high = ratio_bounds(options)
    ratio = tokens.level_log_ratio.detach().exp()
    return PolicyTerm(
        score(tokens, ratio.clamp(low, high)),
        {"low": (ratio < low) & (tokens.advantages < 0), "high": (ratio > high) & (tokens.advantages > 0)},
    )


def sapo(tokens: Tokens, options: PolicyOptions) -> PolicyTerm:
    w = tokens.level_log_ratio
    beyond = with_slope(torch.expm1(w.detach()), w, w.detach().exp())
    positive, negative = (4 / t * sigmoid(t * beyond) for t in options.sapo_temperatures)
    return PolicyTerm(-torch.where(tokens.advantages > 0, positive, negative) * tokens.advantages)


def vespo(tokens: Tokens, options: PolicyOptions) -> PolicyTerm:
    with torch.no_grad():
        log_w = tokens.sums.at("vespo").clamp(_VESPO_LOW, _VESPO_HIGH)
        positive, negative = (
            (max(rate, 1e-4) + k * log_w - max(rate, 1e-4) * log_w.exp()).exp()
            for k, rate in (options.vespo_positive, options.vespo_negative)
        )
        phi = torch.where(tokens.advantages >= 0, positive, negative).nan_to_num(nan=0.0, posinf=0.0)
    return PolicyTerm(score(tokens, phi))


def _against(log_ratio: Tensor, advantages: Tensor, options: PolicyOptions) -> Tensor:
    """GMPO's d': the log-ratio, clipped where that lowers the objective."""
    low, high = bounds(options.log_ratio_clamp)
    inside = log_ratio.clamp(-options.clip_low, options.clip_high)
    lower = torch.where(advantages > 0, torch.min(log_ratio, inside), torch.max(log_ratio, inside))
    return lower.clamp(low, high)


def gmpo(tokens: Tokens, options: PolicyOptions) -> PolicyTerm:
    ratio, advantages = tokens.log_ratio, tokens.advantages
    mean = tokens.sums.at("gmpo") / tokens.sums.at("tokens").clamp_min(1)
    clipped = {
        "low": (ratio < -options.clip_low) & (advantages < 0),
        "high": (ratio > options.clip_high) & (advantages > 0),
    }
    return PolicyTerm(-times(exp(mean).expand_as(advantages), advantages), clipped)


def reinforce(tokens: Tokens, options: PolicyOptions) -> PolicyTerm:
    return PolicyTerm(score(tokens, torch.ones_like(tokens.advantages)))


def topr(tokens: Tokens, options: PolicyOptions) -> PolicyTerm:
    tapered = tokens.level_log_ratio.detach().exp().clamp_max(1)
    weight = torch.where(tokens.advantages >= 0, 1.0, tapered)
    return PolicyTerm(score(tokens, weight))


def dppo(tokens: Tokens, options: PolicyOptions) -> PolicyTerm:
    """Keeps a token while its probability has moved by at most clip_high (up, A > 0) or clip_low (down), measured by
    the difference (dppo_tv) or the KL of the two-outcome distributions token / any other (dppo_kl)."""
    logprob, anchor = tokens.logprob.detach(), tokens.anchor
    now, before = logprob.exp(), anchor.exp()
    if options.loss_type == "dppo_tv":
        up, down = now - before <= options.clip_high, before - now <= options.clip_low
    else:
        others = (1 - before) * ((1 - before + _ALMOST_ZERO) / (1 - now + _ALMOST_ZERO)).log()
        kl = before * (anchor - logprob) + others
        up, down = (kl <= options.clip_high) | (now <= before), (kl <= options.clip_low) | (now >= before)
    weight = tokens.level_log_ratio.detach().exp().clamp_max(options.delta)
    # NaN is not dropped, but seen.
    kept = torch.where(tokens.advantages > 0, up, down) | (logprob + anchor).isnan()
    loss = torch.where(kept, score(tokens, weight), 0.0)
    return PolicyTerm(loss, {"low": ~down & (tokens.advantages < 0), "high": ~up & (tokens.advantages > 0)})
