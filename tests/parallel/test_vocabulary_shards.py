"""Columns of the vocabulary in several processes: every case of shard_cases.py on one to four of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import ranks

_MODULE = "shard_cases"
_WORLDS = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def outcomes() -> dict[int, dict[str, list[str]]]:
    return {}


@pytest.mark.parametrize("world", _WORLDS)
@pytest.mark.parametrize("name", ranks.cases_of(_MODULE))
def test_on_several_ranks(name: str, world: int, outcomes: dict[int, dict[str, list[str]]]) -> None:
    if world not in outcomes:
        outcomes[world] = ranks.run(_MODULE, world)
    failed = outcomes[world]
    assert not failed["start"], failed["start"][0]
    assert not failed[name], failed[name][0]
