"""Which recipes the commands train with, by what names, and `--set name=value`. Without PyTorch: help is quick."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import typer

from kldiv_kernels.keywords import nearest

if TYPE_CHECKING:
    from kldiv_kernels.trainer.recipe_loss import RecipeFunction

# By name a function of kldiv_kernels.recipes, and the options that make the one of the other.
Recipes = dict[str, tuple[str, dict[str, Any]]]

# Functions of kldiv_kernels.recipes.
DISTILLATION = ("asft_loss", "bidirectional_kl", "dft_loss", "entropy_aware_kl", "gere_kd_loss", "kd_loss")
# Of `kldiv train opd`.
ON_POLICY: Recipes = {
    "opd": ("vopd_loss", {"baseline": "none"}),
    "vopd": ("vopd_loss", {}),
    "gopd": ("gopd_loss", {}),
    "tsd_kd": ("tsd_kd_loss", {}),
}
# Of `kldiv train preference`. dpo is the case of f_dpo that the others are compared with; β as in TRL.
PREFERENCE: Recipes = {
    "tdpo": ("tdpo_loss", {}),
    "dpo": ("f_dpo_loss", {"beta": 0.1}),
    "f_dpo": ("f_dpo_loss", {}),
    "hypo": ("hypo_loss", {}),
    "rrpo": ("rrpo_loss", {}),
    "xpo": ("xpo_loss", {}),
}


def short_name(function: str) -> str:
    """As the command line has it: `asft` for asft_loss, `entropy_aware` for entropy_aware_kl.

    >>> short_name("entropy_aware_kl")
    'entropy_aware'
    """
    return function.removesuffix("_loss").removesuffix("_kl")


def function_of(where: str, name: str, functions: Iterable[str]) -> str:
    """The function's name, of its own or its short one. ValueError, naming the argument, for another."""
    by_short = {short_name(function): function for function in functions}
    if name in by_short.values():
        return name
    if name not in by_short:
        raise ValueError(f"{where}: recipe is {name!r}; expected {', '.join(by_short)}{nearest(name, by_short)}")
    return by_short[name]


def parsed(settings: Iterable[str]) -> dict[str, Any]:
    """Options from `name=value` words: numbers, tuples, True, False and None as Python has them, else text.

    >>> parsed(["kl_coef=0.1", "kind=forward_kl"])
    {'kl_coef': 0.1, 'kind': 'forward_kl'}
    """
    out: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not (name and equals):
            raise ValueError(f"{setting!r} is no name=value")
        try:
            out[name.strip()] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            out[name.strip()] = text.strip()
    return out


def parsed_options(settings: list[str] | None, recipe: str | None) -> dict[str, Any]:
    """`parsed` --set, which a --recipe has to be there for; errors are of that option."""
    if settings and recipe is None:
        raise typer.BadParameter("given without --recipe, whose options it sets", param_hint="--set")
    try:
        return parsed(settings or ())
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--set") from None


def named_function(where: str, recipe: str, known: Recipes) -> tuple[str, dict[str, Any]]:
    """The function and what it is told, of one of the `known` recipes. ValueError, naming it, for another."""
    if recipe not in known:
        raise ValueError(f"{where}: recipe is {recipe!r}; expected {', '.join(known)}{nearest(recipe, known)}")
    return known[recipe]


def on_policy_options(recipe: str, settings: list[str] | None) -> dict[str, Any]:
    """Options of --set for a --recipe of `kldiv train opd`, checked; errors are of these options."""
    from kldiv_kernels.trainer.recipe_loss import RecipeLoss

    return _named_options(recipe, settings, ON_POLICY, RecipeLoss)


def preference_options(recipe: str, settings: list[str] | None) -> dict[str, Any]:
    """Likewise for a --recipe of `kldiv train preference`."""
    from kldiv_kernels.trainer.pair_loss import PairLoss

    return _named_options(recipe, settings, PREFERENCE, PairLoss)


def recipe_options(
    recipe: str | None, settings: list[str] | None, functions: Iterable[str]
) -> tuple[str | None, dict[str, Any]]:
    """(the function, its options) of --recipe and --set, checked; errors are of these options."""
    if recipe is None:
        return None, parsed_options(settings, recipe)
    try:
        function = function_of("--recipe", recipe, functions)
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix("--recipe: recipe is "), param_hint="--recipe") from None
    from kldiv_kernels.trainer.recipe_loss import RecipeLoss

    return function, _checked(function, settings, {}, RecipeLoss)


def _named_options(
    recipe: str, settings: list[str] | None, known: Recipes, kind: type[RecipeFunction]
) -> dict[str, Any]:
    try:
        function, fixed = named_function("--recipe", recipe, known)
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix("--recipe: recipe is "), param_hint="--recipe") from None
    return _checked(function, settings, fixed, kind)


def _checked(
    function: str, settings: list[str] | None, fixed: dict[str, Any], kind: type[RecipeFunction]
) -> dict[str, Any]:
    options = parsed_options(settings, function)
    try:
        kind(function, {**fixed, **options}).check("--set")
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix("--set: "), param_hint="--set") from None
    return options
