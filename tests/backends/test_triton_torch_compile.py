"""torch.compile and the Triton backend: the graphs that it traces, the kernels in them, and what these write.

There need be no GPU: tensors are fake, and absent_gpu.py has a driver that names a target.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import INTERPRETED
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
if INTERPRETED:
    pytest.skip("under TRITON_INTERPRET=1 there is no kernel for torch.compile to see", allow_module_level=True)

from absent_gpu import pair, traced_for_a_gpu
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.triton_kernel_wrap import (
    identify_accessed_tensors,
    kernel_side_table,
    triton_kernel_wrapper_functional,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import kldiv_kernels as kk
from kldiv_kernels import ops
from kldiv_kernels.backends.triton import launch
from kldiv_kernels.registry import STATISTICS

MARK = ("mark_kernel", {"marks_ptr", "duplicates_ptr"})
SWEEP, SUMS, FINISH = ("sweep_kernel", {"partial_ptr"}), ("sums_kernel", {"sums_ptr"}), "finish_kernel"
STATE = (FINISH, {"values_ptr", "state_ptr"})
GRADIENT, GRADIENTS = ("gradient_kernel", {"ds_ptr"}), ("gradient_kernel", {"ds_ptr", "dt_ptr"})
LABEL_GRADIENT = ("label_gradient_kernel", {"ds_ptr"})
EVERY = list(STATISTICS)


@pytest.fixture(autouse=True)
def _on_a_gpu_that_is_not_there(tmp_path: Path) -> Iterator[None]:
    with traced_for_a_gpu(tmp_path / "triton"):
        yield


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
        student, reference = pair(rows, teacher=teacher)
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
        compiled(*pair(), torch.zeros(8, dtype=torch.int64)).backward()
    assert graphs.launches() == [[SWEEP, STATE], [GRADIENT]]


def test_top_k_launches_the_kernels_for_labels() -> None:
    """Marks before the sweep, and the labels' columns of the gradient last, in the memory of the others."""
    graphs = Graphs()

    def loss(student: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
        return kk.topk_divergence_loss(student, ids, logprobs, backend="triton")

    compiled = torch.compile(loss, backend=graphs.backend, fullgraph=True)
    with FakeTensorMode(shape_env=ShapeEnv()):
        student, _ = pair()
        compiled(student, torch.zeros(8, 5, dtype=torch.int64), torch.zeros(8, 5)).backward()
        assert student.grad is not None
    assert graphs.launches() == [[MARK, SWEEP, STATE], [GRADIENT, LABEL_GRADIENT]]


def test_without_gradient_no_state_is_kept() -> None:
    graphs = Graphs()
    compiled = torch.compile(lambda x: kk.entropy(x, backend="triton"), backend=graphs.backend, fullgraph=True)
    with FakeTensorMode(shape_env=ShapeEnv()), torch.no_grad():
        compiled(pair()[0])
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
        student, reference = pair()
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
            *pair(), torch.zeros(8, labels, dtype=torch.int64), torch.ones(8, dtype=torch.bool), torch.zeros(8).long(),
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
