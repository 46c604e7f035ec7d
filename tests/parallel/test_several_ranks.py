"""What the ranks of a group do together: the cases of the modules here, run by processes that are started once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import ranks
import torch

from kldiv_kernels.parallel import at_positions, group_checked, largest

# How many ranks, and what they run.
_MODULES = {
    1: ("shard_cases", "head_cases"),
    2: ("shard_cases", "head_cases", "dtensor_cases", "dtensor_linear_cases"),
    3: ("shard_cases", "head_cases"),
    4: ("shard_cases", "head_cases", "dtensor_cases", "dtensor_linear_cases", "sequence_cases", "batch_cases"),
}
_CASES = [(world, name) for world, modules in _MODULES.items() for name in ranks.cases_of(*modules)]


@pytest.fixture(scope="module")
def outcomes() -> dict[int, dict[str, list[str]]]:
    return {}


@pytest.mark.parametrize(("world", "name"), _CASES)
def test_on_several_ranks(world: int, name: str, outcomes: dict[int, dict[str, list[str]]]) -> None:
    if world not in outcomes:
        outcomes[world] = ranks.run(world, *_MODULES[world])
    failed = outcomes[world]
    assert not failed["start"], failed["start"][0]
    assert not failed[name], failed[name][0]


def test_one_rank() -> None:
    values = torch.tensor([3.0, 1.0, 2.0, 2.0])
    mask = torch.tensor([True, True, True, False])
    assert at_positions(values, mask, torch.tensor([0, 1, 2]), None).tolist() == [1.0, 2.0, 3.0]
    assert largest(values, mask, torch.tensor(2), None).tolist() == [True, False, True, False]
    with pytest.raises(TypeError, match=r"f: group is str; expected None or a torch.distributed.ProcessGroup"):
        group_checked("f", "group", "world")
