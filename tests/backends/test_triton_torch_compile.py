"""torch.compile and the Triton backend: what it traces, what Inductor prints, and that the print compiles.

There need be no GPU: tensors are fake, a driver that is not there names a target, kernels are compiled ahead of time.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import INTERPRETED
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
if INTERPRETED:
    pytest.skip("under TRITON_INTERPRET=1 there is no kernel for torch.compile to see", allow_module_level=True)

import triton
import triton.language as tl
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.triton_kernel_wrap import (
    identify_accessed_tensors,
    kernel_side_table,
    triton_kernel_wrapper_functional,
)
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kldiv_kernels as kk
from kldiv_kernels import ops
from kldiv_kernels.backends import triton as backend
from kldiv_kernels.backends.triton import launch
from kldiv_kernels.backends.triton import ops as traced
from kldiv_kernels.registry import STATISTICS

MARK = ("mark_kernel", {"marks_ptr", "duplicates_ptr"})
SWEEP, SUMS, FINISH = ("sweep_kernel", {"partial_ptr"}), ("sums_kernel", {"sums_ptr"}), "finish_kernel"
STATE = (FINISH, {"values_ptr", "state_ptr"})
GRADIENT, GRADIENTS = ("gradient_kernel", {"ds_ptr"}), ("gradient_kernel", {"ds_ptr", "dt_ptr"})
LABEL_GRADIENT = ("label_gradient_kernel", {"ds_ptr"})
TARGET = GPUTarget("cuda", 90, 32)
EVERY = list(STATISTICS)
STEEPNESS = tl.constexpr(3.0)


# Names that the package's kernels use too: Inductor prints all functions into one file.
@triton.jit
def expm1(x):
    return tl.exp(x) * STEEPNESS


@triton.jit
def log(logp, logq, alpha):
    return expm1(logp + logq) * alpha


@triton.jit
def kl_term(logp, logq):
    return expm1(logq) * logp


class NoDriver:
    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0


def _unsupported_on_gpus(self: backend.TritonBackend, call: ops.Call) -> str | None:
    """The checks that torch.compile traces, but for the one of the device."""
    if backend.leading(call.logits) is None or any(backend._missing(name) for name in call.stats):
        return "it does not serve this"
    return None


@pytest.fixture(autouse=True)
def _on_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Fake CPU tensors, which autograd has here, are taken for those of a GPU with 132 processors."""
    bound_for = launch.bound_for
    monkeypatch.setattr(backend.TritonBackend, "unavailable", lambda self: None)
    monkeypatch.setattr(backend.TritonBackend, "unsupported", _unsupported_on_gpus)
    monkeypatch.setattr(launch, "bound_for", lambda stats, nvidia: bound_for(stats, True))
    monkeypatch.setattr(launch, "_processors", lambda device: 132)
    monkeypatch.setattr(triton.runtime.driver, "_active", NoDriver())
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Graphs:
    """A compiler that keeps the graphs it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.of: list[torch.fx.GraphModule] = []
        self.backend = aot_autograd(fw_compiler=self._keep, bw_compiler=self._keep)

    def _keep(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.of.append(graph)
        return make_boxed_func(graph.forward)

    def launches(self) -> list[list[tuple[str, set[str]]]]:
        """For each graph, the kernels launched and what they write."""
        return [[_launch(node) for node in graph.graph.nodes if _is_launch(node)] for graph in self.of]


def _is_launch(node: torch.fx.Node) -> bool:
    return node.target is triton_kernel_wrapper_functional


def _launch(node: torch.fx.Node) -> tuple[str, set[str]]:
    kernel: Any = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
    return kernel.fn.__name__, set(node.kwargs["tensors_to_clone"])


def _pair(rows: int = 8, vocab: int = 1000, teacher: bool = False) -> tuple[Tensor, Tensor]:
    student = torch.empty(rows, vocab, dtype=torch.bfloat16, requires_grad=True)
    return student, torch.empty(rows, vocab, dtype=torch.bfloat16, requires_grad=teacher)


@pytest.mark.parametrize(
    ("kind", "rows", "teacher", "expected"),
    [
        ("forward_kl", 8, False, [SWEEP, STATE, GRADIENT]),
        ("js", 8, False, [SWEEP, SUMS, STATE, GRADIENT]),
        ("js", 8, True, [SWEEP, SUMS, STATE, GRADIENTS]),
        ("js", 1024, False, [("loss_kernel", {"values_ptr", "ds_ptr"})]),
    ],
)
def test_a_loss_is_its_kernels_in_one_graph(
    kind: str, rows: int, teacher: bool, expected: list[tuple[str, set[str]]]
) -> None:
    graphs = Graphs()
    compiled = torch.compile(
        lambda s, t: kk.divergence_loss(s, t, kind, backend="triton"), backend=graphs.backend, fullgraph=True
    )
    with FakeTensorMode(shape_env=ShapeEnv()):
        student, reference = _pair(rows, teacher=teacher)
        compiled(student, reference).backward()
        assert student.grad is not None
        assert (student.grad.shape, student.grad.dtype) == (student.shape, student.dtype)
        assert (reference.grad is not None) == teacher
    forward, backward = graphs.launches()
    assert forward == expected
    assert backward == []


def _policy(student: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
    stats = kk.token_stats(
        student, reference, labels, stats=("logprob", "entropy", "reverse_kl"), backend="triton", mask=labels > 0
    )
    return (stats.reverse_kl - stats.logprob - 0.1 * stats.entropy).mean()


def test_statistics_launch_forward_and_backward_kernels() -> None:
    graphs = Graphs()
    compiled = torch.compile(_policy, backend=graphs.backend, fullgraph=True)
    with FakeTensorMode(shape_env=ShapeEnv()):
        compiled(*_pair(), torch.zeros(8, dtype=torch.int64)).backward()
    assert graphs.launches() == [[SWEEP, STATE], [GRADIENT]]


def test_top_k_launches_the_kernels_for_labels() -> None:
    """Marks before the sweep, and the labels' columns of the gradient last, in the memory of the others."""
    graphs = Graphs()

    def loss(student: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
        return kk.topk_divergence_loss(student, ids, logprobs, backend="triton")

    compiled = torch.compile(loss, backend=graphs.backend, fullgraph=True)
    with FakeTensorMode(shape_env=ShapeEnv()):
        student, _ = _pair()
        compiled(student, torch.zeros(8, 5, dtype=torch.int64), torch.zeros(8, 5)).backward()
        assert student.grad is not None
    assert graphs.launches() == [[MARK, SWEEP, STATE], [GRADIENT, LABEL_GRADIENT]]


def test_without_gradient_no_state_is_kept() -> None:
    graphs = Graphs()
    compiled = torch.compile(lambda x: kk.entropy(x, backend="triton"), backend=graphs.backend, fullgraph=True)
    with FakeTensorMode(shape_env=ShapeEnv()), torch.no_grad():
        compiled(_pair()[0])
    assert graphs.launches() == [[SWEEP, (FINISH, {"values_ptr"})]]


def test_one_graph_for_all_numbers_of_rows_and_temperatures() -> None:
    graphs = Graphs()

    def loss(student: Tensor, reference: Tensor, temperature: float, beta: float) -> Tensor:
        return kk.divergence_loss(
            student[:, :-1], reference[:, 1:], "js", backend="triton", temperature=temperature, beta=beta
        )

    compiled = torch.compile(loss, backend=graphs.backend, fullgraph=True, dynamic=True)
    with FakeTensorMode(shape_env=ShapeEnv()):
        for tokens, temperature, beta in ((5, 1.5, 0.3), (9, 0.7, 0.6), (33, 2.0, 0.9)):
            student = torch.empty(3, tokens, 1000, dtype=torch.bfloat16, requires_grad=True)
            compiled(student, torch.empty_like(student), temperature, beta).backward()
            assert student.grad is not None
    assert [len(launches) for launches in graphs.launches()] == [4, 0]


def test_double_backward_raises_when_compiled() -> None:
    compiled = torch.compile(
        lambda s, t: kk.divergence_loss(s, t, "js", backend="triton"), backend=Graphs().backend, fullgraph=True
    )
    with FakeTensorMode(shape_env=ShapeEnv()):
        student, reference = _pair()
        loss = compiled(student, reference)
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(loss, student, create_graph=True)[0].sum().backward()


def test_kernels_write_what_they_are_said_to_and_no_logits() -> None:
    """The analysis by which Inductor decides what to copy, of every statistic at once."""
    written = {}

    def run(self: launch.Launch, kernel: Any, programs: int, warps: int, arguments: dict[str, Any]) -> None:
        accesses = identify_accessed_tensors(kernel, dict(arguments), {})
        written[kernel.__name__] = {dependency.name for dependency in accesses.read_writes.writes}

    def call(names: list[str], labels: int) -> ops.Call:
        return ops.Call(
            *_pair(), torch.zeros(8, labels, dtype=torch.int64), torch.ones(8, dtype=torch.bool), torch.zeros(8).long(),
            torch.ones(4, 8), (1.0, 1.0, 0.5, 0.5), tuple(names), 1000,
        )  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.Launch, "_run", run)
        many = launch.Launch(call(EVERY, 2), interpreted=False)
        values, state = many.statistics(with_state=True)
        many.gradients(state, values, student=True, reference=True)
        patch.setattr(launch.Launch, "fills_the_device", True)
        one = launch.Launch(call([name for name in EVERY if name != "tail_logprob"], 1), interpreted=False)
        one.loss(values, student=True, reference=False)
    assert written == {
        "mark_kernel": {"marks_ptr", "duplicates_ptr"},
        "sweep_kernel": {"partial_ptr"},
        "sums_kernel": {"sums_ptr"},
        "finish_kernel": {"values_ptr", "state_ptr"},
        "gradient_kernel": {"ds_ptr", "dt_ptr"},
        "label_gradient_kernel": {"ds_ptr", "dt_ptr"},
        "loss_kernel": {"values_ptr", "ds_ptr"},
    }


