"""Which recipes the commands train with, by what names, and `--set name=value`. Without PyTorch: help is quick."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

import typer

from kldiv_kernels.keywords import nearest

# Functions of kldiv_kernels.recipes.
DISTILLATION = ("asft_loss", "bidirectional_kl", "dft_loss", "entropy_aware_kl", "gere_kd_loss", "kd_loss")
# The names of `kldiv train opd`, the functions, and the options that make the one of the other.
ON_POLICY: dict[str, tuple[str, dict[str, Any]]] = {
    "opd": ("vopd_loss", {"baseline": "none"}),
    "vopd": ("vopd_loss", {}),
    "gopd": ("gopd_loss", {}),
    "tsd_kd": ("tsd_kd_loss", {}),
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


def on_policy_function(where: str, recipe: str) -> tuple[str, dict[str, Any]]:
    """The function and what it is told, of a recipe of `kldiv train opd`. ValueError, naming it, for another."""
    if recipe not in ON_POLICY:
        raise ValueError(f"{where}: recipe is {recipe!r}; expected {', '.join(ON_POLICY)}{nearest(recipe, ON_POLICY)}")
    return ON_POLICY[recipe]


def on_policy_options(recipe: str, settings: list[str] | None) -> dict[str, Any]:
    """Options of --set for a --recipe of `kldiv train opd`, checked; errors are of these options."""
    try:
        function, fixed = on_policy_function("--recipe", recipe)
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix("--recipe: recipe is "), param_hint="--recipe") from None
    return _checked(function, settings, fixed)


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
    return function, _checked(function, settings, {})


def _checked(function: str, settings: list[str] | None, fixed: dict[str, Any]) -> dict[str, Any]:
    from kldiv_kernels.trainer.recipe_loss import RecipeLoss

    options = parsed_options(settings, function)
    try:
        RecipeLoss(function, {**fixed, **options}).check("--set")
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix("--set: "), param_hint="--set") from None
    return options
