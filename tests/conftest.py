"""Settings of the whole suite."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "slow" in config.getoption("-m"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same random numbers in every test, no backend chosen from outside, and one thread.

    Most tests are small: threads that wait for each other cost more than they give, above all on a shared machine.
    A test about threads, or whose rows are split over them, sets their number.
    """
    monkeypatch.delenv("KLDIV_BACKEND", raising=False)
    torch.manual_seed(0)
    torch.set_num_threads(1)
