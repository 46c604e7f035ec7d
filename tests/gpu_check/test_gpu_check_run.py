"""A whole `make gpu-check` on a faked GPU: the order of its steps, their time, and what one does to those after it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = str(ROOT / "benchmarks")
sys.path.insert(0, FOLDER)
import gpu_check  # noqa: E402
import gpu_check_choice as choice  # noqa: E402
import gpu_check_tools as tools  # noqa: E402
from gpu_check_choice import Choice  # noqa: E402
from gpu_check_steps import Runner, Step  # noqa: E402

sys.path.remove(FOLDER)


def test_the_default_run_fits_seven_minutes_and_begins_with_what_says_most() -> None:
    assert choice.DEFAULT_STEPS == (
        "build", "library", "cuda", "clusters", "benchmark", "dram", "graphs", "large", "triton", "barriers",
        "memory errors",
    )  # fmt: skip
    # Where the library was built beforehand.
    steps = choice.DEFAULT_STEPS[1:]
    assert choice.START + sum(choice.LIMITS[step] for step in steps) <= 60 * choice.MINUTES == 420
    run, own = Choice(steps), choice.LIMITS
    assert run.limit("library", 420 - choice.START) == own["library"]
    assert run.limit("memory errors", own["memory errors"]) == own["memory errors"] - 5
    # What earlier steps left is the later ones', up to twice their own time: a hang does not take the card's quarter.
    assert run.limit("library", 420 - choice.START + 20) == own["library"] + 15
    assert run.limit("memory errors", 300) == Choice(("memory errors",)).limit("memory errors", 400) == 60
    assert run.limit("cuda", 30) == 25


AVAILABLE = {"cpu": "available", "cuda": "available", "triton": "available", "reference": "available"}
NO_CUDA = {**AVAILABLE, "cuda": "this build has no CUDA part"}


def _instead(step: str, **options: Any) -> tuple[str, str] | None:
    found = Choice(choice.DEFAULT_STEPS, **{"states": AVAILABLE, **options}).instead(step)
    return None if found is None else (found.status, found.summary)


def test_what_is_made_of_a_step_whose_backend_is_not_there() -> None:
    for step in choice.LIMITS:
        assert _instead(step) is None
    for step in ("library", "cuda"):
        assert _instead(step, states=NO_CUDA) == (
            "fail", "the cuda backend: this build has no CUDA part (--backends leaves it out)"
        )  # fmt: skip
    assert _instead("barriers", states=NO_CUDA) == (
        "skip", "the cuda backend: this build has no CUDA part (--backends leaves it out)"
    )  # fmt: skip
    assert _instead("graphs", states=NO_CUDA) is None
    assert _instead("graphs", states={"cpu": "available", "cuda": "no", "triton": "no"}) == (
        "fail", "no backend is left: cuda: no; triton: no"
    )  # fmt: skip
    assert _instead("cuda", backends=["triton"]) == ("skip", "about the cuda backend: --backends leaves it out")
    assert _instead("cuda", states=NO_CUDA, nvidia=False) == (
        "skip", "about the cuda backend: this is no NVIDIA device"
    )  # fmt: skip
    assert _instead("graphs", backends=["cuda", "cudda"], states=NO_CUDA) == (
        "fail", "no backend is left: cuda: this build has no CUDA part; cudda: there is none of this name"
    )  # fmt: skip
    assert _instead("cuda", device="cpu") == _instead("dram", device="cpu") == ("skip", "needs a GPU")
    hung = "hung in: cuda cluster=16 ... (step library)"
    for step in ("cuda", "dram", "barriers", "races", "tune"):
        assert _instead(step, broken=hung) == ("skip", f"left out: the cuda backend {hung}")
    for step in ("clusters", "graphs", "triton", "benchmark", "memory errors"):
        assert _instead(step, broken=hung) is None
    assert Choice(("graphs",), states=AVAILABLE, broken=hung).of("graphs") == ["triton"]
    assert _instead("graphs", backends=["cuda"], broken=hung) == ("skip", f"no backend is left: cuda: {hung}")


DESCRIBED = {
    "device": {"name": "NVIDIA H100", "capability": "9.0"}, "host": {"cores": 4},
    "versions": {"torch": "2", "triton": "3", "hip": None},
}  # fmt: skip
FOUND = {"python": "3", "torch": "2", "archs": "90", "relative_errors": {}}


class FakedRunner(Runner):
    """A GPU on which all goes well, but for what `happens` says: word of a command → exit status and output."""

    def __init__(self, folder: Path, states: dict[str, str], happens: dict[str, tuple[int | None, str]]) -> None:
        super().__init__(folder / "log", {}, lambda text: None)
        self.states, self.happens = states, happens
        self.asked: list[tuple[str, str | None]] = []
        self.passing: tuple[str, ...] = ("cuda", "triton")

    def run(self, command: list[str], limit: float, **variables: str) -> tuple[int | None, str, float]:
        words = " ".join(command)
        self.asked.append((words, variables.get("KLDIV_GPU_BACKENDS")))
        for word, (code, text) in self.happens.items():
            if word in words:
                return code, text, 1.0
        if "gpu_device" in words:
            return 0, json.dumps({**DESCRIBED, "backends": self.states}), 1.0
        if "--output" in command:
            row = dict.fromkeys(("case", "rows", "vocab", "error", "extra_bytes", "call_milliseconds"))
            row |= {"implementation": "eager", "milliseconds": 1.0, "agrees": True, "floor_milliseconds": None}
            content = {"rows": [row], "targets": [], "left_out": [], "ours": []}
            Path(command[command.index("--output") + 1]).write_text(json.dumps(content))
        return 0, json.dumps({**FOUND, "shapes": []}), 1.0

    def tests(
        self, name: str, files: list[str], processes: int, limit: float, backends: Any = (), **variables: str
    ) -> Step:
        self.asked.append((name, ",".join(backends)))
        passed = {backend: 3 for backend in backends if backend in self.passing}
        return Step(name, "pass", 1.0, "3 tests", {"passed_by_backend": passed})


def _run(folder: Path, states: dict[str, str], happens: Any = None, **options: Any) -> tuple[int, Any, FakedRunner]:
    folder.mkdir()
    given = {"output": folder, "minutes": 7.0, "steps": choice.DEFAULT_STEPS, "backends": None, "device": "cuda"}
    check = gpu_check.Check(argparse.Namespace(quick=False, **{**given, **options}))
    check.runner = runner = FakedRunner(folder, states, happens or {})
    code = check.run()
    steps = json.loads((folder / "gpu-check.json").read_text())["steps"]
    return code, {step["name"]: (step["status"], step["summary"]) for step in steps}, runner


def test_a_whole_run_on_a_faked_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "find", lambda program: program)
    monkeypatch.setattr(tools, "dram", lambda runner, limit, about: Step("dram", "pass", 1.0, str(about)))
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    code, steps, runner = _run(tmp_path / "well", AVAILABLE)
    assert steps["dram"] == ("pass", "{'KLDIV_GPU_BACKENDS': 'cuda'}")
    assert (code, list(steps)) == (0, list(choice.DEFAULT_STEPS)), steps
    assert dict(runner.asked[-5:-2]) == {"graphs": "cuda,triton", "large": "cuda,triton", "triton": "triton"}
    assert runner.asked[-2][0].startswith("compute-sanitizer --tool synccheck")
    assert [about for _, about in runner.asked[-2:]] == ["cuda", "cuda,triton"]
    for words, _ in runner.asked[-2:]:
        assert "--kernel-name kernel_substring=kldiv --kernel-name kernel_substring=sweep_kernel" in words

    # A backend that the library calls available, and of which no test passed.
    code, steps, _ = _run(tmp_path / "new", {**AVAILABLE, "new": "available"})
    assert code == 1
    assert steps["backends"] == ("fail", "of these no test passed: new")
    assert [name for name, (status, _) in steps.items() if status != "pass"] == ["backends"]

    # A plan that hangs leaves its name, and the backend's later steps are skipped by name.
    plan = "cuda cluster=16,stages=2, forward_kl, 64 × 262144 ..."
    code, steps, runner = _run(tmp_path / "hangs", AVAILABLE, {"gpu_library": (None, f"backends: ...\n{plan}\n")})
    assert code == 1
    assert steps["library"] == ("fail", f"stopped at the time limit, or killed: {plan}")
    why = f"left out: the cuda backend hung in: {plan} (step library)"
    assert steps["cuda"] == steps["dram"] == steps["barriers"] == ("skip", why)
    assert steps["clusters"][0] == "pass", "it runs none of the backend's kernels"
    assert steps["backends"] == ("fail", "of these no test passed: cuda")
    asked = dict(runner.asked)
    assert asked["graphs"] == asked["large"] == asked["triton"] == "triton"
    assert [about for words, about in runner.asked if "benchmarking.gpu " in words] == ["triton"]

    # A wrong value is no reason to stop.
    told = "AssertionError: two-sweep: loss 1, expected 2"
    code, steps, runner = _run(tmp_path / "wrong", AVAILABLE, {"gpu_library": (1, f"{plan}\n{told}")})
    assert (code, steps["library"][0], steps["cuda"][0]) == (1, "fail", "pass")

    code, steps, _ = _run(tmp_path / "without", NO_CUDA)
    assert (code, steps["library"][0], steps["cuda"][0], steps["triton"][0]) == (1, "fail", "fail", "pass")
    code, steps, _ = _run(tmp_path / "triton", NO_CUDA, backends=["triton"])
    assert (code, steps["library"][0], steps["cuda"][0], steps["triton"][0]) == (0, "skip", "skip", "pass")
    # Asked for a step alone, a run is about that one.
    code, steps, _ = _run(tmp_path / "one", AVAILABLE, steps=["graphs"])
    assert (code, list(steps)) == (0, ["graphs"])


@pytest.mark.parametrize(
    ("code", "text", "what"),
    [
        (None, "triton js ...\ncuda js ...\n", "hung in: cuda js ..."),
        (None, "cuda js ...\ntriton js ...\n", None),
        (-6, "cuda js ...\nAborted\n", "crashed in: cuda js ..."),
        (1, "cuda js ...\nTraceback\nRuntimeError: CUDA error: unspecified launch failure", "crashed in: cuda js ..."),
        (1, "cuda js ...\nAssertionError: loss 1, expected 2", None),
        (1, "cuda js ...\nRuntimeError: CUDA error: out of memory", None),
        (0, "cuda js ...\n", None),
    ],
)
def test_what_a_script_did_to_the_backend(code: int | None, text: str, what: str | None) -> None:
    assert tools.broken(code, text) == ({} if what is None else {"cuda": what})


def test_races_are_for_information(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "find", lambda program: program)
    (tmp_path / "log").write_text("")
    text = "cuda cluster=8,stages=3 js ...\n========= RACECHECK SUMMARY: 4 hazards displayed (4 errors, 0 warnings)\n"
    runner = FakedRunner(tmp_path, AVAILABLE, {"compute-sanitizer": (tools.FOUND, text)})
    step = tools.sanitize(runner, "races", "cuda", 60, {})
    assert (step.status, "4 hazards displayed" in step.summary, "for information" in step.summary) == (
        "pass", True, True
    )  # fmt: skip
    step = tools.sanitize(runner, "memory errors", "cuda", 60, {})
    assert (step.status, step.details["broken"]) == ("fail", {})


def test_this_packages_kernels_are_instrumented() -> None:
    """By a part of their names: each kernel of either backend has one."""
    folder = ROOT / "kldiv_kernels" / "backends" / "triton"
    lines = [line for path in folder.rglob("*.py") for line in path.read_text().splitlines()]
    kernels = [line.removeprefix("def ").partition("(")[0] for line in lines if line.startswith("def ")]
    of_triton = [name for name in kernels if name.endswith("_kernel")]
    assert len(of_triton) >= 8
    assert all(any(part in name for part in tools.KERNELS) for name in of_triton)
    for path in (ROOT / "csrc" / "cuda").rglob("*.cuh"):
        text = path.read_text()
        assert "KLDIV_KERNEL(" not in text or "namespace kldiv" in text or path.name == "ptx.cuh", path
