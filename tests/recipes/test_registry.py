"""The registry of recipes: complete, found by any of its names, and all of it in the documentation."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import kldiv_kernels as kk
from kldiv_kernels import recipes

ROOT = Path(__file__).parents[2]
PAPERS = {
    1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29,
    30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 41, 42, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57,
    58, 59, 60, 61, 62, 63, 64, 65, 66, 67, 68, 70, 71, 72, 73, 74, 75, 76, 77, 78, 79, 80, 81, 82, 83, 84,
    86, 87, 88, 90, 92, 94, 103, 107, 108, 109
}  # fmt: skip
PRIMITIVES = (
    "reductions", "selection", "lists", "f_divergences", "mixtures", "schedules", "cross_tokenizer", "token_spans",
    "vocabularies",
)  # fmt: skip


def test_every_paper_and_every_function_is_there() -> None:
    assert set(recipes.RECIPES) == PAPERS
    named = [name for recipe in recipes.listing() for name in recipe.functions]
    assert len(named) == len(set(named))
    for name in named:
        function = getattr(kk.recipes, name)
        assert name in recipes.__all__
        kinds = {p.kind for p in inspect.signature(function).parameters.values()}
        assert inspect.Parameter.VAR_POSITIONAL not in kinds
        assert ">>> " in function.__doc__
    for recipe in recipes.listing():
        assert recipe.title
        assert 2017 <= recipe.year <= 2026
        assert recipe.functions or recipe.differs
        if recipe.confidence in ("derived", "restated"):
            assert recipe.differs, f"{recipe.method}: what was not seen?"
        for family in recipes.FAMILIES:
            assert (recipe in recipes.listing(family)) == (recipe.family == family)


def test_find() -> None:
    for recipe in recipes.listing():
        for name in (recipe.paper, str(recipe.paper), recipe.method, recipe.title, *recipe.functions):
            assert kk.recipes.find(name) is recipe
        for part in recipe.method.split(" / "):
            assert kk.recipes.find(part.lower()) is recipe
    assert kk.recipes.find("tsd").paper == 49
    for wrong, message in (
        ("tsdkb", "no method is called 'tsdkb'; did you mean TSD-KD?"),
        ("kl", r"'kl' is more than one method: vOPD \(3\), .*Clip-Cov"),
        ("", "no method is called ''"),
        (19, "there is no paper 19; expected one of 1, 2,"),
    ):
        with pytest.raises(ValueError, match=f"find: {message}"):
            kk.recipes.find(wrong)
    with pytest.raises(ValueError, match="listing: family is 'rl'; expected None, distillation, "):
        kk.recipes.listing("rl")


def test_the_documentation_has_all_of_it() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert re.findall(r"\{recipes-table\} (\w+)", page) == list(recipes.FAMILIES)
    reference = (ROOT / "docs" / "api" / "recipes.rst").read_text()
    documented = re.findall(r"autofunction:: (\w+)", reference)
    for recipe in recipes.listing():
        assert set(recipe.functions) <= set(documented)
    for name in PRIMITIVES:
        module = getattr(recipes, name)
        own = [x for x, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
        assert {x for x in own if not x.startswith("_")} <= set(documented)
