"""What is tested (read off the registry) and how close is close enough (the numerical contract)."""

from __future__ import annotations

import os
from typing import Any

import oracle
import torch
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.divergences import Statistic
from kldiv_kernels.registry import STATISTICS

# Under TRITON_INTERPRET=1 the suite is about the Triton backend alone: a process has its kernels compiled or
# interpreted, not both. Under KLDIV_CUDA_HOST=1 it is about the cuda backend, on the model of a GPU in cuda_host/.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA_ON_HOST = os.environ.get("KLDIV_CUDA_HOST") == "1"
BACKENDS = [name for name in ("cpu", "reference") if kk.backends()[name] == "available"]
if INTERPRETED or CUDA_ON_HOST:
    BACKENDS = ["triton" if INTERPRETED else "cuda"]
BACKEND_DTYPES = [
    (backend, dtype)
    for backend in BACKENDS
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if dtype != torch.float64 or backend == "reference"
]
STATISTIC_NAMES = list(STATISTICS)
DIVERGENCES = [name for name, statistic in STATISTICS.items() if statistic.is_divergence]

ALPHAS = (0.5, 0.3, 0.0, 1.0, 1.7, -0.5)
BETAS = (0.5, 0.9, 0.0, 1.0)
ALPHA_BETAS = ((0.5, 0.5), (0.3, 0.9), (1.7, -0.3), (-0.3, 1.7))


def parameters(statistic: Statistic) -> list[tuple[float, float]]:
    """Values of (alpha, beta) that cover what the statistic allows, limits included."""
    if statistic.alpha and statistic.beta:
        return [(a, b) for a, b in ALPHA_BETAS if statistic.alpha.allows(a) and statistic.beta.allows(b)]
    if statistic.alpha:
        return [(a, 0.5) for a in ALPHAS if statistic.alpha.allows(a)]
    if statistic.beta:
        return [(0.5, b) for b in BETAS if statistic.beta.allows(b)]
    return [(0.5, 0.5)]


def taken(name: str, alpha: Any, beta: Any) -> dict[str, Any]:
    """Those of the two that a loss of this kind takes."""
    statistic = STATISTICS[name]
    return {key: x for key, x in (("alpha", alpha), ("beta", beta)) if getattr(statistic, key) is not None}


def with_parameters(names: list[str]) -> list[tuple[str, float, float]]:
    return [(name, a, b) for name in names for a, b in parameters(STATISTICS[name])]


def check_value(got: Tensor, expected: Tensor, logits_dtype: torch.dtype = torch.float32) -> None:
    """|error| ≤ 1e-5·max(1, |value|); infinities and NaN as they are (a value beyond float32 is infinite).

    A power sum of size e^x also carries the rounding of its exponent: three times half an ulp of x, 2e-7·x.
    """
    double = logits_dtype == torch.float64
    if got.dtype != torch.int64:
        assert got.dtype == (torch.float64 if double else torch.float32)
        expected = expected.to(got.dtype)
    assert got.shape == expected.shape
    got, expected = got.detach().double(), expected.double()
    size = expected.abs().clamp_min(1)
    bound = (1e-11 if double else 1e-5 + 2e-7 * size.log()) * size
    close = (got - expected).abs() <= bound
    fine = torch.where(expected.isfinite(), close, (got == expected) | (got.isnan() & expected.isnan()))
    assert fine.all(), f"got {got[~fine][:4].tolist()}, expected {expected[~fine][:4].tolist()}"


def check_gradient(got: Tensor, expected: Tensor, floor: Tensor) -> None:
    """|error| ≤ one rounding of the dtype + 1e-5 of the row's largest gradient + 5e-7 of its floor (see `Expected`).

    5e-7 is half an ulp of a log-probability between 8 and 16: every probability and power inherits it.
    """
    assert expected.isfinite().all(), "the oracle has no finite gradient here"
    assert got.shape == expected.shape
    if expected.numel() == 0:
        return
    double = got.dtype == torch.float64
    limits = torch.finfo(got.dtype)
    rounding = expected.abs() * limits.eps / 2 + limits.smallest_normal * limits.eps / 2
    largest = expected.abs().amax(-1, keepdim=True)
    relative, smallest = (1e-11, 1e-13) if double else (1e-5 + 2e-7 * largest.clamp_min(1).log(), 5e-7)
    bound = 1.01 * rounding + relative * largest + smallest * floor
    # Beyond the dtype's range (float16) a gradient is infinite.
    error = (got.detach().double() - expected.to(got.dtype).double().where(expected.abs() > limits.max, expected)).abs()
    error = torch.where(got == expected.to(got.dtype), 0.0, error)
    worst = int((error / bound.clamp_min(1e-300)).argmax())
    at = [x.expand_as(error).reshape(-1)[worst].item() for x in (got, expected, bound)]
    assert (error <= bound).all(), (
        f"{int((error > bound).sum())} of {error.numel()} elements; "
        f"the worst: got {at[0]:.9g}, expected {at[1]:.9g}, allowed {at[2]:.3g}"
    )


def on(device: str, tensor: Tensor) -> Tensor:
    """The tensor on that device, strides included: `.to(device)` closes the gaps of a view."""
    if device == "cpu":
        return tensor
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    storage = tensor.detach().as_strided((elements,), (1,), 0).to(device)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def check_statistic(
    name: str,
    logits: Tensor,
    reference: Tensor,
    labels: Tensor | None = None,
    *,
    backend: str,
    device: str = "cpu",
    **options: float | Tensor,
) -> None:
    """The statistic `name` of these logits and its gradients to both sides, with random coefficients.

    The tensors are on the CPU, where the oracle reads them; `device` is where the backend gets them.
    """
    statistic = STATISTICS[name]
    student, teacher = (on(device, x.detach()).requires_grad_() for x in (logits, reference))
    there = {key: on(device, x) if isinstance(x, Tensor) else x for key, x in options.items()}
    given_labels = None if labels is None else on(device, labels)
    value = kk.token_stats(student, teacher, given_labels, stats=(name,), backend=backend, **there)[name]
    cotangent = (torch.rand(value.shape) + 0.5) * torch.randn(value.shape).sign()
    columns = options.pop("vocab_size", logits.shape[-1])
    expected = oracle.evaluate(
        name, logits[..., :columns], reference[..., :columns], labels, cotangent=cotangent, **options
    )
    check_value(value.cpu(), expected.value, logits.dtype)
    if not statistic.differentiable:
        assert not value.requires_grad
        return
    weighted = cotangent.to(value.device, value.dtype) * value
    ds, dt = torch.autograd.grad(weighted.sum(), [student, teacher], allow_unused=True)
    for got, side, floor, touched in (
        (ds, expected.student, expected.student_floor, statistic.student),
        (dt, expected.teacher, expected.teacher_floor, statistic.reference),
    ):
        if not touched:
            assert got is None or not got.any()
            continue
        assert got.dtype == logits.dtype
        got = got.cpu()
        check_gradient(got[..., :columns], side, floor)
        assert not got[..., columns:].any()
