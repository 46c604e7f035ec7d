"""Sharing the tests among processes, and a line of JSON for each result, for `benchmarks/gpu_check.py`.

Most of the time of Triton's tests goes into compiling kernels, on the CPU. KLDIV_TEST_SHARE names a folder that
several processes share: each takes the next group of tests that nobody has taken, so that they are shared out by the
seconds that they take, measured as they run. Tests of one statistic and dtype share kernels and stay together.
KLDIV_TEST_REPORT names the file of results, which is there also when the process is killed at its time limit: a test
that hung has begun in it and not ended.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest

# After one of these a process can launch no kernel any more: its other tests would all fail.
_LOST = re.compile(r"CUDA error(?!: out of memory)|CUDA_ERROR|illegal memory access|unspecified launch failure")
_lost = False
# Test → the backend that it is about.
_backends: dict[str, str] = {}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = getattr(item, "callspec", None)
        if parameters is not None and "backend" in parameters.params:
            _backends[item.nodeid] = str(parameters.params["backend"])
    _write({"collected": len(items)})


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """pytest's own loop over the groups that this process takes."""
    folder = os.environ.get("KLDIV_TEST_SHARE")
    if folder is None or session.testsfailed or session.config.option.collectonly:
        return None
    for number, group in enumerate(_groups(session.items)):
        if not _taken(Path(folder) / str(number)):
            continue
        for item, following in zip(group, [*group[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop or _lost:
                raise session.Interrupted(session.shouldstop or "no kernel can be launched in this process any more")
    return True


def _groups(items: list[pytest.Item]) -> list[list[pytest.Item]]:
    """In the same order in every process, the largest first: it would be the last to end."""
    found: dict[str, list[pytest.Item]] = {}
    for item in items:
        parameters = getattr(item, "callspec", None)
        name = item.nodeid
        if parameters is not None and "name" in parameters.params:
            name = f"{parameters.params['name']} {parameters.params.get('dtype', 'torch.float32')}"
        found.setdefault(name, []).append(item)
    return sorted(found.values(), key=lambda group: (-len(group), group[0].nodeid))


def _taken(claim: Path) -> bool:
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def pytest_runtest_logstart(nodeid: str) -> None:
    _write({"begun": nodeid, "backend": _backends.get(nodeid), "at": time.time()})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    global _lost
    # A test that passes reports its call, one that is skipped its setup; a failing setup or teardown counts too.
    if report.when == "call" or report.outcome != "passed":
        line = {
            "test": report.nodeid, "backend": _backends.get(report.nodeid), "outcome": report.outcome,
            "seconds": round(report.duration, 3),
        }  # fmt: skip
        if report.outcome == "failed":
            line["message"] = _last_line(report)
            line["lost"] = _LOST.search(str(report.longrepr)) is not None
            _lost = _lost or bool(line["lost"])
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
