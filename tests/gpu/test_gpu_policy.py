"""policy_loss on the device: the one-read kernels of its token-level losses, and the composed form, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import on
from setting import DEVICE, DTYPES, KERNELS, QUICK
from torch import Tensor

import kldiv_kernels as kk

# Two sweeps and one read on the cuda backend.
WIDTHS = (136,) if QUICK else (3000, 151_936)
SEQUENCES, TOKENS = (2, 3) if QUICK else (3, 5)
OPTIONS: dict[str, dict[str, Any]] = {
    "grpo": {"entropy_coef": 0.1},
    "two-sided": {"loss_type": "dapo", "delta": 1.3, "kl_coef": 0.3, "kl_bias_correction": True},
    "dual": {"loss_type": "dapo", "dual_clip": 1.2, "kl_coef": 0.3, "kl_estimator": "k3_plus"},
    "cispo": {"loss_type": "cispo", "kl_coef": 0.3, "kl_estimator": "k1"},
    "sapo": {"loss_type": "sapo", "kl_coef": 0.3, "kl_estimator": "abs"},
    "topr": {"loss_type": "topr", "importance_level": "token", "kl_coef": 0.3, "kl_estimator": "k2"},
    "dppo_tv": {"loss_type": "dppo_tv", "clip_high": 1e-6, "clip_low": 1e-6},
    "dppo_kl": {"loss_type": "dppo_kl", "clip_high": 1e-6, "clip_low": 1e-6},
    "gspo": {"loss_type": "gspo"},
}


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", KERNELS)
def test_policy_loss(backend: str, name: str, dtype: torch.dtype, columns: int) -> None:
    shape = (SEQUENCES, TOKENS)
    logits = (2 * torch.randn(*shape, columns)).to(dtype)
    token_ids, mask = torch.randint(columns, shape), torch.rand(shape) < 0.8
    mask[0, 0] = True
    now = logits.double().log_softmax(-1).gather(-1, token_ids[..., None])[..., 0].float()
    tensors = {"mask": mask, "old_logprobs": now + 0.3 * torch.randn(shape)}
    if "kl_coef" in OPTIONS[name]:
        tensors["reference_logprobs"] = now + 0.4 * torch.randn(shape)
    advantages = torch.randn(shape)

    def gradient(leaf: Tensor, device: str, backend: str) -> tuple[kk.PolicyLoss, Tensor]:
        there = {key: on(device, x) for key, x in tensors.items()}
        out = kk.policy_loss(
            leaf, on(device, token_ids), on(device, advantages), backend=backend, **there, **OPTIONS[name]
        )  # fmt: skip
        return out, torch.autograd.grad(out.loss, leaf)[0].cpu()

    out, got = gradient(on(DEVICE, logits).requires_grad_(), DEVICE, backend)
    expected, wanted = gradient(logits.double().requires_grad_(), "cpu", "reference")
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-4, abs=1e-6)
    for metric, value in out.metrics.items():
        assert value.item() == pytest.approx(expected.metrics[metric].item(), rel=1e-4, abs=1e-5), metric
    largest = wanted.abs().max()
    rounding = 0 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert largest > 0
    assert ((got.double() - wanted).abs() <= 3e-5 * largest + rounding * wanted.abs()).all()
    assert not got[~mask].any()
