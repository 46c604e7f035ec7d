"""KLDIV_COMPLETE=1, as CI sets it: a run from which something was left out unseen fails.

A test that skips because a package does not import or a part was not built passes for ever. Where everything is
installed, only these may skip: what needs a GPU, what is slow, and what another run of `make test` has.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

_MAY_SKIP = re.compile(
    # A GPU.
    r"needs a GPU|CUDA graphs need a GPU|streams need a GPU|there is no device to wait for"
    # Time.
    r"|slow: run with -m slow"
    # In another run of CI, or in this one under another name.
    r"|runs under KLDIV_CUDA_HOST=1|no backend here has the one-read form|only the sanitized run says .*"
    r"|needs TRITON_INTERPRET=1|.* under TRITON_INTERPRET=1 only|under TRITON_INTERPRET=1 .*"
    r"|about processes without TRITON_INTERPRET=1|the operators are the same|what is traced is the same"
    # OpenRLHF has wheels for x86-64 and Python up to 3.12 only.
    r"|OpenRLHF has no wheel for this machine"
    # Compilers and emulators of other processors, which no package index has in a reasonable size.
    r"|needs a C\+\+ compiler for 64-bit ARM|compiled; needs an emulator of 64-bit ARM to run"
    # There is nothing to test.
    r"|no raw sum|a raw sum has none"
)


class Complete:
    def __init__(self) -> None:
        self.skipped: dict[str, str] = {}
        self.passed: set[str] = set()
        self.wrong: list[str] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._take(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._take(report)
        if report.when == "call" and report.passed:
            self.passed.add(report.nodeid.split("::")[0])

    def _take(self, report: pytest.CollectReport | pytest.TestReport) -> None:
        if report.skipped and isinstance(report.longrepr, tuple):
            self.skipped[report.nodeid] = report.longrepr[2].removeprefix("Skipped: ")

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.wrong = [f"{test}: {why}" for test, why in self.skipped.items() if not _MAY_SKIP.fullmatch(why)]
        # The files that are named, not the folders: of each, something has to run.
        named = [argument for argument in session.config.args if argument.endswith(".py")]
        self.wrong += [f"{file}: nothing of it ran" for file in named if Path(file).as_posix() not in self.passed]
        if self.wrong and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for line in self.wrong:
            terminalreporter.line(f"LEFT OUT {line}", red=True)


def watch(config: pytest.Config) -> None:
    """Once, in the process that hears of all tests: not in the workers, nor in what the tests start."""
    if os.environ.pop("KLDIV_COMPLETE", "") == "1":
        config.pluginmanager.register(Complete())
