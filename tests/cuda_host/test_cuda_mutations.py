"""Every call that synchronises or moves data in the CUDA kernels is needed: what goes wrong without it is seen."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from cuda_host import mutations
from cuda_host.build import compiler
from cuda_host.mutations import NONE, Mutation, all_mutations, functions, run

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

SHOWN = [x for x in all_mutations() if functions()[x.function]]
NOT_SHOWN = [x for x in all_mutations() if not functions()[x.function]]
# The rarest is seen in every second order of threads: what twenty do not show, the model has lost sight of.
SEEDS = range(1, 21)


@functools.cache
def _program() -> Path:
    return mutations.program()


def test_all_calls_are_found() -> None:
    """A function of ptx.cuh that no kernel calls, or whose calls are not found, has to be looked at."""
    assert {x.function for x in all_mutations()} == set(functions())
    assert {x.function for x in NOT_SHOWN} == {name for name in functions() if name.startswith("fence_")}


@pytest.mark.parametrize("problems", ["orders", "edges"])
def test_nothing_left_out(problems: str) -> None:
    wrong, how = run(_program(), NONE, range(100 if problems == "orders" else 20), problems)
    assert wrong == 0, how


@pytest.mark.parametrize("mutation", SHOWN, ids=lambda x: x.name)
def test_call_left_out(mutation: Mutation) -> None:
    wrong, _ = run(_program(), mutation.number, SEEDS, "orders", stop=True)
    assert wrong > 0, f"{mutation.name}: nothing goes wrong without it"


@pytest.mark.parametrize("mutation", NOT_SHOWN, ids=lambda x: x.name)
def test_what_the_model_cannot_show(mutation: Mutation) -> None:
    """As the comment in ptx.cuh says; if it can, the comment is wrong and the call belongs to the others."""
    wrong, how = run(_program(), mutation.number, SEEDS, "orders")
    assert wrong == 0, how
