"""Every case of the modules here, run together by all ranks of a group, which is started once for a module."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import ranks

# And the sizes of the groups.
_MODULES = {"shard_cases": (1, 2, 3, 4), "dtensor_cases": (2, 4), "dtensor_linear_cases": (2, 4)}
_CASES = [
    pytest.param(module, world, name, id=f"{module}-{world}-{name}")
    for module, worlds in _MODULES.items()
    for world in worlds
    for name in ranks.cases_of(module)
]


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, int], dict[str, list[str]]]:
    return {}


@pytest.mark.parametrize(("module", "world", "name"), _CASES)
def test_on_several_ranks(
    module: str, world: int, name: str, outcomes: dict[tuple[str, int], dict[str, list[str]]]
) -> None:
    if (module, world) not in outcomes:
        outcomes[module, world] = ranks.run(module, world)
    failed = outcomes[module, world]
    assert not failed["start"], failed["start"][0]
    assert not failed[name], failed[name][0]
