"""A top-k divergence whose gradient comes out of the pass over the logits, beside the composed form in float64."""

from __future__ import annotations

from typing import Any

import torch
from checks import BACKENDS
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.backends import OneReadTopK, get

ONE_READ_BACKENDS = [name for name in BACKENDS if isinstance(get(name), OneReadTopK)]
TAILS = ["bucket", "renormalize", "renormalize_teacher"]
N, V, K = 6, 136, 7


def some_batch(dtype: torch.dtype = torch.float32, rows: int = N, columns: int = V, k: int = K) -> dict[str, Tensor]:
    """Student logits, and of a teacher nearby k tokens in no order; one row has one token less."""
    logits = (2 * torch.randn(rows, columns)).to(dtype)
    teacher = (logits.float() + torch.randn(rows, columns)).log_softmax(-1)
    ids = teacher.topk(k, dim=-1).indices
    ids = ids.gather(1, torch.rand(ids.shape).argsort(1))
    logprobs = teacher.gather(1, ids)
    if k > 1:
        ids[1, 0] = -1
    return {"logits": logits, "topk_ids": ids, "topk_logprobs": logprobs}


def gradient_of(loss: Tensor, logits: Tensor) -> Tensor:
    """Of three times the loss: a factor that comes from above."""
    (gradient,) = torch.autograd.grad(3 * loss, logits)
    return gradient


def _tokens(**options: Any) -> float:
    valid = options.get("mask", torch.ones(N)) != 0
    if "labels" in options:
        valid &= options["labels"] != -100
    return float(options.get("normalizer", valid.sum()))


def check(batch: dict[str, Tensor], backend: str, passes: list[str], form: str = "topk_loss", **options: Any) -> None:
    logits = batch["logits"].detach().requires_grad_()
    exact = batch["logits"].detach().double().requires_grad_()
    passes.clear()
    got = kk.topk_divergence_loss(**{**batch, "logits": logits}, backend=backend, **options)
    assert passes == [form]
    # Not reduced, it is composed.
    reduction = options.pop("reduction", "mean")
    each = kk.topk_divergence_loss(**{**batch, "logits": exact}, backend="reference", **options, reduction="none")
    wanted = each.sum() / (1 if reduction == "sum" else _tokens(**options))
    assert torch.allclose(got.double(), wanted.double(), rtol=2e-5, atol=2e-6)
    if wanted.isinf():
        # A teacher without mass on the rest. What each column's gradient is then is the composed form's affair.
        each = kk.topk_divergence_loss(**{**batch, "logits": logits}, backend=backend, **options, reduction="none")
        assert torch.equal(gradient_of(got, logits).isfinite(), gradient_of(each.sum(), logits).isfinite())
        return
    mine, theirs = gradient_of(got, logits), gradient_of(wanted, exact)
    assert mine.dtype == logits.dtype
    largest = theirs.abs().amax(-1, keepdim=True)
    assert (largest > 0).any() or wanted == 0 or options.get("alpha") == 1
    rounding = 0 if logits.dtype == torch.float32 else torch.finfo(logits.dtype).eps
    assert ((mine.double() - theirs).abs() <= 3e-5 * largest + 1e-6 + rounding * theirs.abs()).all()


OPTIONS: dict[str, dict[str, Any]] = {
    "sum": {"reduction": "sum"},
    "normalizer": {"normalizer": torch.tensor(17.0)},
    "weight": {"weight": torch.tensor([1.0, 0.0, -2.0, 0.5, 3.0, 1.0])},
    "mask": {"mask": torch.tensor([1, 0, 1, 1, 0, 1])},
    "labels": {"labels": torch.tensor([3, -100, 1, 1, 2, -100])},
    "temperatures": {"temperature": torch.linspace(0.5, 2, N), "temperature_squared": True},
    "vocabulary": {"vocab_size": 120},
    "tail": {"tail_logprob": torch.full((N,), 0.3).log()},
}
