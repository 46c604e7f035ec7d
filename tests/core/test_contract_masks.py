"""The numerical contract where columns are masked by large negative numbers, which are logits like any other."""

from __future__ import annotations

import oracle
import pytest
import torch
from checks import (
    BACKENDS,
    DIVERGENCES,
    STATISTIC_NAMES,
    check_gradient,
    check_value,
)
from infinities import WIDE_ALPHA_BETAS
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.registry import STATISTICS


def _pair(*shape: int) -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(shape), 3 * torch.randn(shape)


def _stats(name: str, student: Tensor, teacher: Tensor, backend: str, **options: float | Tensor) -> Tensor:
    labels = options.pop("labels", None)
    labels = torch.ones(student.shape[:-1], dtype=torch.int64) if labels is None else labels
    return kk.token_stats(student, teacher, labels, stats=[name], backend=backend, **options)[name]


@pytest.mark.parametrize("fill", ["-1e11", "finfo.min"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", STATISTIC_NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_by_large_negatives(name: str, dtype: torch.dtype, fill: str, backend: str) -> None:
    """Columns at −1e11 or the dtype's lowest in both rows contribute nothing, in value and in gradient."""
    lowest = torch.finfo(dtype).min
    fill_value = lowest if fill == "finfo.min" else max(-1e11, lowest)
    logits, reference = (x.to(dtype) for x in _pair(3, 210))
    logits[:, 100:] = reference[:, 100:] = fill_value
    labels = torch.tensor([4, 5, 6])
    student, teacher = logits.clone().requires_grad_(), reference.clone().requires_grad_()
    value = _stats(name, student, teacher, backend, labels=labels, temperature=0.5)
    expected = oracle.evaluate(name, logits[:, :100], reference[:, :100], labels, temperature=0.5)
    check_value(value, expected.value)
    if STATISTICS[name].differentiable:
        value.sum().backward()
    for got, side, floor in (
        (student.grad, expected.student, expected.student_floor),
        (teacher.grad, expected.teacher, expected.teacher_floor),
    ):
        if got is not None:
            check_gradient(got[:, :100], side, floor)
            assert not got[:, 100:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_under_negative_powers(backend: str) -> None:
    """A power of −1e4 in both rows counts for nothing; in one row it is beyond float32, and the gradient has a sign."""
    for alpha, beta in WIDE_ALPHA_BETAS:
        options = {"alpha": alpha, "beta": beta}
        logits, reference = _pair(3, 210)
        logits[:, 100:] = reference[:, 100:] = -1e4
        logits[2] = reference[2]
        student, teacher = logits.clone().requires_grad_(), reference.clone().requires_grad_()
        value = _stats("alpha_beta", student, teacher, backend, **options)
        value.sum().backward()
        expected = oracle.evaluate("alpha_beta", logits[:, :100], reference[:, :100], **options)
        check_value(value, expected.value)
        check_gradient(student.grad[:2, :100], expected.student[:2], expected.student_floor[:2])
        check_gradient(teacher.grad[:2, :100], expected.teacher[:2], expected.teacher_floor[:2])
        assert value[2] == 0
        assert not any(x.grad[2].any() or x.grad[:, 100:].any() for x in (student, teacher))
        logits[:, 90:100] = -1e4
        student, teacher = logits.clone().requires_grad_(), reference.clone().requires_grad_()
        value = _stats("alpha_beta", student, teacher, backend, **options)
        value.sum().backward()
        assert value.isinf().all() or (beta > 0 and alpha + beta > 0)
        assert not any(x.isnan().any() for x in (value, student.grad, teacher.grad))


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("fill", [-1e4, -1e9, -1e11])
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_negatives_in_one_row(name: str, fill: float, side: str, backend: str) -> None:
    """A finite mask on one side only: KL is about its depth times the other row's mass; what overflows is infinite."""
    logits, reference = _pair(3, 210)
    x = logits if side == "student" else reference
    x[:, 150:] = fill
    student, teacher = logits.clone().requires_grad_(), reference.clone().requires_grad_()
    value = _stats(name, student, teacher, backend)
    expected = oracle.evaluate(name, logits, reference)
    check_value(value, expected.value)
    if name not in ("forward_chi2", "reverse_chi2"):  # beyond float32, as their values
        value.sum().backward()
        check_gradient(student.grad, expected.student, expected.student_floor)
        check_gradient(teacher.grad, expected.teacher, expected.teacher_floor)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_lowest_float_counts_as_minus_infinity(name: str, side: str, backend: str) -> None:
    logits, reference = _pair(3, 210)
    values = []
    for fill in (torch.finfo(torch.float32).min, -1e30, -torch.inf):
        (logits if side == "student" else reference)[:, 150:] = fill
        values.append(_stats(name, logits, reference, backend))
    assert not values[2].isnan().any()
    assert torch.equal(values[0], values[2])
    assert torch.equal(values[1], values[2])
