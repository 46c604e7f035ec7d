"""`in_place=True`: what autograd and the memory see of it, and where it is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import BACKENDS, CUDA_ON_HOST, INTERPRETED
from torch import Tensor

import kldiv_kernels as kk

V = 136


def some(*shape: int) -> Tensor:
    return 2 * torch.randn(shape)


@pytest.mark.parametrize("backend", BACKENDS)
def test_student_and_teacher_in_one_tensor(backend: str) -> None:
    """Beside one another they are two tensors; a common element is refused, and then nothing has changed."""
    data = some(6, 2 * V)
    apart = {
        "above": lambda x: (x.view(12, V)[:6], x.view(12, V)[6:]), "chunks": lambda x: x.view(12, V).chunk(2),
    }  # fmt: skip
    between = {
        "beside": lambda x: (x[:, :V], x[:, V:]), "the other way": lambda x: (x[:, V:], x[:, :V]),
        "in turn": lambda x: (x[::2, :V], x[1::2, V:]), "rows in turn": lambda x: (x[::2], x[1::2]),
    }  # fmt: skip
    common = {
        "the same": lambda x: (x, x), "detached": lambda x: (x, x.detach()),
        "rows": lambda x: (x[:4], x[2:]), "a column": lambda x: (x[:, :V], x[:, V - 1 : -1]),
        "one row": lambda x: (x, x[3:4].expand(6, -1)), "transposed": lambda x: (x[:, :6], x[:, :6].view(6, 6)),
    }  # fmt: skip
    for two in [*apart.values(), *({} if backend in ("cuda", "triton") else between).values()]:
        for follows in (False,) if backend == "cuda" else (True, False):
            student, teacher = (x.clone().requires_grad_() for x in two(data))
            kk.jeffreys(student, teacher if follows else teacher.detach(), backend=backend).backward()
            leaf = data.clone().requires_grad_()
            base = leaf * 1
            s, t = two(base)
            kk.jeffreys(s, t if follows else t.detach(), in_place=True, backend=backend).backward()
            in_base, in_leaf = two(base.detach()), two(leaf.grad)
            assert torch.equal(in_base[0], student.grad)
            assert torch.equal(in_base[1], teacher)
            assert torch.equal(in_leaf[0], student.grad)
            assert torch.equal(in_leaf[1], teacher.grad) if follows else not in_leaf[1].any()
    for two in common.values():
        base = data.clone().requires_grad_() * 1
        with pytest.raises(ValueError, match="in_place is True, but reference_logits are the same memory"):
            kk.jeffreys(*two(base), in_place=True, backend=backend)
        assert torch.equal(base, data)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_users(backend: str) -> None:
    """Who kept the logits for a backward pass is refused it; who kept nothing of them has its gradient."""
    data, teacher = some(5, V), some(5, V)
    taken_by = {"in_place": True, "backend": backend}
    users: dict[str, Callable[[Tensor], Tensor]] = {
        "sine": lambda x: x.sin().sum(),
        "loss of each token": lambda x: kk.tvd(x, teacher, reduction="none", backend=backend).sum(),
        "a view": lambda x: x[1:].square().sum(),
    }
    for user in users.values():
        logits = data.clone().requires_grad_() * 1
        other, loss = user(logits), kk.forward_kl(logits, teacher, **taken_by)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (other + loss).backward()
    logits = data.clone().requires_grad_() * 1
    losses = [kk.forward_kl(logits, teacher, **taken_by) for _ in range(2)]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses[0].backward()
    # What is done to the logits afterwards is done to the gradient.
    logits = data.clone().requires_grad_() * 1
    loss = kk.forward_kl(logits, teacher, **taken_by)
    logits.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    # The operation before keeps what it returns.
    logits = data.clone().requires_grad_().exp()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kk.forward_kl(logits, teacher, **taken_by).backward()

    leaf, exact = data.clone().requires_grad_(), data.clone().requires_grad_()
    logits = leaf * 1
    one_read, total = kk.tvd(logits, teacher, backend=backend), logits.sum() / 100
    (one_read + kk.forward_kl(logits, teacher, **taken_by) + total).backward()
    (kk.tvd(exact, teacher, backend=backend) + kk.forward_kl(exact, teacher, backend=backend)).backward()
    assert torch.allclose(leaf.grad, exact.grad + 0.01, rtol=1e-5, atol=1e-7)
    logits = leaf * 1
    loss = kk.forward_kl(logits, teacher, **taken_by)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss, leaf, create_graph=True)
    loss.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_gradient_of_the_logits(backend: str) -> None:
    """They stay as they are, whatever they are."""
    data, teacher = some(5, V), some(5, V)
    follows = teacher.clone().requires_grad_()
    with torch.no_grad():
        losses = [kk.js_divergence(x, teacher, in_place=True, backend=backend) for x in (data, data.requires_grad_())]
    data = data.detach()
    before = data.clone()
    losses.append(kk.js_divergence(data, teacher, in_place=True, backend=backend))
    losses.append(kk.js_divergence(data, follows, in_place=True, backend=backend))
    losses[-1].backward()
    assert follows.grad.any()
    kk.topk_divergence_loss(data, torch.arange(5)[:, None], -torch.ones(5, 1), in_place=True, backend=backend)
    kk.policy_loss(data, torch.arange(5), torch.ones(5), loss_type="dapo", in_place=True, backend=backend)
    assert all(loss.item() == losses[0].item() for loss in losses)
    assert torch.equal(data, before)
    assert data._version == 0


def refusals(backend: str) -> dict[str, tuple[Callable[[], Any], str]]:
    """What is refused, and the reason."""
    options: dict[str, Any] = {"in_place": True, "backend": backend}
    data, teacher = some(5, V), some(5, V)
    leaf = data.clone().requires_grad_()
    ids = torch.zeros(5, dtype=torch.int64)

    def logits(*shape: int) -> Tensor:
        return some(*(shape or (5, V))).requires_grad_() * 1

    def policy(x: Tensor | None = None, **more: Any) -> kk.PolicyLoss:
        return kk.policy_loss(logits(1, 5, V) if x is None else x, ids[None], torch.ones(1), **options, **more)

    def topk(**more: Any) -> Tensor:
        return kk.topk_divergence_loss(logits(), ids[:, None], torch.zeros(5, 1), **options, **more)

    def unfollowed() -> Tensor:
        base = data.clone()
        with torch.no_grad():
            return (base.requires_grad_() * 1)[1:].requires_grad_()

    own = "log-probabilities first"
    return {
        "leaf": (lambda: kk.tvd(leaf, teacher, **options), "logits are a leaf"),
        "view of a leaf": (lambda: kk.tvd(leaf[1:], teacher[1:], **options), "logits are a leaf"),
        "leaf that is a view": (
            lambda: kk.tvd(data.clone()[1:].requires_grad_(), teacher[1:], **options), "logits are a leaf"
        ),
        "leaf that is a view of no leaf": (
            lambda: kk.tvd(unfollowed(), teacher[1:], **options), "logits are a leaf"
        ),
        "detached": (lambda: kk.tvd(logits().detach().requires_grad_(), teacher, **options), "logits are a leaf"),
        "expanded": (
            lambda: kk.tvd(logits(1, V).expand(5, V), teacher, **options), r"same memory \(an expanded view"
        ),
        "windows": (
            lambda: kk.tvd(logits(5 * V).unfold(0, V, 8)[:5], teacher, **options), r"same memory \(an expanded view"
        ),
        "no reduction": (lambda: kk.tvd(logits(), teacher, reduction="none", **options), "reduction is 'none'"),
        "weight": (
            lambda: kk.tvd(logits(), teacher, weight=torch.ones(5, requires_grad=True), **options),
            "weight requires grad",
        ),
        "float16": (lambda: kk.tvd(logits().half(), teacher.half(), **options), "float16 .* waits for the loss scale"),
        "float16 reference": (
            lambda: kk.tvd(logits(), teacher.half().requires_grad_(), **options), "waits for the loss scale"
        ),
        "torch.func": (
            lambda: torch.func.grad(lambda x: kk.tvd(x * 1, teacher, **options))(data), "torch.func transforms no"
        ),
        "policy of sequences": (lambda: policy(loss_type="gspo"), "whole sequences"),
        "policy of tokens that are selected": (lambda: policy(entropy_quantile=0.5), "selected by what"),
        "policy of unknown old ones": (lambda: policy(sampling_logprobs=-torch.ones(1, 5)), own),
        "sampled KL": (lambda: policy(reference_logits=teacher[None], kl_coef=0.1), own),
        "gradient per token": (lambda: policy(per_token_gradient=True), "per_token_gradient is True"),
        "policy of a leaf": (lambda: policy(leaf[None]), "logits are a leaf"),
        "top-k per token": (lambda: topk(kind="js", beta=torch.full((5,), 0.5)), "one a token"),
        "raw sum": (lambda: topk(kind="jeffreys", tail="none"), own),
        "top-k, no reduction": (lambda: topk(reduction="none"), "reduction is 'none'"),
    }  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_refused(backend: str) -> None:
    for name, (call, reason) in refusals(backend).items():
        with pytest.raises(ValueError, match=rf"_loss: in_place is True, but .*{reason}.*; leave it out"):
            print(name, call())
    data, teacher = some(5, V), some(5, V)
    for wrong in (1, None, "yes", torch.tensor(True)):
        with pytest.raises(TypeError, match=r"divergence_loss: in_place is .*; expected True or False"):
            kk.divergence_loss(data, teacher, in_place=wrong, backend=backend)
        with pytest.raises(TypeError, match=r"policy_loss: in_place is .*; expected True or False"):
            kk.policy_loss(data, torch.zeros(5).long(), torch.ones(5), in_place=wrong, backend=backend)
        with pytest.raises(TypeError, match=r"topk_divergence_loss: in_place is .*; expected True or False"):
            kk.topk_divergence_loss(
                data, torch.zeros(5, 1).long(), torch.zeros(5, 1), in_place=wrong, backend=backend
            )  # fmt: skip


@pytest.mark.skipif(CUDA_ON_HOST or INTERPRETED, reason="what is traced is the same")
def test_torch_compile() -> None:
    teacher = some(5, V)
    compiled = torch.compile(lambda x: kk.tvd(x * 1, teacher, in_place=True), backend="eager")
    with pytest.raises(ValueError, match=r"in_place is True, but torch.compile takes no function"):
        compiled(some(5, V).requires_grad_())


_PEAKS = """
import ctypes, gc, pathlib, sys, torch, kldiv_kernels as kk
status, forget = (pathlib.Path("/proc/self") / name for name in ("status", "clear_refs"))

class Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx, data):
        return data.clone()

    @staticmethod
    def backward(ctx, gradient):
        assert gradient[0, 0].any()

def size(field):
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(field))

def run(rows, in_place):
    data, teacher = (torch.randn(2, rows // 2, 151936, dtype=torch.bfloat16) for _ in range(2))
    logits = Head.apply(data.requires_grad_()).view(rows, 151936)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = size("VmRSS")
    forget.write_text("5")
    (2 * kk.js_divergence(logits, teacher.view(rows, 151936), in_place=in_place, backend="cpu")).backward()
    return (size("VmHWM") - before) / (2 * logits.numel())

for in_place in (False, True):
    run(4, in_place)
    print(run(512, in_place))
"""


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no backend here has the one-read form")
def test_memory() -> None:
    """The most that loss and backward take beside their inputs, in units of the logits, which are 156 MB."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", _PEAKS], capture_output=True, text=True, env=environment, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plain, in_place = map(float, done.stdout.split())
    assert 0.9 < plain < 1.2
    assert in_place < 0.1
