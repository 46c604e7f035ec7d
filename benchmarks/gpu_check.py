#!/usr/bin/env python3
"""Everything that only a GPU can show, in one command of less than eight minutes: `make gpu-check`.

Correctness of every backend against float64, batch invariance, 2^31 elements, CUDA graphs and torch.compile, memory
errors (compute-sanitizer), speed. A step that fails or runs out of time does not stop the others.

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

from gpu_check_steps import ROOT, Runner, Step

EPILOG = """\
examples:
  python3 benchmarks/gpu_check.py                          all of it, into runs/gpu-check
  OUT=check python3 benchmarks/gpu_check.py                into another folder
  python3 benchmarks/gpu_check.py --steps benchmark        the benchmark alone
  python3 benchmarks/gpu_check.py --device cpu --quick     tests the harness itself, in Triton's interpreter

written: gpu-check.json (device, versions, steps, benchmark), gpu-check.png, gpu-check.log (output of all steps)
exit status: 0 every check passed, 1 a check failed, 2 no GPU or a package is missing
"""
NEEDED = ("torch", "triton", "numpy", "pytest")
STEPS = ("build", "statistics", "large", "graphs", "memory errors", "benchmark")
# Seconds that a step may take at most; the benchmark takes what is left, and keeps so much from the others.
LIMITS = {"build": 90, "statistics": 160, "large": 45, "graphs": 60, "memory errors": 50}
FOR_THE_BENCHMARK = 120
# Compiling kernels takes most of the time of the tests, a core a process; each has a context on the GPU.
MOST_PROCESSES, BYTES_A_PROCESS = 12, 5 << 30
SANITIZER_FOUND = 86


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
            "command": ["gpu_check.py", *sys.argv[1:]], "quick": options.quick, "steps": [], "benchmark": None,
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
        return max(1.0, min(LIMITS[step], self.left() - reserve))

    def run(self) -> int:
        if not self.describe():
            return 2
        if "build" in self.options.steps:
            self.add(self.build())
            if self.report["steps"][-1]["seconds"]:  # something was built
                self.describe()
        self.say("backends: " + "; ".join(f"{name}: {state}" for name, state in self.report["backends"].items()))
        for name, step in (
            ("statistics", self.statistics),
            ("large", lambda: self.runner.tests("large", ["test_gpu_large.py"], 1, self.limit("large"))),
            ("graphs", self.graphs),
            ("memory errors", self.memory_errors),
            ("benchmark", self.benchmark),
        ):
            if name in self.options.steps:
                self.say(f"{name} ...")
                self.add(step())
        self.plot()
        return self.finish()

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
        code, text, seconds = self.runner.run(command, self.limit("build"))
        if code == 0 and library.exists():
            return Step("build", "pass", seconds, f"{library.name} built")
        return Step("build", "fail", seconds, f"{_ending(code, text)}; its backends are not checked")

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
        files = [f"test_gpu_{name}.py" for name in ("statistics", "contract", "determinism")]
        return self.runner.tests("statistics", files, self.processes(MOST_PROCESSES), self.limit("statistics"))

    def graphs(self) -> Step:
        return self.runner.tests("graphs", ["test_gpu_graphs.py"], self.processes(4), self.limit("graphs"))

    def memory_errors(self) -> Step:
        name, script = "memory errors", str(ROOT / "benchmarks" / "gpu_memcheck.py")
        command = [self.runner.python, script, self.options.device]
        sanitizer = _sanitizer()
        if self.options.device == "cuda":
            if sanitizer is None:
                return Step(name, "skip", 0.0, "compute-sanitizer is not installed")
            # API errors are PyTorch's probes; what is looked for are accesses of kernels.
            flags = ["--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", str(SANITIZER_FOUND)]
            command = [sanitizer, *flags, *command]
        code, text, seconds = self.runner.run(command, self.limit(name))
        if code == 0:
            return Step(name, "pass", seconds, _last(text, "calls"))
        if code != SANITIZER_FOUND and "not supported" in text.lower():
            return Step(name, "skip", seconds, "compute-sanitizer does not support this device")
        return Step(name, "fail", seconds, _ending(code, text), {"output": text[-4000:]})

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
            summary += f"; {_ending(code, text)}"
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
            self.report["plot"] = path.name if code == 0 else _ending(code, text)
        self.say(f"plot: {self.report['plot']}")

    def finish(self) -> int:
        steps = self.report["steps"]
        self.report["ok"] = all(step["status"] != "fail" for step in steps)
        self.report["seconds"] = time.monotonic() - self.begin
        self.write()
        print()
        for line in _benchmark_lines(self.report["benchmark"]):
            print(line)
        for step in steps:
            print(f"{step['status']:4}  {step['name']:14} {step['seconds']:4.0f} s  {step['summary']}")
        print(f"\n{'passed' if self.report['ok'] else 'FAILED'}: {self.output / 'gpu-check.json'}")
        return 0 if self.report["ok"] else 1


def _benchmark_lines(content: dict[str, Any] | None) -> list[str]:
    """A line a case: milliseconds, useful GB/s, its share of the copy bandwidth and extra memory for ours; for a peer
    milliseconds and how many times longer than the best of ours that is."""
    if not content or not content["rows"]:
        return []
    cases: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in content["rows"]:
        cases.setdefault((row["case"], row["rows"], row["vocab"]), []).append(row)
    lines = []
    for (case, rows, vocab), found in cases.items():
        ours = [r["milliseconds"] for r in found if r["implementation"] in content["ours"] and r["milliseconds"]]
        parts = [_part(row, row["implementation"] in content["ours"], min(ours, default=None)) for row in found]
        lines.append(f"{case} {rows}×{vocab}: " + " | ".join(parts))
    for target in content["targets"]:
        measured = "not measured" if target["measured"] is None else f"{target['measured']:.3g}"
        kept = {True: "met", False: "NOT MET", None: "no verdict"}[target["met"]]
        lines.append(f"target {target['target']}: {measured}, {kept}")
    return [*lines, *(f"left out: {case}" for case in content["left_out"]), ""]


def _part(row: dict[str, Any], is_ours: bool, best: float | None) -> str:
    if row["milliseconds"] is None:
        return f"{row['implementation']} {row['error']}"
    text = f"{row['implementation']} {row['milliseconds']:.3g} ms"
    if is_ours:
        text += f" {row['useful_gb_per_second']:.0f} GB/s"
        text += f" {row['share_of_copy']:.0%} of copy" if row["share_of_copy"] else ""
    elif best:
        text += f" {row['milliseconds'] / best:.1f}×"
    text += f" {row['extra_units']:.1f}u" if row["extra_units"] is not None else ""
    return text + (f" (call {row['call_milliseconds']:.3g} ms)" if row["call_milliseconds"] else "")


def _sanitizer() -> str | None:
    roots = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    compiler = shutil.which("nvcc")
    folders = [str(Path(root) / "bin") for root in roots] + ([str(Path(compiler).parent)] if compiler else [])
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def _last(text: str, word: str) -> str:
    return next((line for line in reversed(text.splitlines()) if word in line), "")


def _ending(code: int | None, text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()] or ["no output"]
    return f"{'stopped at the time limit, or killed' if code is None else f'exit status {code}'}: {lines[-1][:300]}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    output = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu-check")
    parser.add_argument("--output", type=Path, default=output, help="folder (default: $OUT or runs/gpu-check)")
    parser.add_argument("--minutes", type=float, default=7.7, help="time for everything (default: 7.7)")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tests the harness, with --quick")
    parser.add_argument("--quick", action="store_true", help="few statistics and small sizes")
    options = parser.parse_args()
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu needs --quick: the interpreter takes hours for all of it")
    options.output = options.output.resolve()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        print(f"gpu-check: {sys.executable} lacks {names}; run: pip install {names}", file=sys.stderr)
        return 2
    return Check(options).run()


if __name__ == "__main__":
    sys.exit(main())
