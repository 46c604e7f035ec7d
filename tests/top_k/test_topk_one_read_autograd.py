"""Top-k divergences read once: which calls are, and what autograd, torch.library and torch.compile see of them."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from checks import BACKENDS, CUDA_ON_HOST
from topk_two_forms import ONE_READ_BACKENDS, OPTIONS, K, N, check, gradient_of, some_batch
from torch import Tensor

import kldiv_kernels as kk


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "none"}, {"tail": "none", "kind": "jeffreys"},
        {"kind": "js", "beta": torch.full((N,), 0.3)}, {"kind": "renyi", "alpha": torch.full((N,), 0.3)},
        {"normalizer": torch.tensor(3.0, requires_grad=True)},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_what_takes_two_passes(backend: str, options: dict[str, Any], passes: list[str]) -> None:
    batch = some_batch()
    logits = batch["logits"].requires_grad_()
    loss = kk.topk_divergence_loss(**batch, backend=backend, **options)
    assert passes[0] == "statistics"
    assert gradient_of(loss.sum(), logits).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["mean", *OPTIONS])
@pytest.mark.parametrize("kind", ["forward_kl", "cross_entropy"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_whose_gradient_is_known_beforehand(
    backend: str, kind: str, name: str, dtype: torch.dtype, passes: list[str]
) -> None:
    if name == "tail":
        pytest.skip("a raw sum has none")
    batch = some_batch(dtype)
    if name == "vocabulary":
        batch["topk_ids"] = torch.stack([torch.randperm(120)[:K] for _ in range(N)])
    batch["topk_logprobs"][0, 2] = -torch.inf
    batch["logits"][0, batch["topk_ids"][0, 2]] = -torch.inf
    check(batch, backend, passes, "loss", kind=kind, tail="none", **OPTIONS.get(name, {}))


@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_float16_waits_for_the_loss_scale(backend: str, passes: list[str]) -> None:
    """A gradient below float16's numbers, until it is scaled."""
    batch = some_batch(torch.float16)
    logits = batch["logits"].requires_grad_()
    exact = logits.detach().double().requires_grad_()
    loss = kk.topk_divergence_loss(**batch, normalizer=1e8, backend=backend)
    assert "topk_loss" not in passes
    wanted = kk.topk_divergence_loss(**{**batch, "logits": exact}, normalizer=1e8, backend="reference")
    mine, theirs = gradient_of(2**20 * loss, logits), gradient_of(2**20 * wanted, exact)
    assert (mine.double() - theirs).abs().max() <= 2e-3 * theirs.abs().max()
    assert theirs.any()


@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_without_gradient_there_is_none(backend: str, passes: list[str]) -> None:
    assert not kk.topk_divergence_loss(**some_batch(), backend=backend).requires_grad
    assert "topk_loss" not in passes


@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_the_logits_are_not_kept(backend: str) -> None:
    batch = some_batch()
    leaf = batch["logits"].requires_grad_()
    logits = leaf * 1
    alive = weakref.ref(logits)
    loss = kk.topk_divergence_loss(logits, batch["topk_ids"], batch["topk_logprobs"], backend=backend)
    del logits
    gc.collect()
    assert alive() is None
    assert gradient_of(loss, leaf).any()


@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_a_kept_graph_gives_the_same_gradient_again(backend: str) -> None:
    batch = some_batch()
    logits = batch["logits"].requires_grad_()
    loss = kk.topk_divergence_loss(**batch, backend=backend) / 3
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(kk.topk_divergence_loss(**batch, backend=backend), logits, create_graph=True)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_operator(backend: str, tail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema and fake, as torch.library checks them."""
    calls: list[tuple[Any, ...]] = []
    real = torch.ops.kldiv_kernels.topk
    monkeypatch.setattr(
        torch.ops.kldiv_kernels, "topk", lambda *arguments: (calls.append(arguments), real(*arguments))[1]
    )
    batch = some_batch()
    batch["logits"].requires_grad_()
    kk.topk_divergence_loss(**batch, tail=tail, backend=backend)
    monkeypatch.undo()
    torch.library.opcheck(real.default, calls[0])


@pytest.mark.skipif(CUDA_ON_HOST, reason="the operators are the same")
@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_torch_compile(backend: str) -> None:
    batch = some_batch()
    logits = batch.pop("logits").requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return kk.topk_divergence_loss(x, **batch, kind="js", backend=backend)

    eager = gradient_of(loss(logits), logits)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(logits)
    assert torch.allclose(gradient_of(compiled, logits), eager, rtol=1e-6, atol=1e-9)