# --- Inductor
class CodeWritten(Exception):  # noqa: N818
    """In the place of loading the code that Inductor wrote, which wants a GPU."""


def _written_by_inductor(function: Callable[..., Tensor], *arguments: Any) -> str:
    written = []

    def keep(graph: GraphLowering) -> None:
        code = graph.codegen()[0]
        written.append(getattr(code, "value", code))
        raise CodeWritten

    settings = {"force_disable_caches": True, "compile_threads": 1}
    with pytest.MonkeyPatch.context() as patch, torch._inductor.config.patch(settings):
        patch.setattr(GraphLowering, "compile_to_module", keep)
        with pytest.raises(Exception, match="CodeWritten"):
            torch.compile(function, fullgraph=True)(*arguments)
    (code,) = written
    return str(code)


def _kernels(code: str) -> list[str]:
    """The source text of the kernels in the code."""
    return [
        ast.literal_eval(node.args[1])
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "async_compile.triton"
    ]


def _compile_printed(source: str, folder: Path) -> str:
    """Import the text as a module of its own, as Inductor does, and compile its kernel for a GPU. Returns its name."""
    path = folder / f"printed_{len(list(folder.iterdir()))}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (kernel,) = (x for x in vars(module).values() if hasattr(x, "triton_meta"))
    meta = kernel.triton_meta
    source_of_kernel = ASTSource(kernel.fn, meta["signature"], meta["constants"], meta["configs"][0])
    compiled = triton.compile(source_of_kernel, target=TARGET, options={"num_warps": kernel.configs[0].num_warps})
    # A number that torch.compile passes on is float64: none may meet the logits.
    assert not [line for line in compiled.asm["ttir"].splitlines() if "f64" in line and "tt.func" not in line]
    return str(kernel.fn.__name__)


