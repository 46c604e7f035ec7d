#!/usr/bin/env python3
"""Everything that only a GPU can show, in one command of seven minutes: `make gpu-check`.

The most informative first: the shared library in this Python with real clusters, correctness of the `cuda` backend
against float64 and the same bits in any batch, clusters that fit, speed, bytes of main memory (ncu), CUDA graphs and
torch.compile, 2^31 elements, the Triton backend, barriers and memory errors (compute-sanitizer). A step that fails or
runs out of time does not stop the others; after one in which the `cuda` backend hung or crashed, that backend is left
out of the others, which say so. On a GPU a step of tests without a passed test fails, and so does a check that left
out a backend that is available.

Runs from a source tree with PyTorch, Triton, pytest and NumPy alone, offline. This script imports none of them.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.machinery
import importlib.util
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import gpu_check_report as tables
import gpu_check_tools as tools
from gpu_check_choice import DEFAULT_STEPS, DESCRIPTION, LIMITS, MINUTES, ON_REQUEST, WORTH_BEGINNING, Choice
from gpu_check_steps import ROOT, Runner, Step

EPILOG = """\
examples:
  python3 benchmarks/gpu_check.py                          all of it, into runs/gpu-check
  OUT=check python3 benchmarks/gpu_check.py                into another folder
  python3 benchmarks/gpu_check.py --steps library cuda     these two alone
  python3 benchmarks/gpu_check.py --backends triton        without the cuda backend
  python3 benchmarks/gpu_check.py --steps "full benchmark" every case, with every peer that is installed
  python3 benchmarks/gpu_check.py --steps tune             every plan of the one-read kernel against the others
  python3 benchmarks/gpu_check.py --steps races            compute-sanitizer's race detection, for information
  python3 benchmarks/gpu_check.py --device cpu --quick     tests the harness itself, in Triton's interpreter

