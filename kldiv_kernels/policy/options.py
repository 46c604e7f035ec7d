"""The options of `policy_loss`: their defaults, those of three frameworks, and which of them go together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

from kldiv_kernels import choices

INF = math.inf
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "gspo")
DPPO = ("dppo_tv", "dppo_kl")
LOSS_TYPES: tuple[str, ...] = get_args(choices.LossType)
SAMPLED_KL: tuple[str, ...] = get_args(choices.SampledKL)
EXACT_KL: tuple[str, ...] = get_args(choices.ExactKL)
CHOICES: dict[str, tuple[str, ...]] = {
    "loss_type": LOSS_TYPES,
    "importance_level": get_args(choices.ImportanceLevel),
    "cov_selection": get_args(choices.CovSelection),
    "off_policy": get_args(choices.OffPolicy),
    "kl_estimator": get_args(choices.KLEstimator),
    "aggregation": get_args(choices.Aggregation),
    "entropy_aggregation": get_args(choices.EntropyAggregation),
}


@dataclass(frozen=True)
class PolicyOptions:
    """Every option with its value; `policy_loss` says what each means. An infinite bound is no bound."""

    loss_type: str = "grpo"
    importance_level: str = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_absolute: bool = False
    dual_clip: float = INF
    delta: float = INF
    log_ratio_clamp: float | tuple[float, float] = 20.0
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)
    vespo_positive: tuple[float, float] = (2.0, 3.0)
    vespo_negative: tuple[float, float] = (3.0, 2.0)
    cov_selection: str = "none"
    cov_fraction: float = 2e-4
    cov_bounds: tuple[float, float] = (1.0, 5.0)
    cov_kl_coef: float = 1.0
    off_policy: str = "token_truncate"
    off_policy_min: float = 0.0
    off_policy_max: float = 2.0
    off_policy_threshold: float = INF
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_bias_correction: bool = False
    kl_log_ratio_clamp: float = INF
    kl_clamp: float = INF
    entropy_coef: float = 0.0
    entropy_quantile: float = 1.0
    entropy_aggregation: str = "loss"
    aggregation: str = "token-mean"
    count_empty_sequences: bool = True


_DEFAULTS = {field.name: field.default for field in fields(PolicyOptions)}
OPTION_NAMES = tuple(_DEFAULTS)
_AGGREGATION = {
    **dict.fromkeys(("grpo", "sapo", "gspo", "gmpo"), "seq-mean-token-mean"),
    "luspo": "seq-mean-token-sum",
    "dr_grpo": "token-sum",
}
_LEVEL = {"gspo": "sequence", "topr": "sequence_sum"}
_VERL_CLAMP: dict[str, float | tuple[float, float]] = {"gspo": (-INF, 10.0), "gmpo": INF}
_CLAMPED_KL: dict[str | None, tuple[str, ...]] = {"verl": ("k3", "k3_plus"), "nemo_rl": SAMPLED_KL}
_LOSS_TYPE = {None: "grpo", "trl": "dapo", "verl": "dapo", "nemo_rl": "dapo"}


def _defaults(preset: str | None, loss_type: str, kl_estimator: str) -> dict[str, Any]:
    """What differs from the defaults of PolicyOptions."""
    options: dict[str, Any] = {
        "loss_type": loss_type,
        "kl_estimator": kl_estimator,
        "aggregation": _AGGREGATION.get(loss_type, "token-mean"),
        "importance_level": _LEVEL.get(loss_type, "token"),
        # The ratio that multiplies the score is capped at 20 (Binary-TV and Binary-KL DPPO, arXiv 2602.04879).
        "delta": 20.0 if loss_type in DPPO else INF,
    }
    if preset == "trl":
        options |= {
            "log_ratio_clamp": INF,
            "off_policy": "token_truncate" if loss_type == "vespo" else "sequence_mask",
            "off_policy_max": 3.0,
            "kl_bias_correction": kl_estimator in SAMPLED_KL and kl_estimator != "k3_plus",
            "entropy_aggregation": "token-mean",
        }
        if loss_type == "cispo":
            options |= {"clip_absolute": True, "clip_low": 0.0}
        if loss_type == "gmpo":
            options |= {"clip_low": 0.4, "clip_high": 0.4}
    if preset == "verl":
        options |= {
            "count_empty_sequences": loss_type == "gmpo",
            "dual_clip": 3.0 if loss_type in CLIPPED and loss_type != "gspo" else INF,
            "log_ratio_clamp": _VERL_CLAMP.get(loss_type, 20.0),
        }
        if loss_type == "topr":
            options["importance_level"] = "sequence"
    if preset == "nemo_rl":
        options |= {"log_ratio_clamp": INF, "count_empty_sequences": False, "off_policy": "none"}
    if kl_estimator in _CLAMPED_KL.get(preset, ()):
        options |= {"kl_log_ratio_clamp": 20.0, "kl_clamp": 10.0}
    return options


def off_policy_given(given: Mapping[str, object]) -> bool:
    """Whether an option of the correction for another sampling policy was given."""
    return any(given[name] is not None for name in ("off_policy", "off_policy_min", "off_policy_max"))


def looks_at_the_batch(options: PolicyOptions) -> str:
    """The option, with its value, that selects tokens among all of the batch; "" where there is none."""
    if options.entropy_quantile < 1:
        return f"entropy_quantile = {options.entropy_quantile}"
    return "" if options.cov_selection == "none" else f"cov_selection = {options.cov_selection!r}"


def resolve(where: str, preset: str | None, given: Mapping[str, Any]) -> PolicyOptions:
    """`given` over the preset's defaults; None leaves a default. Raises where a value or a combination is wrong."""
    if preset not in _LOSS_TYPE:
        raise ValueError(f"{where}: preset is {preset!r}; expected None, trl, verl or nemo_rl")
    given = {name: value for name, value in given.items() if value is not None}
    for name, allowed in CHOICES.items():
        if name in given and given[name] not in allowed:
            raise ValueError(f"{where}: {name} is {given[name]!r}; expected {', '.join(allowed[:-1])} or {allowed[-1]}")
    loss_type = given.get("loss_type", _LOSS_TYPE[preset])
    estimator = given.get("kl_estimator", "k3_plus" if preset == "nemo_rl" else "k3")
    defaults = _defaults(preset, loss_type, estimator)
    if "delta" in given:
        defaults["dual_clip"] = INF
    options = PolicyOptions(**{**defaults, **given})
    _check_values(where, options)
    _check_combinations(where, options, given)
    return options


