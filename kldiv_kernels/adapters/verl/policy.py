r"""verl's policy losses on given log-probabilities: fn(old_log_prob, log_prob, advantages, ...) -> (loss, metrics).

verl's name, the loss type of `policy/terms.py`, which has the formulas, what is read of the config, the aggregation:

    vanilla            dapo with dual clip      clip_ratio, _low, _high, _c (3)                 loss_agg_mode
    gspo               gspo                     clip_ratio, _low, _high                         loss_agg_mode
    sapo               sapo                     tau_pos (1), tau_neg (1.05)                     seq-mean-token-mean
    cispo              cispo                    clip_ratio, _low, _high                         loss_agg_mode
    geo_mean           gmpo                     clip_ratio, _low, _high                         mean over all sequences
    clip_cov           dapo with Clip-Cov       clip_ratio, _low, _high, policy_loss.clip_cov_* loss_agg_mode
    kl_cov             unclipped with KL-Cov    policy_loss.kl_cov_ratio, .ppo_kl_coef          loss_agg_mode
    dppo_tv, dppo_kl   the same                 clip_ratio, _low, _high, _c (20)                loss_agg_mode
    gpg                reinforce                                                                loss_agg_mode
    dro                −log π·A + β/2·d²        policy_loss.dro_beta (β)                        loss_agg_mode
    bypass_mode        vanilla or gpg, on the tokens and with the weights of the rollout correction: `bypass`

The number in parentheses counts where the config has none; verl's ActorConfig has clip_ratio_c = 3 for dppo too.
gspo is the form with a ratio a token, log s_t = sg[mean d] + log π_t − sg[log π_t]: with one advantage a sequence its
gradient is that of the sequence's ratio, with one a token each token has its own. dro is arXiv 2405.19107, with
d = log π − log π_old.

The functions are `POLICY_LOSSES[name](old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config=None,
rollout_is_weights=None)`: tensors [batch, tokens] each, of which log_prob gets the gradient; the weights multiply the
losses. `loss_agg_mode` is what verl's trainer passes, its configuration's (by default token-mean); without it, gspo has
seq-mean-token-mean and the others token-mean. `config` is verl's actor configuration, whose `global_batch_info` has the
further arguments of `agg_loss`. The metrics are floats, means over the tokens, under verl's names. ValueError and
TypeError name the argument, what it was and what is allowed.

>>> from types import SimpleNamespace
>>> from kldiv_kernels.adapters.verl import POLICY_LOSSES
>>> old, new, ones = torch.zeros(1, 2), torch.tensor([[0.0, 0.5]]), torch.ones(1, 2)
>>> loss, metrics = POLICY_LOSSES["vanilla"](old, new, ones, ones, config=SimpleNamespace(clip_ratio=0.2))
>>> round(loss.item(), 4), metrics["actor/pg_clipfrac"]
(-1.1, 0.5)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kldiv_kernels.adapters.config import read
from kldiv_kernels.adapters.verl.aggregation import agg_loss
from kldiv_kernels.policy import PolicyOptions, TokenLosses, aggregate, ratio_bounds, resolve, token_losses

PolicyLossFn = Callable[..., tuple[Tensor, dict[str, float]]]

_LOSS_TYPES = {
    "vanilla": "dapo", "gspo": "gspo", "sapo": "sapo", "cispo": "cispo", "geo_mean": "gmpo", "clip_cov": "dapo",
    "kl_cov": "dapo", "dppo_tv": "dppo_tv", "dppo_kl": "dppo_kl", "gpg": "reinforce", "dro": "reinforce",
}  # fmt: skip
# verl's bound of a token's log-ratio where it has one, and of gspo's from above.
_CLAMP, _GSPO_CLAMP = 20.0, 10.0
# Keeps the geometric mean of the weights of a sequence finite where one is 0 (verl).
_SMALLEST_WEIGHT = 1e-10


def _policy_loss(name: str) -> PolicyLossFn:
    default_mode = "seq-mean-token-mean" if name == "gspo" else "token-mean"

    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = default_mode,
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        where = f"compute_policy_loss_{name}"
        tensors = {
            "old_log_prob": old_log_prob, "advantages": advantages, "response_mask": response_mask,
            "rollout_is_weights": rollout_is_weights,
        }  # fmt: skip
        check(where, log_prob, tensors, config)
        options = _options(where, name, config)
        valid = response_mask != 0
        # What a masked token holds, NaN or not, must not reach a sum or a gradient.
        logprob, old, advantages = (torch.where(valid, x, 0.0) for x in (log_prob, old_log_prob.detach(), advantages))
        advantages = advantages.detach()
        weights = None
        if rollout_is_weights is not None:
            weights = _weights(name, torch.where(valid, rollout_is_weights.detach(), 1.0), valid).expand_as(logprob)
        losses = token_losses(
            logprob, old, advantages, valid, options,
            weight=weights,
            penalty=_dro_beta(where, config) / 2 * (logprob - old).square() if name == "dro" else None,
            level=partial(_gspo_level, logprob) if name == "gspo" else None,
        )  # fmt: skip
        if name == "geo_mean":
            total = aggregate(losses.per_token, valid, "seq-mean-token-mean", None, count_empty=True)
        else:
            mode = "seq-mean-token-mean" if name == "sapo" else loss_agg_mode
            total = agg_loss(losses.per_token, valid, mode, **read(config, "global_batch_info", {}))
        with torch.no_grad():
            means = {
                f"actor/{key}": torch.where(valid, x, 0).sum() / valid.sum().clamp_min(1)
                for key, x in _metrics(name, losses, advantages, options).items()
            }
        # One transfer from the device for all of them.
        values = torch.stack([x.float() for x in means.values()]).tolist() if means else []
        return total, dict(zip(means, values, strict=True))

    loss.__name__ = loss.__qualname__ = f"compute_policy_loss_{name}"
    loss.__doc__ = f"verl's policy loss {name!r}: all [batch, tokens]; (scalar loss, metrics as floats)."
    return loss


TOKEN_LOSSES: dict[str, PolicyLossFn] = {name: _policy_loss(name) for name in _LOSS_TYPES}


def check(where: str, log_prob: Tensor, tensors: dict[str, Tensor | None], config: Any) -> None:
    """Raises where a shape is wrong or the configuration is missing."""
    if log_prob.dim() != 2:
        raise ValueError(f"{where}: log_prob has shape {list(log_prob.shape)}; expected [batch, tokens]")
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != log_prob.shape:
            raise ValueError(
                f"{where}: {name} has shape {list(tensor.shape)}; expected {list(log_prob.shape)} like log_prob"
            )
    if config is None:
        raise ValueError(f"{where}: config is None; expected verl's actor configuration")


def _options(where: str, name: str, config: Any) -> PolicyOptions:
    given: dict[str, Any] = {"loss_type": _LOSS_TYPES[name]}
    if name in ("vanilla", "gspo", "cispo", "geo_mean", "clip_cov", "dppo_tv", "dppo_kl"):
        both = read(config, "clip_ratio")
        for option in ("clip_low", "clip_high"):
            key = option.replace("clip_", "clip_ratio_")
            given[option] = read(config, key, both)
            if given[option] is None:
                raise ValueError(f"{where}: config.{key} is None; expected a number, there or as config.clip_ratio")
    if name == "vanilla":
        given["dual_clip"] = read(config, "clip_ratio_c", 3.0)
    if name in ("dppo_tv", "dppo_kl"):
        given["delta"] = read(config, "clip_ratio_c", 20.0)
    if name == "gspo":
        given["log_ratio_clamp"] = math.inf
    if name == "sapo":
        given["sapo_temperatures"] = (read(config, "tau_pos", 1.0), read(config, "tau_neg", 1.05))
    cov = read(config, "policy_loss")
    if name == "clip_cov":
        given |= {
            "cov_selection": "clip", "cov_fraction": read(cov, "clip_cov_ratio", 2e-4), "log_ratio_clamp": math.inf,
            "cov_bounds": (read(cov, "clip_cov_lb", 1.0), read(cov, "clip_cov_ub", 5.0)), "dual_clip": math.inf,
        }  # fmt: skip
    if name == "kl_cov":
        given |= {
            "cov_selection": "kl", "cov_fraction": read(cov, "kl_cov_ratio", 2e-4), "log_ratio_clamp": math.inf,
            "cov_kl_coef": read(cov, "ppo_kl_coef", 1.0), "dual_clip": math.inf, "clip_low": 1.0, "clip_high": math.inf,
        }  # fmt: skip
    return resolve(where, "verl", given)


def _dro_beta(where: str, config: Any) -> float:
    beta = read(read(config, "policy_loss"), "dro_beta")
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not beta > 0:
        raise ValueError(f"{where}: config.policy_loss.dro_beta is {beta!r}; expected a number above 0")
    return beta


def _weights(name: str, weights: Tensor, valid: Tensor) -> Tensor:
    if name != "geo_mean":
        return weights
    logs = torch.where(valid, (weights + _SMALLEST_WEIGHT).log(), 0.0)
    return (logs.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp_min(1)).exp()


def _gspo_level(logprob: Tensor, level: Tensor) -> Tensor:
    """The sequence's log-ratio with the gradient of the token's."""
    return (level.detach() + logprob - logprob.detach()).clamp(max=_GSPO_CLAMP)


def _metrics(name: str, losses: TokenLosses, advantages: Tensor, options: PolicyOptions) -> dict[str, Tensor]:
    """What verl logs the means of, per token."""
    log_ratio, level, where = losses.log_ratio, losses.level_log_ratio, losses.clipped
    if name == "gpg":
        return {}
    if name == "kl_cov":
        return {"ppo_kl": log_ratio.abs()}
    unclamped = name in ("gspo", "geo_mean", "clip_cov", "dro")
    kl = -log_ratio if unclamped else -log_ratio.clamp(-_CLAMP, _CLAMP)
    if name == "dro":
        return {"ppo_kl": kl}
    if name == "clip_cov":
        return {"pg_clipfrac": where["cov"], "ppo_kl": kl}
    never = torch.zeros_like(advantages, dtype=torch.bool)
    clipped, lower = never, never
    if name == "vanilla":
        clipped, lower = where["low"] | where["high"], where.get("dual", never)
    elif name == "gspo":
        clipped = where["low"] | where["high"]
    elif name == "cispo":
        low, high = ratio_bounds(options)
        clipped = (level.exp() < low) | (level.exp() > high)
    elif name == "geo_mean":
        outside = (log_ratio < -options.clip_low) | (log_ratio > options.clip_high)
        clipped, lower = outside & (advantages > 0), outside & (advantages < 0)
    elif name in ("dppo_tv", "dppo_kl"):
        clipped = where["low"] | where["high"]
        lower = ~clipped & (level.exp() > options.delta)
    return {"pg_clipfrac": clipped, "ppo_kl": kl, "pg_clipfrac_lower": lower}
