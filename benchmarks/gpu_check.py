#!/usr/bin/env python3
"""Everything that only a GPU can show, in one command of less than nine minutes: `make gpu-check`.

The shared library in this Python, correctness of every backend against float64, batch invariance, 2^31 elements, CUDA
graphs and torch.compile, memory errors, races and barriers (compute-sanitizer), clusters that fit, bytes of main memory
(ncu), speed. A step that fails or runs out of time does not stop the others.

Runs from a source tree with PyTorch, Triton, pytest and NumPy alone, offline. This script imports none of them.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.machinery
import importlib.util
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import gpu_check_report as tables
import gpu_check_tools as tools
from gpu_check_steps import ROOT, Runner, Step

EPILOG = """\
examples:
  python3 benchmarks/gpu_check.py                          all of it, into runs/gpu-check
  OUT=check python3 benchmarks/gpu_check.py                into another folder
  python3 benchmarks/gpu_check.py --steps benchmark        the benchmark alone
  python3 benchmarks/gpu_check.py --steps tune             every plan of the one-read kernel against the others
  python3 benchmarks/gpu_check.py --device cpu --quick     tests the harness itself, in Triton's interpreter

written: gpu-check.json (device, versions, steps, benchmark), gpu-check.png, gpu-check.log (output of all steps)
exit status: 0 every check passed, 1 a check failed, 2 no GPU or a package is missing
"""
NEEDED = ("torch", "triton", "numpy", "pytest")
DEFAULT_STEPS = (
    "build", "library", "statistics", "large", "graphs", *tools.SANITIZERS, "clusters", "dram", "benchmark",
)  # fmt: skip
STEPS = (*DEFAULT_STEPS, "tune")
# Seconds that a step may take at most; the benchmark takes what is left, and keeps so much from the others.
LIMITS = {
    "build": 120, "library": 40, "statistics": 170, "large": 45, "graphs": 60, "memory errors": 60, "races": 50,
    "barriers": 40, "clusters": 40, "dram": 60, "tune": 120,
}  # fmt: skip
FOR_THE_BENCHMARK = 110
# A step that would have less is not begun, which is a failure.
WORTH_BEGINNING = 5
# Compiling kernels takes most of the time of the tests, a core a process; each has a context on the GPU.
MOST_PROCESSES, BYTES_A_PROCESS = 12, 5 << 30


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

    def _variables(self) -> dict[str, str]:
        variables = {"KLDIV_TEST_DEVICE": self.options.device, "TRL_EXPERIMENTAL_SILENCE": "1"}
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
        reserve = FOR_THE_BENCHMARK if "benchmark" in self.options.steps else 5
        return min(LIMITS[step], self.left() - reserve)

    def run(self) -> int:
        if not self.describe():
            return 2
        if "build" in self.options.steps:
            self.add(self.build())
            if self.report["steps"][-1]["seconds"]:  # something was built
                self.describe()
        self.say("backends: " + "; ".join(f"{name}: {state}" for name, state in self.report["backends"].items()))
        for name in self.options.steps:
            if name == "build":
                continue
            if name != "benchmark" and self.limit(name) < WORTH_BEGINNING:
                self.add(Step(name, "fail", 0.0, "no time was left"))
                continue
            self.say(f"{name} ...")
            self.add(self.step(name))
        self.plot()
        return self.finish()

    def step(self, name: str) -> Step:
        if name in tools.SANITIZERS:
            why = self.no_cuda() if tools.SANITIZERS[name] != "memcheck" else None
            device = self.options.device
            return Step(name, "skip", 0.0, why) if why else tools.sanitize(self.runner, name, device, self.limit(name))
        if name in ("library", "clusters", "dram") and self.options.device != "cuda":
            return Step(name, "skip", 0.0, "needs a GPU")
        steps = {
            "library": lambda: tools.library(self.runner, self.limit(name)),
            "statistics": self.statistics,
            "large": lambda: self.tests("large", ["test_gpu_large.py"], 1),
            "graphs": self.graphs,
            "clusters": lambda: tools.clusters(self.runner, self.report["device"]["capability"], self.limit(name)),
            "dram": lambda: tools.dram(self.runner, self.limit(name)),
            "benchmark": self.benchmark,
            "tune": self.tune,
        }
        return steps[name]()

    def no_cuda(self) -> str | None:
        """Why a step that is about the cuda backend on a GPU cannot be made, or None."""
        if self.options.device != "cuda":
            return "needs a GPU"
        state = str(self.report["backends"].get("cuda", "there is none"))
        return None if state == "available" else f"the cuda backend: {state}"

    def add(self, step: Step) -> None:
        self.report["steps"].append(vars(step))
        self.say(f"{step.name}: {step.status}, {step.summary}")
        for failure in step.details.get("failed", [])[:5]:
            self.say(f"  {failure['test']}: {failure.get('message', '').splitlines()[:1]}")
        self.write()

    def write(self) -> None:
        path = self.output / "gpu-check.json"
        partial = path.with_name("gpu-check.json.partial")
        partial.write_text(json.dumps(self.report, indent=1) + "\n")
        os.replace(partial, path)

    def build(self) -> Step:
        library = ROOT / "kldiv_kernels" / "libkldiv_kernels.so"
        modules = [ROOT / "kldiv_kernels" / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
        if library.exists():
            # The library serves every Python; only `kldiv plan` needs the module, which serves one.
            lacking = "" if any(path.exists() for path in modules) else "; _C is not built for this Python"
            return Step("build", "pass", 0.0, f"{library.name} is there{lacking}")
        tools = [name for name in ("setuptools", "pybind11", "ninja") if importlib.util.find_spec(name) is None]
        compiler = os.environ.get("CXX", "g++").split()[-1]
        tools += [] if shutil.which(compiler) else [compiler]
        if tools or self.options.device == "cpu":
            why = f"{', '.join(tools)} missing" if tools else "not for a test of the harness"
            return Step("build", "skip", 0.0, f"{library.name} not built: {why}; its backends are not checked")
        self.say("build ...")
        command = [self.runner.python, "setup.py", "build_ext", "--inplace"]
        # For this GPU alone: all targets take longer than the step has.
        archs = self.report["device"].get("capability", "").replace(".", "")
        wanted = {"KLDIV_CUDA_ARCHS": os.environ.get("KLDIV_CUDA_ARCHS") or archs}
        code, text, seconds = self.runner.run(command, self.limit("build"), **wanted)
        if code == 0 and library.exists():
            return Step("build", "pass", seconds, f"{library.name} built")
        return Step("build", "fail", seconds, f"{tools.ending(code, text)}; its backends are not checked")

    def describe(self) -> bool:
        command = [self.runner.python, "-m", "kldiv_kernels.benchmarking.gpu_device", self.options.device]
        code, text, _ = self.runner.run(command, 60)
        lines = text.strip().splitlines() or ["no output"]
        if code != 0:
            print(f"gpu-check: {lines[-1]}", file=sys.stderr)
            self.report["error"] = lines[-1]
            self.write()
            return False
        self.report.update(json.loads(lines[-1]))
        device, versions = self.report["device"], self.report["versions"]
        if not self.report["steps"]:
            self.say(f"{device['name']}, PyTorch {versions['torch']}, Triton {versions['triton']}")
        return True

    def processes(self, most: int) -> int:
        cores = self.report["host"]["cores"]
        by_memory = self.report["device"].get("free_bytes", BYTES_A_PROCESS * cores) // BYTES_A_PROCESS
        return int(max(1, min(most, cores - 1 if cores > 2 else cores, by_memory)))

    def statistics(self) -> Step:
        files = [
            f"test_gpu_{name}.py"
            for name in ("statistics", "labels", "topk", "one_read", "policy", "contract", "determinism")
        ]
        return self.tests("statistics", files, self.processes(MOST_PROCESSES))

    def graphs(self) -> Step:
        return self.tests("graphs", ["test_gpu_graphs.py"], self.processes(6))

    def tests(self, name: str, files: list[str], shards: int) -> Step:
        return self.runner.tests(name, files, shards, self.limit(name), self.kernels())

    def kernels(self) -> list[str]:
        """Backends with kernels that the library calls available on this GPU; "triton" where it has none, so that a
        check without kernels fails. None on a CPU."""
        if self.options.device != "cuda":
            return []
        states = self.report["backends"].items()
        return [x for x, state in states if state == "available" and x not in ("cpu", "reference")] or ["triton"]

    def tune(self) -> Step:
        why = self.no_cuda()
        if why:
            return Step("tune", "skip", 0.0, why)
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

    def benchmark(self) -> Step:
        path = self.output / "benchmark.json"
        path.unlink(missing_ok=True)
        # Ten seconds for the start of the process, and for the plot after it.
        seconds = max(5.0, self.left() - 20)
        command = [self.runner.python, "-m", "kldiv_kernels.benchmarking.gpu", "--output", str(path)]
        command += ["--seconds", f"{seconds:.0f}", "--device", self.options.device]
        code, text, took = self.runner.run([*command, *(["--quick"] if self.options.quick else [])], seconds + 10)
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
        failed = broken or wrong or not timed or code not in (0, None)
        return Step("benchmark", "fail" if failed else "pass", took, summary)

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
    parser.add_argument("--minutes", type=float, default=8.6, help="time for everything (default: 8.6)")
    names = f"{', '.join(DEFAULT_STEPS)} (these by default), tune"
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=DEFAULT_STEPS, metavar="STEP", help=names)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tests the harness, with --quick")
    parser.add_argument("--quick", action="store_true", help="few statistics and small sizes")
    options = parser.parse_args()
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu needs --quick: the interpreter takes hours for all of it")
    options.output = options.output.resolve()
    options.steps = [step for step in STEPS if step in options.steps]
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        print(f"gpu-check: {sys.executable} lacks {names}; run: pip install {names}", file=sys.stderr)
        return 2
    return Check(options).run()


if __name__ == "__main__":
    sys.exit(main())