def _check_values(where: str, options: PolicyOptions) -> None:
    for name, default in _DEFAULTS.items():
        value = getattr(options, name)
        rule = _VALUES.get(name)
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise TypeError(f"{where}: {name} is {value!r}; expected True or False")
        elif isinstance(default, tuple):
            if not (isinstance(value, tuple) and len(value) == 2 and all(_is_number(x) for x in value)):
                raise TypeError(f"{where}: {name} is {value!r}; expected a pair of numbers")
        elif isinstance(default, float) and name != "log_ratio_clamp" and not _is_number(value):
            raise TypeError(f"{where}: {name} is {value!r}; expected a number")
        if rule is not None and not rule[1](value):
            raise ValueError(f"{where}: {name} is {value}; expected {rule[0]}")
    low, high = bounds(options.log_ratio_clamp) if _is_clamp(options.log_ratio_clamp) else (0.0, 0.0)
    if not low < high:
        raise ValueError(
            f"{where}: log_ratio_clamp is {options.log_ratio_clamp!r}; expected a number above 0 or (low, high)"
        )
    if options.clip_absolute and not options.clip_low < options.clip_high:
        raise ValueError(f"{where}: clip_low is {options.clip_low}; expected below clip_high = {options.clip_high}")
    if not options.off_policy_min <= options.off_policy_max:
        raise ValueError(
            f"{where}: off_policy_min is {options.off_policy_min}; expected at most off_policy_max = "
            f"{options.off_policy_max}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_clamp(value: Any) -> bool:
    pair = value if isinstance(value, tuple) else (value,)
    return len(pair) in (1, 2) and all(_is_number(x) for x in pair)


def bounds(clamp: float | tuple[float, float]) -> tuple[float, float]:
    """(low, high) of a clamp given as a pair, or as the one number that bounds both sides."""
    return clamp if isinstance(clamp, tuple) else (-clamp, clamp)


_VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "clip_low": ("0 or more", lambda x: x >= 0),
    "clip_high": ("0 or more", lambda x: x >= 0),
    "dual_clip": ("1 or more", lambda x: x >= 1),
    "delta": ("above 0", lambda x: x > 0),
    "sapo_temperatures": ("two numbers above 0", lambda x: x[0] > 0 and x[1] > 0),
    "vespo_positive": ("k and lambda, finite", lambda x: math.isfinite(x[0]) and math.isfinite(x[1])),
    "vespo_negative": ("k and lambda, finite", lambda x: math.isfinite(x[0]) and math.isfinite(x[1])),
    "cov_fraction": ("above 0 and at most 1", lambda x: 0 < x <= 1),
    "cov_bounds": ("low < high", lambda x: x[0] < x[1]),
    "cov_kl_coef": ("finite", math.isfinite),
    "off_policy_min": ("0 or more", lambda x: x >= 0),
    "off_policy_max": ("above 0", lambda x: x > 0),
    "off_policy_threshold": ("a number", lambda x: not math.isnan(x)),
    "kl_coef": ("finite", math.isfinite),
    "kl_log_ratio_clamp": ("above 0", lambda x: x > 0),
    "kl_clamp": ("above 0", lambda x: x > 0),
    "entropy_coef": ("finite", math.isfinite),
    "entropy_quantile": ("above 0 and at most 1", lambda x: 0 < x <= 1),
}

