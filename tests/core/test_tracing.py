"""Calls that are traced or have no values: torch.export, make_fx, torch.compile, fake and meta tensors."""

from __future__ import annotations

import pytest
import torch
from checks import BACKENDS
from public_calls import CALLS, Given, PublicCall, bucket, given
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import kldiv_kernels as kk


class Module(torch.nn.Module):
    def __init__(self, call: PublicCall, backend: str) -> None:
        super().__init__()
        self.call, self.backend = call, backend

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.call.ours(Given(*tensors), backend=self.backend)


def _gradient(call: PublicCall, backend: str, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    logits = tensors[0].detach().requires_grad_()
    value = call.ours(Given(logits, *tensors[1:]), backend=backend)
    return value, torch.autograd.grad(value.sum(), logits)[0]


def _check(found: tuple[Tensor, Tensor], call: PublicCall, x: Given) -> None:
    exact = x.logits.double().requires_grad_()
    value = call.definition(x._replace(logits=exact))
    (gradient,) = torch.autograd.grad(value.sum(), exact)
    for got, expected in zip(found, (value, gradient), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_export_with_dynamic_batch_and_tokens(name: str, backend: str) -> None:
    call, dynamic = CALLS[name], {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    shapes = (tuple(dynamic for _ in Given._fields),)
    program = torch.export.export(Module(call, backend), given(2, 5), dynamic_shapes=shapes, strict=False)
    for leading in ((2, 5), (4, 7), (6, 2)):
        x = given(*leading)
        torch.testing.assert_close(program.module()(*x).double(), call.definition(x).double(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_make_fx(name: str, backend: str, mode: str) -> None:
    """Values and gradients; symbolic ones of other sizes, the vocabulary's too."""
    call = CALLS[name]
    graph = make_fx(lambda *x: _gradient(call, backend, *x), tracing_mode=mode)(*given(2, 5))
    sizes = [(2, 5, 13), (4, 7, 21), (6, 2, 8)]
    for *leading, vocab in sizes if mode == "symbolic" else sizes[:1]:
        x = given(*leading, vocab=vocab)
        _check(graph(*x), call, x)


@pytest.mark.parametrize("kind", ["fake", "symbolic", "meta"])
@pytest.mark.parametrize("name", CALLS)
def test_tensors_without_values(name: str, kind: str) -> None:
    x = given(2, 5)
    real = _gradient(CALLS[name], "auto", *x)
    if kind == "meta":
        found = _gradient(CALLS[name], "auto", *(tensor.to("meta") for tensor in x))
    else:
        with FakeTensorMode(shape_env=ShapeEnv() if kind == "symbolic" else None) as mode:
            found = _gradient(CALLS[name], "auto", *(mode.from_tensor(tensor) for tensor in x))
    for got, expected in zip(found, real, strict=True):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize(
    "name", ["divergence_loss, no options", "entropy", "policy_loss of sequences", "topk_divergence_loss"]
)
def test_one_compiled_graph_for_all_sizes(name: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    call = CALLS[name]
    compiled = torch.compile(Module(call, BACKENDS[0]), dynamic=True, fullgraph=True, backend="aot_eager")
    for *leading, vocab in ((2, 5, 13), (4, 7, 21), (6, 2, 8)):
        x = given(*leading, vocab=vocab)
        leaf = x.logits.clone().requires_grad_()
        value = compiled(leaf, *x[1:])
        _check((value.detach(), torch.autograd.grad(value.sum(), leaf)[0]), call, x)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_of_inference_mode(name: str, backend: str) -> None:
    """A teacher's, and all that comes with it: autograd does not keep them, and need not."""
    x = given(2, 5)
    with torch.inference_mode():
        there = Given(*(tensor.clone() for tensor in x))
    assert there.teacher.is_inference()
    leaf = x.logits.clone().requires_grad_()
    value = CALLS[name].ours(there._replace(logits=leaf), backend=backend)
    upstream = torch.rand(value.shape) + 0.5
    exact = x.logits.double().requires_grad_()
    (upstream * CALLS[name].definition(x._replace(logits=exact))).sum().backward()
    for _ in range(2):
        (got,) = torch.autograd.grad(value, leaf, upstream, retain_graph=True)
        torch.testing.assert_close(got.double(), exact.grad, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_and_normalizers_of_inference_mode(backend: str, reduction: str) -> None:
    x = given(2, 5)
    with torch.inference_mode():
        teacher, weight, normalizer = x.teacher.clone(), x.weight.clone(), torch.tensor(7.0)
    options = {"reduction": reduction, "backend": backend}
    loss = kk.forward_kl(x.logits.requires_grad_(), teacher, weight=weight, normalizer=normalizer, **options)
    top = kk.topk_divergence_loss(x.logits, x.ids, x.topk_logprobs, weight=weight, normalizer=normalizer, **options)
    (loss + top).sum().backward()
    exact = x.logits.detach().double().requires_grad_()
    q, p = exact.log_softmax(-1), x.teacher.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1) * x.weight
    kl = kl + bucket(x._replace(logits=exact), x.ids) * x.weight
    (kl.sum() / (7 if reduction == "mean" else 1)).backward()
    torch.testing.assert_close(x.logits.grad.double(), exact.grad, rtol=2e-5, atol=2e-5)
