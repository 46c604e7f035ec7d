"""CUDA graphs, streams and torch.compile: calls that are captured, compiled or elsewhere give what eager ones give."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from setting import DEVICE, KERNELS, QUICK
from torch import Tensor

import kldiv_kernels as kk

# Few rows run as slices, many in the one-program form. 5003 columns are two sweeps of the cuda backend; 16,392 columns,
# a multiple of 8, are read once.
SHAPES = ((3, 300),) if QUICK else ((3, 5003), (2048, 5003), (3, 16_392), (1024, 16_392))
Step = Callable[[Tensor, Tensor, Tensor, str], Tensor]


def _inputs(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = (torch.randn(rows, columns, device=DEVICE).mul_(3).to(torch.bfloat16) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(columns, (rows,), device=DEVICE)


def _distillation(student: Tensor, teacher: Tensor, labels: Tensor, backend: str) -> Tensor:
    return 2 * kk.divergence_loss(student, teacher, "forward_kl", temperature=2.0, backend=backend)


def _masked(student: Tensor, teacher: Tensor, labels: Tensor, backend: str) -> Tensor:
    return kk.js_divergence(student, teacher, labels=labels, ignore_index=7, backend=backend)


def _entropy(student: Tensor, teacher: Tensor, labels: Tensor, backend: str) -> Tensor:
    stats = kk.token_stats(student, teacher, stats=["entropy", "reverse_kl"], backend=backend)
    return (stats.entropy * 0.3 + stats.reverse_kl.square()).mean()


def _policy(student: Tensor, teacher: Tensor, labels: Tensor, backend: str) -> Tensor:
    stats = kk.token_stats(student, labels=labels, stats=["logprob", "entropy"], backend=backend)
    return -stats.logprob.mean() - 0.01 * stats.entropy.mean()


def _top_k(student: Tensor, teacher: Tensor, labels: Tensor, backend: str) -> Tensor:
    ids = (labels[:, None] + torch.arange(64, device=labels.device)) % student.shape[-1]
    logprobs = teacher.float().log_softmax(-1).gather(-1, ids)
    return kk.topk_divergence_loss(student, ids, logprobs, check=False, backend=backend)


STEPS = [_distillation, _masked, _entropy, _policy, _top_k]


def _run(step: Step, inputs: tuple[Tensor, Tensor, Tensor], backend: str) -> tuple[Tensor, Tensor]:
    student = inputs[0]
    student.grad = None
    loss = step(*inputs, backend)
    loss.backward()
    assert student.grad is not None
    return loss.detach().clone(), student.grad.clone()


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("backend", KERNELS)
def test_a_captured_step_replays_on_new_logits(step: Step, rows: int, columns: int, backend: str) -> None:
    inputs, fresh = _inputs(rows, columns), _inputs(rows, columns)
    wanted = _run(step, fresh, backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            before = _run(step, inputs, backend)
    torch.cuda.current_stream().wait_stream(stream)
    inputs[0].grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(*inputs, backend)
        loss.backward()
    gradient = inputs[0].grad
    assert gradient is not None
    with torch.no_grad():
        for old, new in zip(inputs, fresh, strict=True):
            old.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(loss.detach(), wanted[0])
    assert torch.equal(gradient, wanted[1])
    assert not torch.equal(gradient, before[1])


@pytest.mark.skipif(DEVICE != "cuda", reason="streams need a GPU")
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("backend", KERNELS)
def test_a_step_on_a_stream_of_its_own(step: Step, rows: int, columns: int, backend: str) -> None:
    """The logits are written late on that stream: kernels anywhere else would read what stood there before."""
    inputs, fresh = _inputs(rows, columns), _inputs(rows, columns)
    before, wanted = _run(step, inputs, backend), _run(step, fresh, backend)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            for old, new in zip(inputs, fresh, strict=True):
                old.copy_(new)
        got = _run(step, inputs, backend)
    stream.synchronize()
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])
    assert not torch.equal(got[1], before[1])


@pytest.mark.skipif(DEVICE != "cuda", reason="there is no device to wait for")
@pytest.mark.parametrize(("rows", "columns"), SHAPES[::3])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("backend", KERNELS)
def test_a_step_does_not_wait_for_the_device(step: Step, rows: int, columns: int, backend: str) -> None:
    inputs = _inputs(rows, columns)
    _run(step, inputs, backend)  # compiles and loads its kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*inputs, backend).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("rows", "columns"), SHAPES[::3])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("backend", KERNELS)
def test_a_compiled_step(step: Step, rows: int, columns: int, backend: str) -> None:
    inputs = _inputs(rows, columns)
    loss, gradient = _run(step, inputs, backend)
    torch._dynamo.reset()
    # Inductor is what runs on a GPU; on a CPU it would compile C++ for a minute.
    compiled = torch.compile(step, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    for _ in range(2):
        again, its_gradient = _run(compiled, inputs, backend)
        assert torch.allclose(again, loss, rtol=1e-5)
        # The kernels are the same; what is around them may be fused differently.
        difference = (its_gradient.double() - gradient.double()).abs()
        scale = gradient.double().abs().amax(-1, keepdim=True)
        assert (difference <= 2e-5 * scale + torch.finfo(torch.bfloat16).eps * gradient.double().abs()).all()
        assert gradient.any()
