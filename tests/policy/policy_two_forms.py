"""A policy loss whose gradient comes out of the pass over the logits, beside the composed form in float64."""

from __future__ import annotations

from typing import Any

import policy_oracle as oracle
import pytest
import torch
from checks import BACKENDS
from torch import Tensor

import kldiv_kernels as kk

ONE_READ_BACKENDS = [name for name in BACKENDS if name in ("cpu", "cuda")]
VOCAB = 136


def arguments_for(batch: oracle.Batch, **options: Any) -> dict[str, Any]:
    """Of policy_loss: float32 tensors for what the options ask for."""
    arguments: dict[str, Any] = {"mask": batch.mask}
    if options.pop("old", True):
        arguments["old_logprobs"] = batch.old.float()
    if options.pop("anchor", False):
        arguments["anchor_logprobs"] = (batch.old - 0.1).float()
    if options.pop("weights", False):
        arguments["token_weights"] = torch.rand(batch.mask.shape)
    if options.pop("sampling", False):
        arguments["sampling_logprobs"] = batch.sampling.float().masked_fill_(
            torch.rand(batch.mask.shape) < 0.1, torch.nan
        )
    if options.pop("kl", False):
        arguments |= {"reference_logprobs": batch.reference.float(), "kl_coef": 0.3}
    if options.pop("exact", False):
        arguments |= {"reference_logits": batch.reference_logits.float(), "kl_coef": 0.3}
    return arguments | options


def both(
    batch: oracle.Batch, backend: str, dtype: torch.dtype, **options: Any
) -> tuple[kk.PolicyLoss, Tensor, kk.PolicyLoss, Tensor]:
    """The loss and its leaf in the one-read form, and composed in float64 from the same logits."""
    logits = batch.logits.to(dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    arguments = arguments_for(batch, **options)
    advantages = batch.advantages.float()
    out = kk.policy_loss(logits, batch.token_ids, advantages, backend=backend, **_as(arguments, dtype))
    want = kk.policy_loss(
        exact, batch.token_ids, advantages, backend="reference", **_as(arguments, dtype, torch.float64)
    )
    return out, logits, want, exact


def _as(arguments: dict[str, Any], *dtypes: torch.dtype) -> dict[str, Any]:
    """Reference logits rounded to the first dtype, and then as the last."""
    if "reference_logits" not in arguments:
        return arguments
    reference = arguments["reference_logits"]
    for dtype in dtypes:
        reference = reference.to(dtype)
    return arguments | {"reference_logits": reference}


def check(out: kk.PolicyLoss, logits: Tensor, want: kk.PolicyLoss, exact: Tensor) -> None:
    assert out.loss.item() == pytest.approx(want.loss.item(), rel=1e-5, abs=1e-6)
    assert out.metrics.keys() == want.metrics.keys()
    for name, value in out.metrics.items():
        assert value.item() == pytest.approx(want.metrics[name].item(), rel=1e-4, abs=1e-5), name
    for name in ("per_token_loss", "logprob", "entropy"):
        got, wanted = getattr(out, name), getattr(want, name)
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=2e-5)
    # An upstream factor, and rows as large as each other: the gradient is relative to the largest of all.
    (got,), (wanted,) = torch.autograd.grad(3 * out.loss, logits), torch.autograd.grad(3 * want.loss, exact)
    largest = wanted.abs().max()
    assert largest > 1e-3
    rounding = 0 if logits.dtype == torch.float32 else 2 * torch.finfo(logits.dtype).eps
    assert ((got.double() - wanted).abs() <= 2e-5 * largest + rounding * wanted.abs()).all()
