"""How `gpu_check.py` runs a step: a process, or several that share the tests, within a time limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
Status = Literal["pass", "fail", "skip"]
_MOST_LOG = 1 << 20
_MOST_FAILURES = 12
# A test of kernels that are compiled already and runs so long at its step's time limit hangs.
HUNG = 30
# The tests need none of the plugins that happen to be installed.
_PYTEST = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


@dataclass
class Step:
    """One line of the report. `details` goes into the JSON."""

    name: str
    status: Status
    seconds: float
    summary: str
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Runner:
    """Starts processes in the source tree; their output goes to `log`."""

    log: Path
    variables: Mapping[str, str]
    say: Callable[[str], None]
    python: str = sys.executable
    root: Path = ROOT

    def environment(self) -> dict[str, str]:
        path = os.pathsep.join(x for x in (str(self.root), os.environ.get("PYTHONPATH", "")) if x)
        return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **_PYTEST, **self.variables}

    def start(self, command: list[str], output: Path, **variables: str) -> subprocess.Popen[bytes]:
        # A session of its own, so that a time limit ends its children too.
        with output.open("wb") as file:
            return subprocess.Popen(
                command, cwd=self.root, env={**self.environment(), **variables}, stdout=file, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def run(self, command: list[str], limit: float, **variables: str) -> tuple[int | None, str, float]:
        """Exit status (None: stopped at the limit), output, seconds."""
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "output"
            begin = time.monotonic()
            process = self.start(command, output, **variables)
            wait([process], begin + limit)
            text = output.read_text(errors="replace")
            self.keep(" ".join(command), text)
            code = None if process.returncode == -signal.SIGKILL else process.returncode
            return code, text, time.monotonic() - begin

    def keep(self, title: str, text: str) -> None:
        with self.log.open("a") as file:
            file.write(f"==== {title}\n{text[-_MOST_LOG:]}\n")

    def tests(
        self, name: str, files: list[str], processes: int, limit: float, backends: Sequence[str] = (), **variables: str
    ) -> Step:
        """pytest on these files of tests/gpu, in so many processes. A step without a passed test of each of `backends`
        fails; where none is named, as on a CPU, one that only skipped is skipped."""
        begin = time.monotonic()
        if backends:
            variables["KLDIV_GPU_BACKENDS"] = ",".join(backends)
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as share:
            reports = [Path(folder) / f"report{i}" for i in range(processes)]
            outputs = [Path(folder) / f"output{i}" for i in range(processes)]
            command = [
                self.python, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore", "--tb=short",
                f"--maxfail={_MOST_FAILURES}", *(f"tests/gpu/{file}" for file in files),
            ]  # fmt: skip
            started = [
                self.start(command, output, KLDIV_TEST_SHARE=share, KLDIV_TEST_REPORT=str(report), **variables)
                for report, output in zip(reports, outputs, strict=True)
            ]
            killed = wait(started, begin + limit, lambda: self.say(f"{name}: {Results.read(reports).brief()}"))
            results = Results.read(reports)
            for output in outputs:
                self.keep(f"{name}: {output.name}", output.read_text(errors="replace"))
            # 5: no test was collected.
            codes = {process.returncode for process in started} - {0, 5}
            return results.step(name, time.monotonic() - begin, codes, killed, backends)


def wait(processes: list[subprocess.Popen[bytes]], deadline: float, tick: Callable[[], None] = lambda: None) -> bool:
    """Until all have ended or the deadline is there; what still runs is killed, and whether something did is returned.
    `tick` is called now and then."""
    told = time.monotonic()
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.1)
        if time.monotonic() - told > 15:
            told = time.monotonic()
            tick()
    killed = False
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed = True
        process.wait()
    return killed


@dataclass
class Results:
    """What the lines that tests/gpu/conftest.py writes add up to."""

    collected: int = 0
    ended: set[str] = field(default_factory=set)
    begun: dict[str, dict[str, Any]] = field(default_factory=dict)
    passed: Counter[str | None] = field(default_factory=Counter)  # by backend; None: of no one backend
    skipped: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, dict[str, Any]] = field(default_factory=dict)
    slowest: list[tuple[float, str]] = field(default_factory=list)

    @staticmethod
    def read(paths: list[Path]) -> Results:
        results = Results()
        for path in paths:
            lines = path.read_text().splitlines() if path.exists() else []
            for line in lines:
                try:
                    results._add(json.loads(line))
                except json.JSONDecodeError:  # half a line: its process was killed
                    continue
        results.slowest = sorted(results.slowest, reverse=True)[:5]
        return results

    def _add(self, line: dict[str, Any]) -> None:
        if "collected" in line:  # each process collects all of them
            self.collected = max(self.collected, line["collected"])
            return
        if "begun" in line:
            self.begun[line["begun"]] = line
            return
        # A file that is skipped, or does not import, is no test that was collected; each process says so.
        if line["test"] in self.begun:
            self.ended.add(line["test"])
        self.slowest.append((line["seconds"], line["test"]))
        if line["outcome"] == "passed":
            self.passed[line["backend"]] += 1
        else:
            (self.failed if line["outcome"] == "failed" else self.skipped)[line["test"]] = line

    def brief(self) -> str:
        done = len(self.ended)
        left = "" if done >= self.collected else f" of {self.collected}"
        text = f"{done}{left} tests, {self.passed.total()} passed, {len(self.failed)} failed"
        text += f", {len(self.skipped)} skipped"
        return text if self.collected else f"{text} (nothing collected yet)"

    def _broken(self, codes: set[int | None], killed: bool) -> dict[str, str]:
        """Backend → what it did, where a test of it took its process along, or never ended."""
        broken = {
            line["backend"]: f"crashed in {test}: {line['message'].splitlines()[0][:120]}"
            for test, line in self.failed.items()
            if line.get("lost") and line["backend"]
        }
        crashed = any(code is not None and code < 0 and code != -signal.SIGKILL for code in codes)
        for test, line in self.begun.items():
            if test in self.ended or line["backend"] is None:
                continue
            if killed and time.time() - line["at"] > HUNG:
                broken.setdefault(line["backend"], f"hung in {test}")
            elif crashed:
                broken.setdefault(line["backend"], f"crashed in {test}")
        return broken

    def step(
        self, name: str, seconds: float, bad_codes: set[int | None], killed: bool, backends: Sequence[str]
    ) -> Step:
        done = len(self.ended)
        why = sorted({str(line.get("message", "")) for line in self.skipped.values()})
        unfinished = [test for test in self.begun if test not in self.ended]
        details = {
            "passed": self.passed.total(), "failed": list(self.failed.values())[:50], "skipped": len(self.skipped),
            "slowest": self.slowest, "collected": self.collected, "why_skipped": why, "unfinished": unfinished,
            "passed_by_backend": {backend: count for backend, count in self.passed.items() if backend is not None},
            "broken": self._broken(bad_codes, killed),
        }  # fmt: skip
        if self.failed or bad_codes or done < self.collected:
            stopped = ""
            if done < self.collected and not self.failed:
                stopped = f"; {'stopped at the time limit' if killed else 'its process died'}"
                stopped += f" in {', '.join(unfinished[:3])}" if unfinished else ""
            return Step(name, "fail", seconds, self.brief() + stopped, details)
        untested = [backend for backend in backends if not self.passed[backend]]
        if untested:
            none = f"no test of {', '.join(untested)} passed: {'; '.join(why) or 'there is none'}"
            return Step(name, "fail", seconds, f"{self.brief()}; {none}", details)
        if not self.passed.total():
            return Step(name, "skip", seconds, f"nothing ran: {'; '.join(why) or 'no tests'}", details)
        return Step(name, "pass", seconds, self.brief(), details)
