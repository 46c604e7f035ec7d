"""Every recipe beside its paper's numbers or its definition: values, gradients, masks, and reads of the logits."""

from __future__ import annotations

import inspect
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import pytest
import recipe_cases
import torch
from checks import BACKENDS
from recipe_case import Case, definition, evaluate, with_masked
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.recipes.registry import FAMILIES

_FILES = [import_module(f"recipe_cases.{module.name}") for module in iter_modules(recipe_cases.__path__)]
CASES: list[Case] = [case for file in _FILES for case in file.CASES]
IDS = [case.id for case in CASES]
MASKED = [case for case in CASES if "mask" in case.tensors and not case.tensors["mask"].all()]
# What says in its docstring that its other side gets a gradient too.
BOTH_SIDES = {"bidirectional_kl": ("teacher_logits",)}
FUNCTIONS = [name for recipe in kk.recipes.listing() for name in recipe.functions]
RECIPE_OF = {name: recipe for recipe in kk.recipes.listing() for name in recipe.functions}


def reads(case: Case) -> str:
    return case.reads or RECIPE_OF[case.recipe].logit_part


LOSSES = [case for case in CASES if case.trained and reads(case) != "torch"]
LOGITS = ("teacher_logits", "reference_logits")


def parameters(name: str) -> Any:
    return inspect.signature(getattr(kk.recipes, name)).parameters


def apart(x: Tensor, y: Tensor) -> float:
    """The largest difference; equal infinities have none."""
    return torch.where(x == y, 0.0, x.double() - y).abs().max().item()


def close(got: Tensor, expected: Tensor, relative: float) -> None:
    """Within `relative` of the largest, or of 1."""
    assert got.shape == expected.shape
    if expected.numel():
        bound = relative * max(1.0, expected.nan_to_num(neginf=0.0).abs().max().item())
        assert apart(got, expected) <= bound, f"got {got}, expected {expected}"


