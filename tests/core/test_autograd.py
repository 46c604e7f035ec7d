"""Backward: the one-read form, upstream gradients, kept graphs, compiled graphs, and what is never written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checks import BACKENDS, DIVERGENCES, STATISTIC_NAMES, taken
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels import inputs, registry

DTYPES = [torch.float32, torch.bfloat16]


def _pair(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (3, 4, 97)) -> tuple[Tensor, Tensor]:
    return (2 * torch.randn(shape)).to(dtype).requires_grad_(), (2 * torch.randn(shape)).to(dtype).requires_grad_()


def _near(got: Tensor, wanted: Tensor, roundings: float = 1) -> bool:
    scale = wanted.abs().amax(-1, keepdim=True).double()
    bound = 2e-5 * scale + roundings * torch.finfo(wanted.dtype).eps * wanted.abs().double()
    return bool((got.double() - wanted.double()).abs().le(bound).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_read_form_equals_two_passes(kind: str, dtype: torch.dtype, backend: str) -> None:
    logits, reference = _pair(dtype)
    weight, mask = torch.rand(3, 4) + 0.5, torch.rand(3, 4) < 0.8
    options = {"mask": mask, "temperature": 1.5, "backend": backend, **taken(kind, 0.4, 0.3)}
    loss = kk.divergence_loss(logits, reference, kind, weight=weight, **options)
    one = torch.autograd.grad(loss, [logits, reference])
    per_token = kk.token_stats(logits, reference, stats=[kind], **options)[kind]
    composed = (weight * per_token).sum() / mask.sum()
    two = torch.autograd.grad(composed, [logits, reference])
    assert torch.allclose(loss, composed, rtol=1e-5)
    assert all(_near(a, b) and b.any() for a, b in zip(one, two, strict=True))
    assert not one[0][~mask].any()
    assert not one[1][~mask].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradient(reduction: str, dtype: torch.dtype, backend: str) -> None:
    logits, reference = _pair(dtype)

    def gradients(scale: float) -> tuple[Tensor, ...]:
        loss = kk.divergence_loss(logits, reference, "js", reduction=reduction, backend=backend)
        return torch.autograd.grad(scale * loss, [logits, reference])

    plain = gradients(1.0)
    for scale in (1 / 3, -7.0, 0.0):
        for got, base in zip(gradients(scale), plain, strict=True):
            assert torch.equal(got, (scale * base.float()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kept_graph_gives_the_same_gradient_again(dtype: torch.dtype, backend: str) -> None:
    logits, reference = _pair(dtype)
    loss = kk.reverse_kl(logits, reference, backend=backend) / 3
    kept = [torch.autograd.grad(loss, [logits, reference], retain_graph=True) for _ in range(2)]
    last = torch.autograd.grad(loss, [logits, reference])
    for again in (kept[1], last):
        assert all(torch.equal(a, b) for a, b in zip(kept[0], again, strict=True))
    stats = kk.token_stats(logits, stats=["entropy"], backend=backend).entropy.sum()
    first = torch.autograd.grad(stats, logits, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(stats, logits)[0], first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_accumulate_in_leaves(backend: str) -> None:
    """Backward twice through two losses adds up; the first gradient is not overwritten by the second."""
    logits, reference = _pair()
    for _ in range(2):
        kk.forward_kl(logits, reference.detach(), backend=backend).backward()
    (once,) = torch.autograd.grad(kk.forward_kl(logits, reference.detach(), backend=backend), logits)
    assert torch.allclose(logits.grad, 2 * once)


@pytest.mark.parametrize("form", ["one read", "two passes"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_raises(form: str, backend: str) -> None:
    logits, reference = _pair()
    if form == "one read":
        loss = kk.forward_kl(logits, reference, backend=backend)
    else:
        loss = kk.token_stats(logits, reference, stats=["forward_kl"], backend=backend).forward_kl.sum()

    def twice() -> None:
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        gradient.square().sum().backward()

    with pytest.raises(RuntimeError, match="double backward is not supported"):
        twice()


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_may_require_grad(backend: str) -> None:
    logits, reference = _pair()
    weight = torch.rand(3, 4, requires_grad=True)
    kk.jeffreys(logits, reference, weight=weight, backend=backend).backward()
    value = kk.token_stats(logits, reference, stats=["jeffreys"], backend=backend).jeffreys
    assert torch.allclose(weight.grad, value.detach() / 12, rtol=1e-5)
    fixed = torch.autograd.grad(kk.jeffreys(logits, reference, weight=weight.detach(), backend=backend), logits)[0]
    assert _near(logits.grad, fixed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_teacher(backend: str) -> None:
    logits, reference = _pair()
    both = torch.autograd.grad(kk.skew_kl(logits, reference, backend=backend), [logits, reference])
    loss = kk.skew_kl(logits.detach(), reference, backend=backend)
    assert _near(torch.autograd.grad(loss, reference)[0], both[1])
    assert not torch.allclose(both[0], both[1], rtol=0.1)
    stats = kk.token_stats(logits.detach(), reference, stats=["skew_kl"], backend=backend).skew_kl.mean()
    assert _near(torch.autograd.grad(stats, reference)[0], both[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_asked_for(backend: str) -> None:
    logits, reference = _pair()
    with torch.no_grad():
        quiet = kk.forward_kl(logits, reference, backend=backend)
        stats = kk.token_stats(logits, backend=backend, stats=["entropy"])
    assert not quiet.requires_grad
    assert not stats.entropy.requires_grad
    assert not kk.forward_kl(logits.detach(), reference.detach(), backend=backend).requires_grad
    assert torch.allclose(quiet, kk.forward_kl(logits, reference, backend=backend), rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_of_the_caller_is_written(backend: str) -> None:
    logits, reference = _pair()
    labels, mask = torch.randint(97, (3, 4)), torch.rand(3, 4) < 0.7
    given = [logits, reference, labels, mask, torch.rand(3, 4), torch.randint(-1, 97, (3, 4)), torch.rand(3, 4) + 0.5]
    before = [x.detach().clone() for x in given]
    weight, exclude, temperature = given[4:]
    stats = kk.token_stats(
        logits, reference, labels, stats=STATISTIC_NAMES, mask=mask, exclude=exclude, temperature=temperature,
        backend=backend,
    )  # fmt: skip
    sum(x.sum() for x in stats.values()).backward()
    loss = kk.divergence_loss(
        logits, reference, "js", weight=weight, labels=labels, mask=mask, exclude=exclude, temperature=temperature,
        temperature_squared=True, backend=backend,
    )  # fmt: skip
    upstream = torch.tensor(0.25)
    loss.backward(upstream)
    assert upstream == 0.25
    for now, was in zip(given, before, strict=True):
        assert torch.equal(now.detach(), was)


def _call(backend: str, stats: list[str], labels: Tensor | None, teacher: bool) -> tuple[object, ...]:
    logits, reference = _pair(shape=(4, 33))
    call = inputs.prepare(
        "test", logits, reference.requires_grad_(teacher), labels,
        stats=[registry.get(name) for name in stats], temperature=torch.rand(4) + 0.5, reference_temperature=None,
        alpha=0.5, beta=0.5, mask=torch.tensor([1, 1, 0, 1]), ignore_index=-100, vocab_size=31,
        exclude=torch.tensor([-1, 3, 4, 5]),
    )  # fmt: skip
    return inputs.operator_arguments(call, backend)


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_pass_opcheck(backend: str, teacher: bool) -> None:
    ops = torch.ops.kldiv_kernels
    labels = torch.randint(6, 31, (4,))
    stats = ["forward_kl", "logprob", "entropy"]
    arguments = _call(backend, stats, labels, teacher)
    torch.library.opcheck(ops.statistics.default, (*arguments, True))
    torch.library.opcheck(ops.loss.default, (*_call(backend, ["js"], None, teacher), torch.rand(1, 4), True, teacher))
    detached = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
    _, state = ops.statistics(*detached, True)
    torch.library.opcheck(ops.statistics_backward.default, (*detached, state, torch.rand(3, 4), True, teacher))


def _policy_like(logits: Tensor, reference: Tensor, labels: Tensor, backend: str) -> Tensor:
    stats = kk.token_stats(logits, reference, labels, stats=["logprob", "entropy", "reverse_kl"], backend=backend)
    return (-stats.logprob * 0.5 - 0.01 * stats.entropy + 0.1 * stats.reverse_kl.square()).mean()


def _distillation(logits: Tensor, reference: Tensor, labels: Tensor, backend: str) -> Tensor:
    return 2 * kk.divergence_loss(logits, reference, "js", labels=labels, temperature=2.0, backend=backend)


@pytest.mark.parametrize("function", [_policy_like, _distillation])
@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_compile(function: Callable[..., Tensor], backend: str) -> None:
    logits, reference = _pair(torch.bfloat16, (2, 5, 65))
    labels = torch.randint(65, (2, 5))
    labels[0, 0] = -100
    eager = function(logits, reference, labels, backend)
    wanted = torch.autograd.grad(eager, [logits, reference])
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True)
    for _ in range(2):
        loss = compiled(logits, reference, labels, backend)
        got = torch.autograd.grad(loss, [logits, reference])
        assert torch.allclose(loss, eager, rtol=1e-5)
        assert all(_near(a, b) for a, b in zip(got, wanted, strict=True))


PEAK = """
import sys, torch, kldiv_kernels as kk
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
def step(x, t):
    if sys.argv[1] == "loss":
        kk.forward_kl(x, t, backend="cpu").backward()
    else:
        stats = kk.token_stats(x, t, torch.zeros(x.shape[0], dtype=torch.int64),
                               stats=["logprob", "entropy", "js"], backend="cpu")
        (stats.logprob + stats.entropy * stats.js).mean().backward()
step(torch.randn(4, 64).bfloat16().requires_grad_(), torch.randn(4, 64).bfloat16())
x = torch.zeros(512, 151_936, dtype=torch.bfloat16).normal_().requires_grad_()
t = torch.zeros(512, 151_936, dtype=torch.bfloat16).normal_()
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
step(x, t)
print((status("VmHWM") - before) / (x.numel() * x.element_size()))
"""


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled part")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("form", ["loss", "statistics"])
def test_the_gradient_is_the_only_large_allocation(form: str) -> None:
    out = subprocess.run([sys.executable, "-c", PEAK, form], capture_output=True, text=True, check=True)
    assert 0.9 < float(out.stdout) < 1.3, "peak extra memory in units of the logits' gradient"
