"""Golden values, computed once in float64 elsewhere, of one row of four logits: values and student gradients."""

from __future__ import annotations

import pytest
import torch
from checks import BACKEND_DTYPES
from torch import Tensor

import kldiv_kernels as kk

STUDENT = [2.0, 0.5, -1.0, 0.0]
TEACHER = [1.0, 1.5, -0.5, 0.0]
LABEL = 1
FORWARD_KL_GRADIENT = [0.4014323084, -0.3504621521, -0.0335192609, -0.0174508954]
STATISTIC_VALUES = [
    ("logprob", {}, -1.8423495824, None),
    ("reference_logprob", {}, -0.6754902622, None),
    ("entropy", {}, 0.8782811753, [-0.3805649828, 0.1527515387, 0.0871141654, 0.1406992786]),
    ("reference_entropy", {}, 1.1378988823, None),
    ("forward_kl", {}, 0.4015350945, FORWARD_KL_GRADIENT),
    ("reverse_kl", {}, 0.3671189964, [0.3309219614, -0.2430507488, -0.0365550558, -0.0513161568]),
    ("js", {"beta": 0.9}, 0.0328760155, [0.0295415458, -0.0220295810, -0.0032236413, -0.0042883235]),
    ("js", {"beta": 0.5}, 0.0921461451, [0.0839265538, -0.0665934052, -0.0085528129, -0.0087803358]),
    ("cross_entropy", {}, 1.5394339768, FORWARD_KL_GRADIENT),
    # χ²(q‖p) of the papers is Σ (q−p)²/p
    ("reverse_chi2", {}, 0.7824190426, [0.7358248545, -0.4661683575, -0.0897350568, -0.1799214402]),
]
TEMPERED_FORWARD_KL = (0.3555114245, [0.3745644262, -0.3057786933, -0.0646494437, -0.0041362892])


def _rows(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.tensor([STUDENT], dtype=dtype, requires_grad=True), torch.tensor([TEACHER], dtype=dtype)


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-10 if dtype == torch.float64 else 1e-6


def _close(got: Tensor, expected: list[float], dtype: torch.dtype) -> None:
    # The golden numbers have ten decimals; a half-precision gradient is rounded once.
    rounding = 0 if dtype in (torch.float32, torch.float64) else torch.finfo(dtype).eps / 2
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert ((got.double() - wanted).abs() <= _tolerance(dtype) + rounding * wanted.abs()).all(), f"got {got.tolist()}"


@pytest.mark.parametrize(("name", "options", "value", "gradient"), STATISTIC_VALUES)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES, ids=str)
def test_statistic(
    name: str, options: dict[str, float], value: float, gradient: list[float] | None, backend: str, dtype: torch.dtype
) -> None:
    logits, reference = _rows(dtype)
    got = kk.token_stats(logits, reference, torch.tensor([LABEL]), stats=[name], backend=backend, **options)[name]
    assert got.item() == pytest.approx(value, abs=_tolerance(dtype))
    if gradient is not None:
        got.sum().backward()
        _close(logits.grad[0], gradient, dtype)


@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES, ids=str)
def test_temperature_squared(backend: str, dtype: torch.dtype) -> None:
    logits, reference = _rows(dtype)
    value, gradient = TEMPERED_FORWARD_KL
    loss = kk.forward_kl(logits, reference, temperature=2.0, temperature_squared=True, backend=backend)
    loss.backward()
    assert loss.item() == pytest.approx(value, abs=_tolerance(dtype))
    _close(logits.grad[0], gradient, dtype)