def wanted(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    if case.expected is not None:
        return definition(case)
    gradients = {
        name: torch.tensor(x, dtype=torch.float64).reshape(case.tensors[name].shape)
        for name, x in case.gradients.items()
    }
    value = torch.tensor(case.value, dtype=torch.float64)
    return value, gradients


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_in_float64(case: Case) -> None:
    value, gradients = wanted(case)
    got, found = evaluate(case, torch.float64, "reference")
    close(got.reshape(value.shape), value, 1e-9)
    for name, gradient in gradients.items():
        expected = gradient.abs().max()
        assert (found[name] - gradient).abs().max() <= 1e-9 * max(1.0, expected.item()), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_on_every_backend(case: Case, backend: str) -> None:
    """float32: the values' 1e-5, and 2e-5 of the tensor's largest gradient."""
    value, gradients = wanted(case)
    got, found = evaluate(case, torch.float32, backend)
    close(got.reshape(value.shape), value, 2e-5)
    for name, gradient in gradients.items():
        assert (found[name].double() - gradient).abs().max() <= 2e-5 * gradient.abs().max() + 1e-7, name


@pytest.mark.parametrize("case", MASKED, ids=[case.id for case in MASKED])
def test_masked_tokens(case: Case) -> None:
    """NaN there changes nothing and has no gradient; without the mask the result is another; of no token it is 0."""
    value, gradients = evaluate(case, torch.float64, "reference")
    again, found = evaluate(case, torch.float64, "reference", with_masked(case.tensors, torch.nan))
    close(again, value, 1e-12)
    for name, gradient in gradients.items():
        close(found[name], gradient, 1e-12)
    kept = case.tensors["mask"]
    everything, _ = evaluate(case, torch.float64, "reference", case.tensors | {"mask": torch.ones_like(kept)})
    assert apart(everything, value) > 1e-4
    none, found = evaluate(case, torch.float64, "reference", case.tensors | {"mask": torch.zeros_like(kept)})
    assert (none == 0).all()
    for gradient in found.values():
        assert (gradient == 0).all()


@pytest.mark.parametrize("case", LOSSES, ids=[case.id for case in LOSSES])
def test_nothing_else_gets_a_gradient(case: Case) -> None:
    """No teacher, reference, old policy or advantage, although all of them could: but for a method that says so."""
    given = {
        name: x.detach().clone().requires_grad_() if x.is_floating_point() else x for name, x in case.tensors.items()
    }
    out = getattr(kk.recipes, case.recipe)(**given, **case.options)
    value = out.loss if isinstance(out, kk.PolicyLoss) else out
    others = [name for name in given if name not in case.trained and given[name].is_floating_point()]
    found = torch.autograd.grad(value.sum(), [given[name] for name in others], allow_unused=True) if others else ()
    leaks = [name for name, x in zip(others, found, strict=True) if x is not None and (x != 0).any()]
    assert set(leaks) <= set(BOTH_SIDES.get(case.recipe, ()))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_shapes_that_broadcasting_would_take(case: Case) -> None:
    """One row, or one column, of what belongs to tokens or sequences is an error that names it, and no number."""
    tokens = case.tensors.get("token_ids", case.tensors.get("mask"))
    if tokens is None or tokens.dim() != 2 or min(tokens.shape) < 2:
        tokens = torch.zeros(0)
    says_the_shape = "token_ids" if "token_ids" in case.tensors else "mask"
    for name, x in case.tensors.items():
        wrong = []
        if name == says_the_shape and "logits" not in case.tensors:
            continue
        if x.shape == tokens.shape:
            wrong = [x[:1], x[:, :1]] if name != "advantages" else [x[:1]]
        elif x.shape == tokens.shape[:1]:
            wrong = [x[:1]]
        for other in wrong:
            with pytest.raises((ValueError, TypeError), match=r"\w"):
                evaluate(case, torch.float64, "reference", case.tensors | {name: other}, grad=False)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_has_cases_that_can_fail(name: str) -> None:
    cases = [case for case in CASES if case.recipe == name]
    assert cases, "no case"
    trained = [case for case in cases if case.trained]
    assert not trained or any(
        all(gradient.abs().max() > 1e-3 for gradient in wanted(case)[1].values()) and wanted(case)[1]
        for case in trained
    ), "all of its gradients are 0"
    if "mask" in parameters(name):
        assert any(case in MASKED for case in cases), "no case with a mask"
    roles = [case for case in cases if case.roles is not None]
    if any(other in parameters(name) for other in LOGITS):
        assert roles, "no case says which tensors must not be swapped"
    for case in roles:
        first, second = case.roles  # type: ignore[misc]
        swapped = case.tensors | {first: case.tensors[second], second: case.tensors[first]}
        got, _ = evaluate(case, torch.float64, "reference", swapped)
        assert (got - wanted(case)[0].reshape(got.shape)).abs().max() > 1e-3, "swapped, it is the same"


@pytest.mark.parametrize("case", LOSSES, ids=[case.id for case in LOSSES])
def test_reads_of_the_logits(case: Case, passes: list[str]) -> None:
    """As the registry claims: of a loss, values and gradient in one read, after a read without gradient, or two."""
    claimed = reads(case)
    evaluate(case, torch.float32, "cpu")
    one_read, statistics = [x for x in passes if x != "statistics"], passes.count("statistics")
    found = {(False, 0): "none", (True, 0): "R0"}.get((bool(one_read), statistics), "R0+f" if one_read else "R1")
    assert found == claimed, passes


@pytest.mark.parametrize("family", FAMILIES)
def test_under_torch_compile(family: str) -> None:
    """The first loss of each family, or function where it has no loss, gives the same number compiled by PyTorch."""
    of_family = [case for case in CASES if RECIPE_OF[case.recipe].family == family]
    case = next((case for case in of_family if case.trained), of_family[0])
    value, _ = evaluate(case, torch.float32, "cpu", grad=False)
    function = torch.compile(getattr(kk.recipes, case.recipe), backend="aot_eager")
    given = {name: x.float() if x.is_floating_point() else x for name, x in case.tensors.items()}
    out = function(**given, **case.options)
    close(out.loss if isinstance(out, kk.PolicyLoss) else out, value.double(), 1e-6)