def _statistics(*names: str) -> Callable[..., Tensor]:
    def function(student: Tensor, reference: Tensor) -> Tensor:
        labels = torch.zeros(student.shape[0], 2, dtype=torch.int64)
        stats = kk.token_stats(
            student, reference, labels, stats=names, backend="triton", exclude=labels[:, 0], vocab_size=990,
            temperature=torch.ones(student.shape[0]),
        )  # fmt: skip
        total = sum(value.float().sum() for value in stats.values())
        assert isinstance(total, Tensor)
        return total

    return function


def _loss(kind: str) -> Callable[..., Tensor]:
    return lambda student, reference: kk.divergence_loss(student, reference, kind, temperature=2.0, backend="triton")


def _label_gradient(student: Tensor, reference: Tensor) -> Tensor:
    """The backward operator of top-k: what autograd calls, in a graph by itself."""
    rows = student.shape[0]
    state = torch.zeros(8, rows)
    return traced.statistics_backward(
        student.detach(), None, torch.zeros(rows, 3, dtype=torch.int64), None, None, torch.ones(4, rows),
        "logprob,tail_logprob", 990, "", state, torch.ones(4, rows), True, False,
    )[0]  # fmt: skip


def _register(*functions: Any) -> None:
    def unused(logp: Tensor, logq: Tensor) -> Tensor:
        raise AssertionError

    kk.register_statistic("steep", value=unused, grad_logq=unused, grad_logp=unused, triton=functions)


