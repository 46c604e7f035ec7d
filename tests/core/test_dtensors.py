"""DTensor arguments that every rank has whole: computed locally, they stay DTensors (spread ones: tests/parallel)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from checks import BACKENDS
from public_calls import CALLS, Given, given
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate
from torch.testing._internal.distributed.fake_pg import FakeStore

import kldiv_kernels as kk


@pytest.fixture(params=["gloo", "fake"])
def mesh(request: pytest.FixtureRequest) -> Iterator[DeviceMesh]:
    """Of one process, or of four of which three are not there, in two dimensions."""
    if request.param == "gloo":
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))
    else:
        distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
        yield init_device_mesh("cpu", (2, 2))
    distributed.destroy_process_group()


def _on(mesh: DeviceMesh, tensor: Tensor, *placements: Placement) -> DTensor:
    return DTensor.from_local(tensor, mesh, placements or [Replicate()] * mesh.ndim, run_check=False)


def _check_replicated(got: Tensor, expected: Tensor, mesh: DeviceMesh) -> None:
    assert isinstance(got, DTensor)
    assert got.device_mesh == mesh
    assert list(got.placements) == [Replicate()] * mesh.ndim
    torch.testing.assert_close(got.to_local().double(), expected.double(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("only", ["all", "logits"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_replicated(name: str, backend: str, only: str, mesh: DeviceMesh) -> None:
    """All arguments, or the logits among local tensors, with the gradient of a leaf."""
    x = given(2, 5)
    exact = x.logits.double().requires_grad_()
    expected = CALLS[name].definition(x._replace(logits=exact))
    expected.sum().backward()
    assert exact.grad is not None
    there = Given(*(_on(mesh, tensor) if only == "all" else tensor for tensor in x))
    leaf = _on(mesh, x.logits).requires_grad_()
    got = CALLS[name].ours(there._replace(logits=leaf), backend=backend)
    _check_replicated(got, expected, mesh)
    got.sum().backward()
    assert leaf.grad is not None
    _check_replicated(leaf.grad, exact.grad, mesh)


def test_everything_returned_is_replicated(mesh: DeviceMesh) -> None:
    x = given(2, 5)
    logits, teacher = (_on(mesh, tensor).requires_grad_() for tensor in (x.logits, x.teacher))
    out = kk.policy_loss(logits, x.labels, x.advantages, reference_logprobs=x.old)
    plain = kk.policy_loss(x.logits, x.labels, x.advantages, reference_logprobs=x.old)
    for name in ("loss", "per_token_loss", "logprob", "entropy"):
        _check_replicated(getattr(out, name), getattr(plain, name), mesh)
    assert out.metrics.keys() == plain.metrics.keys()
    for name, value in plain.metrics.items():
        _check_replicated(out.metrics[name], value, mesh)
    for got, expected in zip(kk.topk(logits, 3), kk.topk(x.logits, 3), strict=True):
        _check_replicated(got, expected, mesh)
    stats = kk.token_stats(logits, teacher, stats=("argmax", "js"))
    _check_replicated(stats.argmax, x.logits.argmax(-1), mesh)
    student, exact = x.logits.double(), x.teacher.double().requires_grad_()
    p, q = exact.log_softmax(-1), student.log_softmax(-1)
    m = ((p.exp() + q.exp()) / 2).log()
    ((p.exp() * (p - m) + q.exp() * (q - m)).sum() / 2).backward()
    stats.js.sum().backward()
    assert exact.grad is not None
    assert teacher.grad is not None
    _check_replicated(teacher.grad, exact.grad, mesh)


def test_sums_that_nobody_has_made_are_refused(mesh: DeviceMesh) -> None:
    x = given(2, 5)
    placements = [Partial(), *[Replicate()] * (mesh.ndim - 1)]
    logits, teacher, mask = (_on(mesh, tensor, *placements) for tensor in (x.logits, x.teacher, x.mask.int()))
    expected = r"is a DTensor with placements .*; expected .*Replicate.*\(redistribute\(\) it\)"
    for name, call in {
        "token_stats: logits": lambda: kk.entropy(logits),
        "divergence_loss: logits": lambda: kk.forward_kl(logits, x.teacher),
        "divergence_loss: reference_logits": lambda: kk.divergence_loss(x.logits, teacher),
        "topk_token_stats: mask": lambda: kk.topk_token_stats(x.logits, x.ids, mask=mask),
        "policy_loss: logits": lambda: kk.policy_loss(logits, x.labels, x.advantages),
        "topk_divergence_loss: logits": lambda: kk.topk_divergence_loss(logits, x.ids, x.topk_logprobs),
    }.items():
        with pytest.raises(ValueError, match=f"^{name} {expected}"):
            call()


def test_compiled(mesh: DeviceMesh) -> None:
    x = given(2, 5)
    torch._dynamo.reset()
    compiled = torch.compile(lambda s, t: kk.divergence_loss(s, t, "reverse_kl"), backend="aot_eager", fullgraph=True)
    got = compiled(_on(mesh, x.logits), _on(mesh, x.teacher))
    _check_replicated(got, kk.reverse_kl(x.logits, x.teacher), mesh)
