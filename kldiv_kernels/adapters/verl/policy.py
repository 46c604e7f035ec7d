r"""verl's policy losses on given log-probabilities: fn(old_log_prob, log_prob, advantages, ...) -> (loss, metrics).

verl's name, the loss type of `policy_terms` (which has the formulas), what is read of the config, and the aggregation:

    vanilla            dapo with dual clip      clip_ratio, _low, _high, _c (3)                 loss_agg_mode
    gspo               gspo                     clip_ratio, _low, _high                         seq-mean-token-mean
    sapo               sapo                     tau_pos (1), tau_neg (1.05)                     seq-mean-token-mean
    cispo              cispo                    clip_ratio, _low, _high                         loss_agg_mode
    geo_mean           gmpo                     clip_ratio, _low, _high                         mean over all sequences
    clip_cov           dapo with Clip-Cov       clip_ratio, _low, _high, policy_loss.clip_cov_* loss_agg_mode
    kl_cov             unclipped with KL-Cov    policy_loss.kl_cov_ratio, .ppo_kl_coef          loss_agg_mode
    dppo_tv, dppo_kl   the same                 clip_ratio, _low, _high, _c (20)                loss_agg_mode
    gpg                reinforce                                                                loss_agg_mode

The number in parentheses counts where the config has none; verl's ActorConfig has clip_ratio_c = 3 for dppo too.
gspo is the form with a ratio a token, log s_t = sg[mean d] + log π_t − sg[log π_t]: with one advantage a sequence its
gradient is that of the sequence's ratio, with one a token each token has its own.

The functions are `POLICY_LOSSES[name](old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean",
config=None, rollout_is_weights=None)`: tensors [batch, tokens] each, of which log_prob gets the gradient; the weights
multiply the losses. `config` is verl's actor configuration, whose `global_batch_info` has the further arguments of
`agg_loss`. The metrics are floats, means over the tokens, under verl's names. ValueError and TypeError name the
argument, what it was and what is allowed.

>>> from types import SimpleNamespace
>>> old, new, ones = torch.zeros(1, 2), torch.tensor([[0.0, 0.5]]), torch.ones(1, 2)
>>> loss, metrics = POLICY_LOSSES["vanilla"](old, new, ones, ones, config=SimpleNamespace(clip_ratio=0.2))
>>> round(loss.item(), 4), metrics["actor/pg_clipfrac"]
(-1.1, 0.5)
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kldiv_kernels.adapters.verl.config import read
from kldiv_kernels.adapters.verl.logits import compute_forward_kl_topk
from kldiv_kernels.policy_options import PolicyOptions, resolve
from kldiv_kernels.policy_slopes import times
from kldiv_kernels.policy_terms import PolicyTerm, Tokens, level_log_ratio, policy_term, ratio_bounds
from kldiv_kernels.policy_weights import aggregate

PolicyLossFn = Callable[..., tuple[Tensor, dict[str, float]]]

_LOSS_TYPES = {
    "vanilla": "dapo", "gspo": "gspo", "sapo": "sapo", "cispo": "cispo", "geo_mean": "gmpo", "clip_cov": "dapo",
    "kl_cov": "dapo", "dppo_tv": "dppo_tv", "dppo_kl": "dppo_kl", "gpg": "reinforce",
}  # fmt: skip
_SEQUENCE_MEAN = ("gspo", "sapo", "geo_mean")
_MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
# verl's bound of a token's log-ratio where it has one, and of gspo's from above.
_CLAMP, _GSPO_CLAMP = 20.0, 10.0
# Keeps the geometric mean of the weights of a sequence finite where one is 0 (verl).
_SMALLEST_WEIGHT = 1e-10


def agg_loss(
    loss_mat: Tensor,
    loss_mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
) -> Tensor:
    """The scalar of per-token losses [batch, tokens].

    Args:
        loss_mask: [batch, tokens], 0 for tokens that do not count.
        loss_agg_mode: "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm" (the former, divided
            by `loss_scale_factor`, default: tokens), "seq-mean-token-mean". Sequences without a token do not count.
        dp_size: number of data-parallel ranks, which multiplies the loss because their gradients are averaged.
        batch_num_tokens, global_batch_size: tokens and sequences over all ranks. Default: those here, on one rank only.

    Raises:
        ValueError: naming the argument, what it was and what is allowed.

    >>> losses, mask = torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([[1, 1], [1, 0]])
    >>> agg_loss(losses, mask, "token-mean").item(), agg_loss(losses, mask, "seq-mean-token-mean").item()
    (3.0, 3.5)
    """
    where = "agg_loss"
    if loss_agg_mode not in _MODES:
        raise ValueError(f"{where}: loss_agg_mode is {loss_agg_mode!r}; expected one of {', '.join(_MODES)}")
    name = {"token-mean": "batch_num_tokens", "token-sum": None}.get(loss_agg_mode, "global_batch_size")
    normalizer = {"batch_num_tokens": batch_num_tokens, "global_batch_size": global_batch_size}.get(name or "")
    if dp_size > 1 and name is not None and normalizer is None:
        raise ValueError(f"{where}: {name} is None; expected the number over all ranks, since dp_size is {dp_size}")
    how = loss_agg_mode.removesuffix("-norm")
    loss = aggregate(loss_mat, loss_mask != 0, how, normalizer, count_empty=False) * dp_size
    if how != loss_agg_mode:
        loss = loss / (loss_mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
    return loss


def register(prefix: str = "kldiv_") -> list[str]:
    """Registers every loss of `POLICY_LOSSES` with verl, as prefix + verl's name, and the hook of top-k distillation.

    `actor_rollout_ref.actor.policy_loss.loss_mode=kldiv_gspo` then takes ours; with prefix="" ours replace verl's own.
    The hook has no names to choose from: where this verl has `compute_forward_kl_topk`, ours takes its place in every
    module of verl that has imported it.

    Returns:
        The names of the losses, and of the places of the hook.

    Raises:
        ImportError: verl cannot be imported, or has no `register_policy_loss`.
    """
    try:
        from verl.trainer.ppo.core_algos import register_policy_loss
    except ImportError as error:
        raise ImportError(
            f"register: verl.trainer.ppo.core_algos.register_policy_loss cannot be imported ({error}); expected verl "
            f"0.5 or later in this environment. POLICY_LOSSES work without it"
        ) from error
    for name, loss in POLICY_LOSSES.items():
        register_policy_loss(prefix + name)(loss)
    return [*(prefix + name for name in POLICY_LOSSES), *_hook()]


def _hook() -> list[str]:
    name = compute_forward_kl_topk.__name__
    try:
        original = getattr(import_module("verl.trainer.distillation.fsdp.losses"), name)
    except (ImportError, AttributeError):
        return []
    places = [
        key for key, module in sys.modules.items() if key.startswith("verl.") and vars(module).get(name) is original
    ]
    for place in places:
        setattr(sys.modules[place], name, compute_forward_kl_topk)
    return [f"{place}.{name}" for place in sorted(places)]


def _policy_loss(name: str) -> PolicyLossFn:
    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        where = f"compute_policy_loss_{name}"
        tensors = {
            "old_log_prob": old_log_prob, "advantages": advantages, "response_mask": response_mask,
            "rollout_is_weights": rollout_is_weights,
        }  # fmt: skip
        _check(where, log_prob, tensors, config)
        options = _options(where, name, config)
        valid = response_mask != 0
        # What a masked token holds, NaN or not, must not reach a sum or a gradient.
        logprob, old, advantages = (torch.where(valid, x, 0.0) for x in (log_prob, old_log_prob.detach(), advantages))
        log_ratio = logprob - old
        level = level_log_ratio(log_ratio, valid, options)
        if name == "gspo":
            level = (level.detach() + logprob - logprob.detach()).clamp(max=_GSPO_CLAMP)
        term = policy_term(Tokens(logprob, old, advantages.detach(), valid, log_ratio, level), options, None)
        per_token = term.per_token
        if rollout_is_weights is not None:
            weights = _weights(name, torch.where(valid, rollout_is_weights.detach(), 1.0), valid)
            per_token = times(per_token, weights.expand_as(per_token))
        if name == "geo_mean":
            total = aggregate(per_token, valid, "seq-mean-token-mean", None, count_empty=True)
        else:
            mode = "seq-mean-token-mean" if name in _SEQUENCE_MEAN else loss_agg_mode
            total = agg_loss(per_token, valid, mode, **read(config, "global_batch_info", {}))
        with torch.no_grad():
            means = {
                f"actor/{key}": torch.where(valid, x, 0).sum() / valid.sum().clamp_min(1)
                for key, x in _metrics(name, log_ratio, level, advantages, term, options).items()
            }
        # One transfer from the device for all of them.
        values = torch.stack([x.float() for x in means.values()]).tolist() if means else []
        return total, dict(zip(means, values, strict=True))

    loss.__name__ = loss.__qualname__ = f"compute_policy_loss_{name}"
    loss.__doc__ = f"verl's policy loss {name!r}: all [batch, tokens]; (scalar loss, metrics as floats)."
    return loss


POLICY_LOSSES: dict[str, PolicyLossFn] = {name: _policy_loss(name) for name in _LOSS_TYPES}


def _check(where: str, log_prob: Tensor, tensors: dict[str, Tensor | None], config: Any) -> None:
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


def _weights(name: str, weights: Tensor, valid: Tensor) -> Tensor:
    if name != "geo_mean":
        return weights
    logs = torch.where(valid, (weights + _SMALLEST_WEIGHT).log(), 0.0)
    return (logs.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp_min(1)).exp()


def _metrics(
    name: str, log_ratio: Tensor, level: Tensor, advantages: Tensor, term: PolicyTerm, options: PolicyOptions
) -> dict[str, Tensor]:
    """What verl logs the means of, per token."""
    if name == "gpg":
        return {}
    if name == "kl_cov":
        return {"ppo_kl": log_ratio.abs()}
    unclamped = name in ("gspo", "geo_mean", "clip_cov")
    kl = -log_ratio if unclamped else -log_ratio.clamp(-_CLAMP, _CLAMP)
    if name == "clip_cov":
        return {"pg_clipfrac": term.clipped["cov"], "ppo_kl": kl}
    never = torch.zeros_like(advantages, dtype=torch.bool)
    clipped, lower = never, never
    if name == "vanilla":
        clipped, lower = term.clipped["low"] | term.clipped["high"], term.clipped.get("dual", never)
    elif name == "gspo":
        clipped = term.clipped["low"] | term.clipped["high"]
    elif name == "cispo":
        low, high = ratio_bounds(options)
        clipped = (level.exp() < low) | (level.exp() > high)
    elif name == "geo_mean":
        outside = (log_ratio < -options.clip_low) | (log_ratio > options.clip_high)
        clipped, lower = outside & (advantages > 0), outside & (advantages < 0)
    elif name in ("dppo_tv", "dppo_kl"):
        clipped = term.clipped["low"] | term.clipped["high"]
        lower = ~clipped & (level.exp() > options.delta)
    return {"pg_clipfrac": clipped, "ppo_kl": kl, "pg_clipfrac_lower": lower}