# The loss types that an option means something for; the options that are not here are for all of them.
_MEANT_FOR = {
    "clip_low": (*CLIPPED, "cispo", "gmpo", *DPPO),
    "clip_high": (*CLIPPED, "cispo", "gmpo", *DPPO),
    "clip_absolute": (*CLIPPED, "cispo"),
    "dual_clip": CLIPPED,
    "delta": (*CLIPPED, *DPPO),
    "sapo_temperatures": ("sapo",),
    "vespo_positive": ("vespo",),
    "vespo_negative": ("vespo",),
    "cov_selection": CLIPPED,
    "entropy_quantile": tuple(name for name in LOSS_TYPES if name != "gmpo"),
}
_LEVELS = {
    "gspo": ("sequence", "sequence_sum"),
    **dict.fromkeys(("gmpo", "reinforce", *DPPO), ("token",)),
}


def _check_combinations(where: str, options: PolicyOptions, given: Mapping[str, Any]) -> None:
    loss_type = options.loss_type
    for name, meant in _MEANT_FOR.items():
        if name in given and loss_type not in meant:
            raise ValueError(
                f"{where}: {name} is {given[name]!r}, which loss_type {loss_type!r} has no use for; "
                f"it is for {', '.join(meant)}"
            )
    levels = _LEVELS.get(loss_type, CHOICES["importance_level"])
    if options.importance_level not in levels:
        raise ValueError(
            f"{where}: importance_level is {options.importance_level!r}; expected {' or '.join(levels)} "
            f"for loss_type {loss_type!r}"
        )
    if options.dual_clip < INF and options.delta < INF:
        raise ValueError(f"{where}: dual_clip and delta both bound the loss where the advantage is negative; pass one")
    if options.cov_selection != "none" and options.importance_level != "token":
        raise ValueError(f"{where}: cov_selection is {options.cov_selection!r}; it needs importance_level 'token'")
    for name, selections in (("cov_fraction", "clip kl"), ("cov_bounds", "clip"), ("cov_kl_coef", "kl")):
        if name in given and options.cov_selection not in selections.split():
            raise ValueError(
                f"{where}: {name} is given, but cov_selection is {options.cov_selection!r}; "
                f"expected {' or '.join(selections.split())}"
            )
    if loss_type == "vespo" and options.off_policy.startswith("sequence"):
        raise ValueError(f"{where}: off_policy is {options.off_policy!r}; expected a token level for loss_type 'vespo'")
    if options.kl_estimator in EXACT_KL:
        for name in ("kl_bias_correction", "kl_log_ratio_clamp", "kl_clamp"):
            if given.get(name):
                raise ValueError(
                    f"{where}: {name} is given, but kl_estimator {options.kl_estimator!r} is exact and needs none"
                )
    if options.kl_estimator == "k3_plus" and options.kl_bias_correction:
        raise ValueError(f"{where}: kl_bias_correction is True, but kl_estimator 'k3_plus' is corrected; pass 'k3'")
