"""The steps of `gpu_check.py` that are neither tests nor the benchmark: programs of NVIDIA's around small scripts.

The shared library in this Python, compute-sanitizer's three tools, how many clusters fit, bytes of main memory by ncu.
None of them has met a GPU yet.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from gpu_check_steps import ROOT, Runner, Step

FOLDER = ROOT / "benchmarks"
FOUND = 86  # exit status of compute-sanitizer where it found something
# Step → tool. Races and barriers are looked for in the cuda backend, whose kernels have barriers of their own.
# racecheck does not know that an mbarrier orders a bulk copy before what reads it, and reports such pairs: what it
# finds is for information.
SANITIZERS = {"memory errors": "memcheck", "races": "racecheck", "barriers": "synccheck"}
METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum")
# Parts of the names of this package's kernels: the namespace of the cuda backend's, and Triton's one by one. All
# others, PyTorch's, run as they are: instrumenting them takes most of the time.
KERNELS = (
    "kldiv", "sweep_kernel", "sums_kernel", "finish_kernel", "gradient_kernel", "loss_kernel", "scale_kernel",
    "mark_kernel", "label_gradient_kernel", "merge_states_kernel", "merge_sums_kernel",
)  # fmt: skip
# Signs that a kernel took its process along, as in tests/gpu/conftest.py.
LOST = re.compile(r"CUDA error(?!: out of memory)|CUDA_ERROR|illegal memory access|unspecified launch failure")
# PyTorch's kernel that stands before each call.
MARK = "spin_kernel"
# Bytes of a one-read kernel over the bytes that have to be moved at least.
REACH = 1.05


def build(runner: Runner, device: str, capability: str, limit: float) -> Step:
    name, target = "build", ROOT / "kldiv_kernels" / "libkldiv_kernels.so"
    if target.exists():
        return Step(name, "pass", 0.0, f"{target.name} is there")
    missing = [tool for tool in ("setuptools", "pybind11", "ninja") if importlib.util.find_spec(tool) is None]
    compiler = os.environ.get("CXX", "g++").split()[-1]
    missing += [] if shutil.which(compiler) else [compiler]
    if missing or device == "cpu":
        why = f"{', '.join(missing)} missing" if missing else "not for a test of the harness"
        return Step(name, "skip", 0.0, f"{target.name} not built: {why}")
    # For this GPU alone: all targets take longer than the step has.
    archs = os.environ.get("KLDIV_CUDA_ARCHS") or capability.replace(".", "")
    command = [runner.python, "setup.py", "build_ext", "--inplace"]
    code, text, seconds = runner.run(command, limit, KLDIV_CUDA_ARCHS=archs)
    if code == 0 and target.exists():
        return Step(name, "pass", seconds, f"{target.name} built")
    return Step(name, "fail", seconds, ending(code, text))


def library(runner: Runner, limit: float) -> Step:
    if not (ROOT / "kldiv_kernels" / "libkldiv_kernels.so").exists():
        return Step("library", "skip", 0.0, "it was not built")
    command = [runner.python, str(FOLDER / "gpu_library.py")]
    code, text, seconds = runner.run(command, limit)
    if code != 0:
        details = {"output": text[-4000:], "broken": broken(code, text, running="cuda")}
        return Step("library", "fail", seconds, ending(code, text), details)
    found = json.loads(text.strip().splitlines()[-1])
    versions = f"Python {found['python']}, PyTorch {found['torch']}"
    plans = f"{len(found['relative_errors'])} plans are right"
    return Step("library", "pass", seconds, f"loads in {versions}; sm_{found['archs']}; {plans}", found)


def sanitize(runner: Runner, name: str, device: str, limit: float, about: dict[str, str]) -> Step:
    command = [runner.python, str(FOLDER / "gpu_memcheck.py"), device]
    tool = SANITIZERS[name]
    if device == "cuda":
        program = find("compute-sanitizer")
        if program is None:
            return Step(name, "skip", 0.0, "compute-sanitizer is not installed")
        # API errors are PyTorch's probes; what is looked for are accesses of kernels.
        flags = ["--report-api-errors", "no"] if tool == "memcheck" else []
        flags += ["--target-processes", "application-only"]
        for kernel in KERNELS:
            flags += ["--kernel-name", f"kernel_substring={kernel}"]
        command = [program, "--tool", tool, *flags, "--error-exitcode", str(FOUND), *command]
    code, text, seconds = runner.run(command, limit, **about)
    if code == 0:
        return Step(name, "pass", seconds, f"{tool}: {last(text, 'calls')}")
    if tool == "racecheck" and code == FOUND:
        told = f"{tool}: {last(text, 'RACECHECK SUMMARY') or 'hazards'}; for information: pairs that an mbarrier orders"
        return Step(name, "pass", seconds, f"{told} are among them", {"output": text[:4000] + text[-4000:]})
    if code not in (None, FOUND) and "not supported" in text.lower():
        return Step(name, "skip", seconds, f"{tool} does not support this device")
    # What was found is an error of the kernel; a process that ended otherwise crashed, or the tool was slow.
    slow = code in (FOUND, None)
    details = {"output": text[:4000] + text[-4000:], "broken": {} if slow else broken(code, text)}
    return Step(name, "fail", seconds, f"{tool}: {ending(code, text)}", details)


def clusters(runner: Runner, capability: str, limit: float) -> Step:
    name, compiler = "clusters", find("nvcc")
    if compiler is None:
        return Step(name, "skip", 0.0, "nvcc is not installed")
    if int(capability.split(".")[0]) < 9:
        return Step(name, "skip", 0.0, f"compute capability {capability} has no clusters")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "clusters"
        sources = [str(FOLDER / "gpu_clusters.cu"), str(ROOT / "csrc" / "plan.cpp")]
        flags = ["-std=c++17", "--expt-relaxed-constexpr", f"-arch=sm_{capability.replace('.', '')}"]
        code, text, compiling = runner.run([compiler, *flags, *sources, "-o", str(program)], limit)
        if code != 0:
            return Step(name, "fail", compiling, f"nvcc: {ending(code, text)}")
        code, text, running = runner.run([str(program)], max(1.0, limit - compiling))
    if code != 0:
        return Step(name, "fail", compiling + running, ending(code, text))
    found = json.loads(text.strip().splitlines()[-1])
    largest = max((shape["cluster"] for shape in found["shapes"] if shape["clusters"]), default=0)
    summary = f"{len(found['shapes'])} shapes, clusters of up to {largest} CTAs"
    return Step(name, "pass", compiling + running, summary, found)


def dram(runner: Runner, limit: float, about: dict[str, str]) -> Step:
    name, program = "dram", find("ncu")
    if program is None:
        return Step(name, "skip", 0.0, "ncu is not installed")
    with tempfile.TemporaryDirectory() as folder:
        calls, said = Path(folder) / "calls.json", Path(folder) / "ncu.csv"
        # The clocks belong to whoever owns the machine; caches are left as the call before left them.
        flags = ["--profile-from-start", "off", "--clock-control", "none", "--cache-control", "none"]
        flags += ["--metrics", ",".join(METRICS), "--csv", "--print-units", "base", "--log-file", str(said)]
        command = [program, *flags, runner.python, str(FOLDER / "gpu_dram.py"), str(calls)]
        code, text, seconds = runner.run(command, limit, **about)
        output = text + (said.read_text(errors="replace") if said.exists() else "")
        if code != 0 or not calls.exists():
            error = last(output, "==ERROR==") or ending(code, output)
            refused = any(sign in output for sign in ("ERR_NVGPUCTRPERM", "Failed to initialize the profiler"))
            # At the time limit it is rather the profiler that is slow than a kernel that hangs.
            details = {"output": output[-4000:], "broken": {} if refused or code is None else broken(code, text)}
            return Step(name, "skip" if refused else "fail", seconds, error[:300], details)
        try:
            measured = by_call(kernels_of(said.read_text(errors="replace")), json.loads(calls.read_text()))
        except (ValueError, KeyError) as error:
            return Step(name, "fail", seconds, f"ncu's table is not understood: {error}", {"output": output[-8000:]})
    ours = [f"{one['case']} {one['over_floor']:.3f}" for one in measured if one["backend"] == "cuda"]
    return Step(name, "pass", seconds, f"bytes / floor of the cuda backend: {', '.join(ours)}", {"calls": measured})


def kernels_of(text: str) -> list[dict[str, Any]]:
    """What ncu's CSV says, a kernel after the other."""
    lines = text.splitlines()
    head = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if head is None:
        raise ValueError('no line starts with "ID"')
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines[head:]):
        if not (row["ID"] or "").isdigit():
            continue
        kernel = kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        if row["Metric Name"] in METRICS:
            kernel[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    return list(kernels.values())


def by_call(kernels: list[dict[str, Any]], calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls with what their kernels moved; a kernel `MARK` begins each."""
    groups: list[list[dict[str, Any]]] = []
    for kernel in kernels:
        if MARK in kernel["kernel"]:
            groups.append([])
        elif groups:
            groups[-1].append(kernel)
    if len(groups) != len(calls):
        raise ValueError(f"{len(groups)} marks for {len(calls)} calls")
    read, written, time = METRICS
    out = []
    for call, group in zip(calls, groups, strict=True):
        moved = sum(kernel[read] + kernel[written] for kernel in group)
        out.append(
            {
                **call, "bytes": moved, "over_floor": moved / call["floor_bytes"],
                "kernels": [
                    {
                        "kernel": kernel["kernel"][:80], "read": kernel[read], "written": kernel[written],
                        "milliseconds": kernel[time] / 1e6,
                    }
                    for kernel in group
                ],
            }
        )  # fmt: skip
    return out


def find(program: str) -> str | None:
    """In the PATH, or where the CUDA toolkit is."""
    roots = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    compiler = shutil.which("nvcc")
    folders = [str(Path(root) / "bin") for root in [*roots, "/usr/local/cuda"]]
    folders += [str(Path(compiler).resolve().parent)] if compiler else []
    return shutil.which(program) or shutil.which(program, path=os.pathsep.join(folders))


def broken(code: int | None, text: str, *errors: str, running: str = "") -> dict[str, str]:
    """{"cuda": what it did} where a script of the cuda backend's calls hung or crashed. Scripts print a line, with the
    backend's name, before each call; `running` is that of a script about one backend."""
    lines = [line for line in text.splitlines() if line.strip()]
    # The last line that is no part of a traceback, or of what a tool says.
    call = next((line for line in reversed(lines) if line.endswith(" ...")), "")
    fatal = next((error for error in errors if LOST.search(error)), None)
    if fatal is not None:
        return {"cuda": f"crashed: {fatal[:120]}"}
    lost = (code is not None and code < 0) or (code != 0 and LOST.search(text))
    if (code is not None and not lost) or "cuda" not in (running, *call.split()):
        return {}
    return {"cuda": f"{'hung' if code is None else 'crashed'} in: {call.strip() or 'no call had begun'}"}


def last(text: str, word: str) -> str:
    return next((line for line in reversed(text.splitlines()) if word in line), "")


def ending(code: int | None, text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()] or ["no output"]
    return f"{'stopped at the time limit, or killed' if code is None else f'exit status {code}'}: {lines[-1][:300]}"
