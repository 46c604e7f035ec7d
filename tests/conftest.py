"""Settings of the whole suite."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from checks import CUDA_ON_HOST, INTERPRETED
from complete import watch

from kldiv_kernels import ops
from kldiv_kernels.registry import STATISTICS, unregister_statistic

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cuda_host.one_read import Machine

if INTERPRETED:
    from triton.runtime import interpreter

    # The interpreter prepares the whole language anew at each call of one device function by another, which takes half
    # of its time. Once a launch is enough for the functions that share their globals.
    _prepared: set[int] = set()
    _launch, _prepare = interpreter.GridExecutor.__call__, interpreter._patch_lang

    def _launch_once(self: Any, *args: Any, **kwargs: Any) -> None:
        _prepared.clear()
        _launch(self, *args, **kwargs)

    def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in _prepared:
            _prepared.add(id(self.fn.__globals__))
            _prepare(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = _launch_once
    interpreter.InterpretedFunction.__call__ = _call


if CUDA_ON_HOST:
    import cuda_host

    cuda_host.serve_cpu_tensors()

# What the interpreter, some thousand times slower than a processor, has no time for: large rows, and the names under
# which the same losses are called.
_TOO_MUCH = (
    "named_forms", "151936", "40007", "40_007", "70001", "20011", "5000", "5003",
    "massless head", "head at -inf", "4099",
)  # fmt: skip


def _for_the_interpreter(items: list[pytest.Item]) -> list[pytest.Item]:
    """The tests of the Triton backend, thinned: of each test, one case for each statistic.

    Which case goes round from statistic to statistic, so that all layouts, dtypes and parameters occur.
    KLDIV_ALL=1 keeps every case.
    """
    own = [item for item in items if item.path.name.startswith(("test_triton", "test_adapters_liger_parity"))]
    kept = [item for item in items if "triton" in item.name and not any(size in item.name for size in _TOO_MUCH)]
    kept = [item for item in kept if item not in own]
    if os.environ.get("KLDIV_ALL") == "1":
        return own + kept
    # Each of its cases is another function.
    own += [item for item in kept if item.path.name == "test_recipes.py"]
    kept = [item for item in kept if item not in own]
    groups: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in kept:
        parameters = getattr(item, "callspec", None)
        names = [] if parameters is None else [str(x) for x in parameters.params.values()]
        statistic = next((name for name in names if name in STATISTICS), "")
        groups.setdefault((item.nodeid.split("[")[0], statistic), []).append(item)
    return own + [cases[5 * index % len(cases)] for index, cases in enumerate(groups.values())]


def pytest_configure(config: pytest.Config) -> None:
    watch(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if INTERPRETED:
        items[:] = _for_the_interpreter(items)
    if CUDA_ON_HOST:
        items[:] = [item for item in items if "cuda" in item.nodeid]
    if "slow" in config.getoption("-m"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same random numbers and statistics in every test, no backend chosen from outside, and one thread.

    What a test registers, itself or by a recipe, goes with it: others ask for all statistics that there are.

    Most tests are small: threads that wait for each other cost more than they give, above all on a shared machine.
    A test about threads, or whose rows are split over them, sets their number.
    """
    monkeypatch.delenv("KLDIV_BACKEND", raising=False)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    known = set(STATISTICS)
    yield
    for name in STATISTICS.keys() - known:
        unregister_statistic(name)


# On the model of a GPU: both forms of its kernels, whatever the plan would be.
PLANS = ["cluster=2,stages=2", "two-sweep"] if CUDA_ON_HOST else [""]


@pytest.fixture(params=PLANS, ids=lambda plan: plan or "plan")
def plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the cuda backend, as its calls are to run."""
    if request.param:
        monkeypatch.setenv("KLDIV_CUDA_PLAN", request.param)


@pytest.fixture
def no_cuda_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cuda backend's own choice of a plan, whatever KLDIV_CUDA_PLAN is outside."""
    monkeypatch.delenv("KLDIV_CUDA_PLAN", raising=False)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The model of a GPU, as it is by default. A call of it gives it another plan, device or order of threads."""
    from cuda_host.one_read import Machine

    chosen = Machine(monkeypatch)
    chosen()
    return chosen


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What read logits, in order: how the losses that know, or find, their gradient in one pass are seen to."""
    seen: list[str] = []

    def noted(name: str, form: Any) -> Any:
        return lambda *arguments: (seen.append(name), form(*arguments))[1]

    for name in ("statistics", "loss", "policy_loss", "topk_loss"):
        monkeypatch.setattr(ops, name, noted(name, getattr(ops, name)))
    return seen