written: gpu-check.json (device, versions, steps, benchmark), gpu-check.png, gpu-check.log (output of all steps)
exit status: 0 every check passed, 1 a check failed, 2 no GPU or a package is missing
"""
NEEDED = ("torch", "triton", "numpy", "pytest")
# Compiling kernels takes most of the time of the tests, a core a process; each has a context on the GPU.
MOST_PROCESSES, BYTES_A_PROCESS = 12, 5 << 30
FILES = {
    "cuda": ("statistics", "one_read", "topk", "policy", "labels", "contract", "determinism"),
    "triton": ("statistics", "one_read", "policy", "labels", "contract", "determinism"),
    "graphs": ("graphs",),
    "large": ("large",),
}
# 25 GiB a test: one at a time. torch.compile needs memory and seconds of its own.
PROCESSES = {"large": 1, "graphs": 6}


class Check:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.begin = time.monotonic()
        self.output: Path = options.output
        self.output.mkdir(parents=True, exist_ok=True)
        log = self.output / "gpu-check.log"
        log.write_text("")
        self.runner = Runner(log, self._variables(), self.say)
        self.report: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": ["gpu_check.py", *sys.argv[1:]], "quick": options.quick,
            "steps": [], "benchmark": None, "tune": None,
        }  # fmt: skip
        self.choice = Choice(options.steps, options.backends, options.device)

    def _variables(self) -> dict[str, str]:
        variables = {
            "KLDIV_TEST_DEVICE": self.options.device, "TRL_EXPERIMENTAL_SILENCE": "1",
            # The pool of processes that Inductor starts by itself takes longer than what it compiles here.
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }  # fmt: skip
        if self.options.quick:
            variables["KLDIV_TEST_QUICK"] = "1"
        if self.options.device == "cpu":
            variables["TRITON_INTERPRET"] = "1"
        return variables

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.begin:4.0f} s] {text}", flush=True)

    def left(self) -> float:
        return float(self.options.minutes * 60 - (time.monotonic() - self.begin))

    def limit(self, step: str) -> float:
        return self.choice.limit(step, self.left())

    def run(self) -> int:
        if not self.describe():
            return 2
        if "build" in self.options.steps:
            self.say("build ...")
            capability = self.report["device"].get("capability", "")
            self.add(tools.build(self.runner, self.options.device, capability, self.limit("build")))
            if self.report["steps"][-1]["seconds"]:  # something was built
                self.describe()
        self.say("backends: " + "; ".join(f"{name}: {state}" for name, state in self.report["backends"].items()))
        for name in self.options.steps:
            if name == "build":
                continue
            instead = self.choice.instead(name)
            if instead is None and self.limit(name) < WORTH_BEGINNING:
                instead = Step(name, "fail", 0.0, "no time was left")
            if instead is None:
                self.say(f"{name} ...")
                instead = self.step(name)
            self.add(instead)
        self.plot()
        return self.finish()

    def step(self, name: str) -> Step:
        # What the scripts of the step are about; on a CPU what there is.
        about = {"KLDIV_GPU_BACKENDS": ",".join(self.choice.of(name))} if self.options.device == "cuda" else {}
        if name in FILES:
            return self.tests(name)
        if name in tools.SANITIZERS:
            return tools.sanitize(self.runner, name, self.options.device, self.limit(name), about)
        steps = {
            "library": lambda: tools.library(self.runner, self.limit(name)),
            "clusters": lambda: tools.clusters(self.runner, self.report["device"]["capability"], self.limit(name)),
            "dram": lambda: tools.dram(self.runner, self.limit(name), about),
            "benchmark": lambda: self.benchmark(name, "--quick" if self.options.quick else "--first", about),
            "full benchmark": lambda: self.benchmark(name, "", about),
            "tune": self.tune,
        }
        return steps[name]()

    def add(self, step: Step) -> None:
        self.report["steps"].append(vars(step))
        self.say(f"{step.name}: {step.status}, {step.summary}")
        for failure in step.details.get("failed", [])[:5]:
            self.say(f"  {failure['test']}: {failure.get('message', '').splitlines()[:1]}")
        what = step.details.get("broken", {}).get("cuda")
        if what and self.choice.broken is None:
            self.choice.broken = f"{what} (step {step.name})"
            self.say(f"  the cuda backend {self.choice.broken}: the steps that follow leave it out")
        self.write()

    def write(self) -> None:
        path = self.output / "gpu-check.json"
        partial = path.with_name("gpu-check.json.partial")
        partial.write_text(json.dumps(self.report, indent=1) + "\n")
        os.replace(partial, path)

    def describe(self) -> bool:
        command = [self.runner.python, "-m", "kldiv_kernels.benchmarking.gpu_device", self.options.device]
        code, text, _ = self.runner.run(command, DESCRIPTION)
        lines = text.strip().splitlines() or ["no output"]
        if code != 0:
            print(f"gpu-check: {lines[-1]}", file=sys.stderr)
            self.report["error"] = lines[-1]
            self.write()
            return False
        self.report.update(json.loads(lines[-1]))
        device, versions = self.report["device"], self.report["versions"]
        self.choice.states, self.choice.nvidia = self.report["backends"], versions["hip"] is None
        if not self.report["steps"]:
            self.say(f"{device['name']}, PyTorch {versions['torch']}, Triton {versions['triton']}")
        return True

    def processes(self, most: int) -> int:
        cores = self.report["host"]["cores"]
        by_memory = self.report["device"].get("free_bytes", BYTES_A_PROCESS * cores) // BYTES_A_PROCESS
        return int(max(1, min(most, cores - 1 if cores > 2 else cores, by_memory)))

    def tests(self, name: str) -> Step:
        files = [f"test_gpu_{file}.py" for file in FILES[name]]
        backends = self.choice.of(name) if self.options.device == "cuda" else []
        # Triton compiles a kernel for each statistic and dtype: some of them in the time that there is.
        few = {"KLDIV_TEST_FEW": "1"} if name == "triton" else {}
        processes = self.processes(PROCESSES.get(name, MOST_PROCESSES))
        return self.runner.tests(name, files, processes, self.limit(name), backends, **few)

    def tune(self) -> Step:
        path = self.output / "tune.json"
        path.unlink(missing_ok=True)
        limit = self.limit("tune")
        command = [self.runner.python, "-m", "kldiv_kernels.benchmarking.gpu_tune", "--output", str(path)]
        code, text, seconds = self.runner.run([*command, "--seconds", f"{limit - 10:.0f}"], limit)
        self.report["tune"] = json.loads(path.read_text()) if path.exists() else None
        path.unlink(missing_ok=True)
        rows = self.report["tune"]["rows"] if self.report["tune"] else []
        wrong = [f"{row['case']} {row['implementation']}" for row in rows if row["agrees"] is False]
        summary = f"{sum(row['milliseconds'] is not None for row in rows)} times"
        summary += f"; another loss than the plan chosen: {', '.join(wrong)}" if wrong else ""
        summary += f"; {tools.ending(code, text)}" if code != 0 else ""
        return Step("tune", "fail" if wrong or code != 0 or not rows else "pass", seconds, summary)

    def benchmark(self, name: str, which: str, about: dict[str, str]) -> Step:
        path = self.output / "benchmark.json"
        path.unlink(missing_ok=True)
        limit = self.limit(name)
        command = [self.runner.python, "-m", "kldiv_kernels.benchmarking.gpu", "--output", str(path)]
        # Ten seconds for the start of the process.
        command += ["--seconds", f"{max(5.0, limit - 10):.0f}", "--device", self.options.device]
        code, text, took = self.runner.run([*command, *([which] if which else [])], limit, **about)
        content = json.loads(path.read_text()) if path.exists() else {"rows": [], "targets": [], "left_out": []}
        path.unlink(missing_ok=True)
        self.report["benchmark"] = content
        rows = content["rows"]
        wrong = [f"{r['case']} {r['rows']}×{r['vocab']} {r['implementation']}" for r in rows if r["agrees"] is False]
        broken = [r for r in rows if r["error"] and r["implementation"] in content["ours"]]
        timed = sum(row["milliseconds"] is not None for row in rows)
        summary = f"{timed} times, {len(content['left_out'])} cases left out"
        if wrong:
            summary += f"; another loss than ours: {', '.join(wrong)}"
        if broken:
            summary += f"; ours failed: {broken[0]['case']}: {broken[0]['error']}"
        if code != 0:
            summary += f"; {tools.ending(code, text)}"
        lost = [r["error"] for r in broken if r["implementation"].partition(" ")[0] == "cuda"]
        failed = broken or wrong or not timed or code != 0
        details = {"broken": tools.broken(code, text, *lost)}
        return Step(name, "fail" if failed else "pass", took, summary, details)

    def plot(self) -> None:
        path = self.output / "gpu-check.png"
        if not self.report["benchmark"] or not self.report["benchmark"]["rows"]:
            self.report["plot"] = "nothing to plot"
        elif importlib.util.find_spec("matplotlib") is None:
            self.report["plot"] = "matplotlib is not installed"
        else:
            self.write()
            command = [self.runner.python, "-m", "kldiv_kernels.benchmarking.gpu_plot"]
            code, text, _ = self.runner.run([*command, str(self.output / "gpu-check.json"), str(path)], 30)
            self.report["plot"] = path.name if code == 0 else tools.ending(code, text)
        self.say(f"plot: {self.report['plot']}")

    def finish(self) -> int:
        steps = self.report["steps"]
        passed: Counter[str] = Counter()
        for step in steps:
            passed.update(step["details"].get("passed_by_backend", {}))
        untested = self.choice.untested(passed)
        if untested:
            self.add(Step("backends", "fail", 0.0, f"of these no test passed: {', '.join(untested)}"))
        self.report["ok"] = all(step["status"] != "fail" for step in steps)
        self.report["seconds"] = time.monotonic() - self.begin
        self.write()
        details = {step["name"]: step["details"] for step in steps}
        lines = [
            *tables.cluster_lines(details.get("clusters", {})),
            *tables.dram_lines(details.get("dram", {}).get("calls", []), tools.REACH),
            *tables.tune_lines(self.report["tune"]),
            *tables.benchmark_lines(self.report["benchmark"]),
        ]
        print("", *lines, sep="\n")
        for step in steps:
            print(f"{step['status']:4}  {step['name']:14} {step['seconds']:4.0f} s  {step['summary']}")
        print(f"\n{'passed' if self.report['ok'] else 'FAILED'}: {self.output / 'gpu-check.json'}")
        return 0 if self.report["ok"] else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    output = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu-check")
    parser.add_argument("--output", type=Path, default=output, help="folder (default: $OUT or runs/gpu-check)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"time for everything (default: {MINUTES:g})")
    names = f"{', '.join(DEFAULT_STEPS)} (these by default, in this order), {', '.join(ON_REQUEST)}"
    parser.add_argument("--steps", nargs="+", choices=LIMITS, default=DEFAULT_STEPS, metavar="STEP", help=names)
    which = "cuda, triton (default: those that this device should have, and any other that is available)"
    parser.add_argument("--backends", nargs="+", metavar="BACKEND", help=which)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tests the harness, with --quick")
    parser.add_argument("--quick", action="store_true", help="few statistics and small sizes")
    options = parser.parse_args()
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu needs --quick: the interpreter takes hours for all of it")
    options.output = options.output.resolve()
    options.steps = [step for step in LIMITS if step in options.steps]
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        print(f"gpu-check: {sys.executable} lacks {names}; run: pip install {names}", file=sys.stderr)
        return 2
    return Check(options).run()


if __name__ == "__main__":
    sys.exit(main())