@pytest.fixture
def _user_statistic() -> Iterator[None]:
    _register(log, kl_term, kl_term)
    yield
    kk.unregister_statistic("steep")


MANY = ["sweep_kernel", "finish_kernel", "gradient_kernel"]


@pytest.mark.parametrize(
    ("function", "rows", "expected"),
    [
        (lambda student, reference: kk.entropy(student, backend="triton").sum(), 8, MANY[:2]),
        (_loss("forward_kl"), 8, MANY),
        (_loss("js"), 8, ["sweep_kernel", "sums_kernel", *MANY[1:]]),
        (_loss("js"), 1024, ["loss_kernel"]),
        (_loss("steep"), 1, ["sweep_kernel", "sums_kernel", *MANY[1:]]),
        (_loss("steep"), 1024, ["loss_kernel"]),
        (_statistics("logprob", "tail_logprob"), 8, ["mark_kernel", *MANY[:2]]),
        (_label_gradient, 8, [MANY[2], "label_gradient_kernel"]),
        (_statistics(*EVERY), 8, ["mark_kernel", "sweep_kernel", "sums_kernel", "finish_kernel"]),
    ],
    ids=[
        "one tensor",
        "KL",
        "js",
        "js, many rows",
        "a user's, one row",
        "a user's, many rows",
        "top-k",
        "its gradient",
        "everything",
    ],
)
@pytest.mark.usefixtures("_user_statistic")
def test_what_inductor_prints_compiles(
    function: Callable[..., Tensor], rows: int, expected: list[str], tmp_path: Path
) -> None:
    code = _written_by_inductor(function, *_pair(rows))
    (tmp_path / "kernels").mkdir()
    assert [_compile_printed(source, tmp_path / "kernels") for source in _kernels(code)] == expected


def test_inductor_allocates_one_gradient_and_copies_no_logits() -> None:
    code = _written_by_inductor(_loss("js"), *_pair(1024))
    assert code.count("empty_strided_cpu((1024, 1000)") == 1
    assert "clone(" not in code
    assert "aten.clone" not in code
    assert ".copy_(" not in code


def test_inductor_writes_the_columns_of_labels_into_the_same_gradient() -> None:
    code = _written_by_inductor(_label_gradient, *_pair(8))
    assert code.count("empty_strided_cpu((8, 1000)") == 1
    assert "clone(" not in code
    assert ".copy_(" not in code


def test_version_tells_users_kernels_apart() -> None:
    """Else a cache on disk would give the graph of kernels that have changed since."""
    versions = [traced.version(("js",))]
    for functions in ((log, kl_term, kl_term), (kl_term, kl_term, kl_term)):
        _register(*functions)
        versions += [traced.version(("steep",)), traced.version(("steep",))]
        kk.unregister_statistic("steep")
    assert versions[1] == versions[2]
    assert versions[3] == versions[4]
    assert len(set(versions)) == 3
