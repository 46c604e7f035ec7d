"""Which methods there are: by the paper's number, by name, by family (the module that they stand in)."""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from importlib import import_module

from kldiv_kernels.recipes.recipe import Recipe

FAMILIES = (
    "distillation",
    "fine_tuning",
    "on_policy_distillation",
    "selective_distillation",
    "teacher_and_reward",
    "hints_and_experts",
    "policy_gradient",
    "prompt_groups",
    "action_policies",
    "token_credit",
    "reward_shaping",
    "regularized_policy",
    "divergence_penalties",
    "entropy_control",
    "rare_tokens",
    "preference",
    "sequence_preference",
    "listwise",
    "preference_games",
    "classifier",
    "class_margins",
    "batch_coupling",
    "consistency",
    "sequence_divergences",
    "diffusion",
    "continuous",
    "inference",
    "diagnostics",
)


def _collected() -> dict[int, Recipe]:
    found: dict[int, Recipe] = {}
    for family in FAMILIES:
        for recipe in import_module(f"{__package__}.{family}").PAPERS:
            assert recipe.paper not in found, f"paper {recipe.paper} twice"
            found[recipe.paper] = replace(recipe, family=family)
    return dict(sorted(found.items()))


RECIPES: dict[int, Recipe] = _collected()


def listing(family: str | None = None) -> list[Recipe]:
    """The methods of a family, by the paper's number; of all families without one.

    Raises ValueError for a family that there is not.

    >>> [recipe.method for recipe in listing("on_policy_distillation")][:2]
    ['vOPD', 'TCOD']
    """
    if family is not None and family not in FAMILIES:
        raise ValueError(f"listing: family is {family!r}; expected None, {', '.join(FAMILIES[:-1])} or {FAMILIES[-1]}")
    return [recipe for recipe in RECIPES.values() if family in (None, recipe.family)]


def find(name: str | int) -> Recipe:
    """A method by the paper's number, by its name or a part of it, or by a function's.

    Raises ValueError where none, or more than one, is meant.

    >>> find("vopd").functions
    ('vopd_advantages', 'vopd_loss')
    >>> find("gopd_loss").paper == find(46).paper
    True
    """
    if isinstance(name, int) or name.isdecimal():
        if int(name) not in RECIPES:
            raise ValueError(f"find: there is no paper {name}; expected one of {', '.join(map(str, RECIPES))}")
        return RECIPES[int(name)]
    wanted = _plain(name)
    names = {number: [_plain(x) for x in _names(recipe)] for number, recipe in RECIPES.items()}
    for matches in (lambda x: x == wanted, lambda x: x.startswith(wanted), lambda x: wanted in x):
        found = [number for number, of_paper in names.items() if wanted and any(matches(x) for x in of_paper)]
        if len(found) == 1:
            return RECIPES[found[0]]
        if found:
            several = ", ".join(f"{RECIPES[number].method} ({number})" for number in found)
            raise ValueError(f"find: {name!r} is more than one method: {several}")
    every = sorted({x for of_paper in names.values() for x in of_paper})
    near = difflib.get_close_matches(wanted, every, n=1)
    hint = next(
        (f"; did you mean {RECIPES[n].method}?" for n, of_paper in names.items() if near and near[0] in of_paper), ""
    )
    raise ValueError(f"find: no method is called {name!r}{hint} (kk.recipes.listing() has them all)")


def _names(recipe: Recipe) -> list[str]:
    """Its method's names, of which some have two ("G-OPD / ExOPD"), its functions and its title."""
    return [recipe.method, *re.split(r"\s*[/,]\s*", recipe.method), *recipe.functions, recipe.title]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
