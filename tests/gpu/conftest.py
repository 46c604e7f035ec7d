"""Splitting the tests over processes, and a line of JSON for each result, for `benchmarks/gpu_check.py`.

Most of the time goes into compiling kernels, on the CPU. KLDIV_TEST_SHARD=2/8 runs the third of eight parts; tests
of one statistic and dtype share kernels and stay together. KLDIV_TEST_REPORT names the file of results, which is
there also when the process is killed at its time limit.
"""

from __future__ import annotations

import json
import os

import pytest

# Test → the backend that it is about.
_backends: dict[str, str] = {}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    shard = os.environ.get("KLDIV_TEST_SHARD")
    if shard:
        index, _, count = shard.partition("/")
        mine = _shards([_kernels_of(item) for item in items], int(count))[int(index)]
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i not in mine])
        items[:] = [item for i, item in enumerate(items) if i in mine]
    for item in items:
        parameters = getattr(item, "callspec", None)
        if parameters is not None and "backend" in parameters.params:
            _backends[item.nodeid] = str(parameters.params["backend"])
    _write({"collected": len(items)})


def _kernels_of(item: pytest.Item) -> str:
    parameters = getattr(item, "callspec", None)
    if parameters is None or "name" not in parameters.params:
        return item.nodeid
    return f"{parameters.params['name']} {parameters.params.get('dtype', 'torch.float32')}"


def _shards(groups: list[str], count: int) -> list[set[int]]:
    """Items a shard. The largest group goes to the shard with the least so far: the same answer in every process."""
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    shards: list[set[int]] = [set() for _ in range(count)]
    for group in sorted(members, key=lambda name: (-len(members[name]), name)):
        min(shards, key=len).update(members[group])
    return shards


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # A test that passes reports its call, one that is skipped its setup; a failing setup or teardown counts too.
    if report.when == "call" or report.outcome != "passed":
        line = {
            "test": report.nodeid, "backend": _backends.get(report.nodeid), "outcome": report.outcome,
            "seconds": round(report.duration, 3),
        }  # fmt: skip
        if report.outcome == "failed":
            line["message"] = _last_line(report)
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            line["message"] = str(report.longrepr[2])
        _write(line)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.outcome == "failed":
        _write({"test": report.nodeid, "outcome": "failed", "seconds": 0, "message": str(report.longrepr)[-400:]})
    elif report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        _write({"test": report.nodeid, "outcome": "skipped", "seconds": 0, "message": str(report.longrepr[2])})


def _last_line(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr)[:400]


def _write(line: dict[str, object]) -> None:
    path = os.environ.get("KLDIV_TEST_REPORT")
    if path:
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
