"""Methods of `kk.recipes` inside TRL's GRPO: what each adds to the trainer's calls of `policy_loss`.

A method is a function of its options here; `recipe_of` finds one by name. `GRPOTrainer(recipe=)` takes what it returns.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kldiv_kernels.keywords import nearest
from kldiv_kernels.recipes import dgpo_weights
from kldiv_kernels.stats import selective_log_softmax

# (logits, the other model's, token_ids, mask, options of token_stats) -> keyword arguments of policy_loss
Tensors = Callable[[Tensor, Tensor, Tensor, Tensor, Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class GRPORecipe:
    """What a method adds to each call of `policy_loss`.

    options: as `GRPOTrainer(policy_loss_options=)`. other: what a second model is, "" where there is none. tensors:
    what `policy_loss` gets beside, from the completion's logits of the policy and of the other model.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    other: str = ""
    tensors: Tensors | None = None


def clip_cov(*, fraction: float = 2e-4, bounds: tuple[float, float] = (1.0, 5.0)) -> GRPORecipe:
    """Paper 107, `kk.recipes.clip_cov_loss`."""
    return GRPORecipe(
        "clip_cov",
        {"clip_low": 1.0, "clip_high": 1.0, "cov_selection": "clip", "cov_fraction": fraction, "cov_bounds": bounds},
    )


def kl_cov(*, percent: float = 0.2, kl_coef: float = 1.0) -> GRPORecipe:
    """Paper 107, `kk.recipes.kl_cov_loss`."""
    _require(0 < percent <= 100, "percent", percent, "above 0 and at most 100")
    options = {"cov_selection": "kl", "cov_fraction": percent / 100, "cov_kl_coef": kl_coef}
    return GRPORecipe("kl_cov", {"clip_low": 1.0, "clip_high": math.inf, **options})


def dgpo(*, credit_temperature: float = 0.5, power: float = 1.0) -> GRPORecipe:
    """Paper 27, `kk.recipes.dgpo_weights` as token weights; the other model is the reference."""
    _require(credit_temperature > 0, "credit_temperature", credit_temperature, "above 0")

    def tensors(logits: Tensor, reference: Tensor, ids: Tensor, mask: Tensor, how: Mapping[str, Any]) -> dict[str, Any]:
        weights = dgpo_weights(
            logits.detach(), reference, mask, credit_temperature=credit_temperature, power=power, **how
        )
        return {"token_weights": weights}

    return GRPORecipe("dgpo", {}, "reference", tensors)


def kdrl(*, kd_coef: float = 5e-3) -> GRPORecipe:
    """Paper 16, `kk.recipes.kdrl_loss` with all tokens kept; the other model is the teacher."""
    _require(0 < kd_coef < math.inf, "kd_coef", kd_coef, "above 0 and finite")

    def tensors(logits: Tensor, teacher: Tensor, ids: Tensor, mask: Tensor, how: Mapping[str, Any]) -> dict[str, Any]:
        return {"reference_logprobs": selective_log_softmax(teacher, ids, mask=mask, **how), "kl_coef": kd_coef}

    return GRPORecipe("kdrl", {"kl_estimator": "k2", "kl_bias_correction": False}, "teacher", tensors)


RECIPES: dict[str, Callable[..., GRPORecipe]] = {f.__name__: f for f in (clip_cov, kl_cov, dgpo, kdrl)}


def recipe_of(name: str, options: Mapping[str, Any]) -> GRPORecipe:
    """The recipe of that name with its options. ValueError, naming what is wrong, for another name or option.

    >>> recipe_of("kl_cov", {"percent": 0.02}).options["cov_kl_coef"]
    1.0
    """
    if name not in RECIPES:
        raise ValueError(f"recipe: {name!r}; expected {', '.join(RECIPES)}{nearest(name, RECIPES)}")
    allowed = inspect.signature(RECIPES[name]).parameters
    for option in options:
        if option not in allowed:
            hint = nearest(option, allowed) or f"; it has {', '.join(allowed)}"
            raise ValueError(f"{option} is no option of {name}{hint}")
    try:
        return RECIPES[name](**options)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value}; expected {allowed}")
