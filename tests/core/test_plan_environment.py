"""KLDIV_CUDA_PLAN: what it chooses in the place of the launcher, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
from cuda_plans import TWO_SWEEP, plan

pytestmark = pytest.mark.usefixtures("no_cuda_plan")


@pytest.mark.parametrize(
    ("wish", "columns", "cluster", "stages"),
    [
        ("two-sweep", 151_936, *TWO_SWEEP), ("cluster=16", 151_936, 16, 4), ("cluster=16,stages=2", 151_936, 16, 2),
        ("stages=2,cluster=16", 151_936, 16, 2), ("stages=1", 151_936, 4, 1), ("stages=4", 151_936, 16, 4),
        ("cluster=2", 8_000, 2, 4), ("stages=2", 512, 1, 2), ("cluster=16", 1_024, 16, 4), ("", 151_936, 8, 3),
    ],
)  # fmt: skip
def test_the_environment_takes_the_choice(
    monkeypatch: pytest.MonkeyPatch, wish: str, columns: int, cluster: int, stages: int
) -> None:
    monkeypatch.setenv("KLDIV_CUDA_PLAN", wish)
    found = plan(90, columns)
    assert (found.cluster, found.stages) == (cluster, stages), found.reason
    assert ("KLDIV_CUDA_PLAN" in found.reason) == bool(wish)


def test_the_environment_changes_no_call_that_has_to_be_two_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KLDIV_CUDA_PLAN", "cluster=16,stages=4")
    assert "16 bytes" in plan(90, 151_936, aligned=False).reason
    assert "sm_80" in plan(80, 151_936).reason


@pytest.mark.parametrize(
    ("wish", "options", "message"),
    [
        ("cluster", {}, "expected two-sweep, or cluster=C,stages=S with either part left out"),
        ("one-read", {}, "expected two-sweep, or cluster=C,stages=S"),
        ("cluster=4,", {}, "expected two-sweep, or cluster=C,stages=S"),
        ("cluster=4,cluster=8", {}, "expected two-sweep, or cluster=C,stages=S"),
        ("cluster=4;stages=2", {}, "'4;stages=2' is no number of at least 1"),
        ("cluster=-4", {}, "'-4' is no number of at least 1"),
        ("stages=0", {}, "'0' is no number of at least 1"),
        ("stages=", {}, "'' is no number of at least 1"),
        ("cluster=3", {}, "expected a cluster of 1, 2, 4, 8 or 16"),
        ("stages=5", {}, "expected at most 4 stages"),
        ("cluster=16", {"capability": 120}, "sm_120 has clusters of at most 8"),
        ("cluster=8", {"columns": 256}, "256 columns leave a CTA of the cluster without any"),
        (
            "cluster=4,stages=2", {},
            "sm_90 has no shared memory for 2 row pairs of 151,936 columns in a cluster of 4",
        ),
        ("cluster=2", {}, "sm_90 has no shared memory for 1 row pair of 151,936 columns in a cluster of 2"),
        (
            "stages=2", {"capability": 120},
            "sm_120 has no shared memory for 2 row pairs of 151,936 columns in a cluster of at most 8",
        ),
    ],
)  # fmt: skip
def test_the_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, wish: str, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("KLDIV_CUDA_PLAN", wish)
    with pytest.raises(ValueError, match=re.escape(f"KLDIV_CUDA_PLAN is '{wish}': {message}")):
        plan(**{"capability": 90, "columns": 151_936, **options})
