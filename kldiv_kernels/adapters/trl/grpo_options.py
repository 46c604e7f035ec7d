"""From TRL's GRPOConfig to the arguments of `policy_loss`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from kldiv_kernels.policy import EXACT_KL, OPTION_NAMES, PolicyOptions, policy_loss, resolve

_WHERE = "GRPOTrainer"
_TRL_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
# What the trainer itself sets from its batch, or shares with sampling, logging and the reference model.
_OF_THE_TRAINER = {
    "kl_coef": "GRPOConfig(beta=)",
    "entropy_coef": "GRPOConfig(entropy_coef=)",
    "temperature": "GRPOConfig(temperature=)",
    "count_empty_sequences": "nothing: the trainer divides by the sequences of the batch, empty or not",
}
_FREE = (*(name for name in OPTION_NAMES if name not in _OF_THE_TRAINER), "backend", "vocab_size")


def policy_arguments(args: Any, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Keyword arguments of `policy_loss` for a GRPOConfig, with `given` over them.

    epsilon, delta and importance_sampling_level go to TRL's own loss types; another has the defaults of
    `policy_loss(preset="trl")`. Raises ValueError, naming what the trainer cannot serve.
    """
    given = dict(given or {})
    _check_names(given)
    loss_type = given.get("loss_type", args.loss_type)
    arguments: dict[str, Any] = {"loss_type": loss_type}
    if loss_type in _TRL_LOSS_TYPES:
        arguments |= {"importance_level": args.importance_sampling_level, **_of_loss_type(args, loss_type)}
    if args.top_entropy_quantile < 1:
        arguments["entropy_quantile"] = args.top_entropy_quantile
    if args.off_policy_mask_threshold is not None:
        arguments["off_policy_threshold"] = args.off_policy_mask_threshold
    if args.use_vllm and args.vllm_importance_sampling_correction:
        low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
        arguments |= {
            "off_policy": args.vllm_importance_sampling_mode,
            "off_policy_min": 0.0 if low is None else low,
            "off_policy_max": math.inf if high is None else high,
        }
    if args.beta != 0 and given.get("kl_estimator", "k3") not in (*EXACT_KL, "k3_plus"):
        arguments["kl_bias_correction"] = args.use_bias_correction_kl
    arguments["kl_coef"] = args.beta
    arguments |= given
    resolved(arguments)
    return arguments


def resolved(arguments: Mapping[str, Any]) -> PolicyOptions:
    """The options that `arguments` come to; raises ValueError where `policy_loss` would."""
    return resolve(_WHERE, "trl", {name: value for name, value in arguments.items() if name in OPTION_NAMES})


def is_windowed(options: PolicyOptions) -> bool:
    """Whether the loss is a mean over the tokens of the whole optimiser step; bnpo's is over those of each call."""
    return options.aggregation == "token-mean" and options.loss_type != "bnpo"


def _check_names(given: Mapping[str, Any]) -> None:
    parameters = inspect.signature(policy_loss).parameters
    for name in given:
        if name in _OF_THE_TRAINER:
            raise ValueError(f"{_WHERE}: policy_loss_options has {name!r}; use {_OF_THE_TRAINER[name]}")
        if name not in _FREE:
            why = "which the trainer sets" if name in parameters else "which policy_loss does not know"
            raise ValueError(f"{_WHERE}: policy_loss_options has {name!r}, {why}; expected any of {', '.join(_FREE)}")


def _of_loss_type(args: Any, loss_type: str) -> dict[str, Any]:
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if loss_type == "cispo":
        return {"clip_high": high}
    if loss_type == "sapo":
        return {"sapo_temperatures": (args.sapo_temperature_pos, args.sapo_temperature_neg)}
    if loss_type == "vespo":
        return {
            "vespo_positive": (args.vespo_k_pos, args.vespo_lambda_pos),
            "vespo_negative": (args.vespo_k_neg, args.vespo_lambda_neg),
        }
    clip: dict[str, Any] = {"clip_low": args.epsilon, "clip_high": high}
    return clip if args.delta is None else {**clip, "delta": args.delta}
