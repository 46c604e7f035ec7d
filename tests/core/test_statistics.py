"""Every registered statistic, on every available backend, in every dtype and layout, against float64."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
from checks import (
    BACKEND_DTYPES,
    BACKENDS,
    STATISTIC_NAMES,
    check_gradient,
    check_statistic,
    check_value,
    parameters,
    with_parameters,
)
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.registry import STATISTICS


def _rows(*shape: int) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: (3 * torch.randn(shape)).to(dtype)


# Widths off the SIMD and tile grid: 7, 17 (below one vector, just above), 1031 and 4099 (primes); 151,936 is Qwen's.
LAYOUTS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "contiguous": _rows(5, 1000),
    "shifted view": lambda dtype: _rows(3, 6, 211)(dtype)[:, :-1],
    "column slice": lambda dtype: _rows(6, 1031)(dtype)[:, 3:1003],
    "every other row": lambda dtype: _rows(7, 130)(dtype)[::2],
    "transposed leading": lambda dtype: _rows(3, 4, 67)(dtype).transpose(0, 1),
    "broadcast row": lambda dtype: _rows(1, 50)(dtype).expand(4, 50),
    "1-D": _rows(257),
    "3-D": _rows(2, 3, 129),
    "no rows": _rows(0, 64),
    "no tokens": _rows(2, 0, 17),
    "one row": _rows(1, 4099),
    "V=1": _rows(3, 1),
    "V=7": _rows(9, 7),
    "V=17": _rows(4, 17),
    "V=1031": _rows(4, 1031),
    "V=151936": _rows(2, 151_936),
}


def _labels(logits: Tensor) -> Tensor:
    return torch.randint(logits.shape[-1], logits.shape[:-1])


def test_every_statistic_has_an_oracle() -> None:
    missing = [name for name in STATISTIC_NAMES if name not in oracle.FORMULAS]
    assert not missing, f"write the textbook formula of {missing} in oracle.py"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES, ids=str)
@pytest.mark.parametrize("name", STATISTIC_NAMES)
def test_layouts(name: str, backend: str, dtype: torch.dtype, layout: str) -> None:
    torch.set_num_threads(2 if "151936" in layout and backend != "reference" else 1)
    logits, reference = LAYOUTS[layout](dtype), LAYOUTS[layout](dtype)
    check_statistic(name, logits, reference, _labels(logits), backend=backend)


@pytest.mark.parametrize(("name", "alpha", "beta"), with_parameters(STATISTIC_NAMES))
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES, ids=str)
def test_parameters(name: str, backend: str, dtype: torch.dtype, alpha: float, beta: float) -> None:
    logits, reference = _rows(4, 517)(dtype), _rows(4, 517)(dtype)
    check_statistic(
        name, logits, reference, _labels(logits), backend=backend,
        temperature=0.7, reference_temperature=1.6, alpha=alpha, beta=beta,
    )  # fmt: skip


@pytest.mark.parametrize("name", STATISTIC_NAMES)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES, ids=str)
def test_per_token_parameters(name: str, backend: str, dtype: torch.dtype) -> None:
    allowed = parameters(STATISTICS[name])
    shape = (2, len(allowed))
    logits, reference = _rows(*shape, 129)(dtype), _rows(*shape, 129)(dtype)
    alpha, beta = torch.tensor(allowed, dtype=torch.float32).T
    check_statistic(
        name, logits, reference, _labels(logits), backend=backend,
        temperature=0.6 + torch.rand(shape), reference_temperature=0.6 + torch.rand(shape),
        alpha=alpha.expand(shape), beta=beta.expand(shape),
    )  # fmt: skip


@pytest.mark.parametrize("name", STATISTIC_NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_exclusion_and_padding_together(name: str, backend: str) -> None:
    logits, reference = _rows(3, 4, 80)(torch.float32), _rows(3, 4, 80)(torch.float32)
    logits[..., 71:], reference[..., 71:] = torch.nan, torch.inf
    mask = torch.rand(3, 4) < 0.7
    logits[0, 0], mask[0, 0] = torch.nan, False
    exclude = torch.randint(-1, 71, (3, 4))
    labels = torch.where(exclude == 5, 6, 5)
    labels[1] = -7
    check_statistic(
        name, logits, reference, labels, backend=backend,
        temperature=1.3, mask=mask, exclude=exclude, vocab_size=71, ignore_index=-7,
    )  # fmt: skip


@pytest.mark.parametrize("name", [name for name in STATISTIC_NAMES if STATISTICS[name].needs_labels])
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (6,), (2, 3)], ids=str)
def test_several_labels_a_token(name: str, backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    logits, reference = _rows(*shape, 65)(dtype), _rows(*shape, 65)(dtype)
    labels = torch.randint(65, (*shape, 5))
    labels[..., 1] = labels[..., 3]  # a label that occurs twice takes both gradients
    labels[..., 2] = -100
    check_statistic(name, logits, reference, labels, backend=backend, temperature=0.8)


@pytest.mark.parametrize("name", STATISTIC_NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes(name: str, backend: str) -> None:
    """A bfloat16 student with a float32 teacher: each side's gradient comes in its own dtype."""
    student = _rows(3, 300)(torch.bfloat16).requires_grad_()
    teacher = _rows(3, 300)(torch.float32).requires_grad_()
    labels = _labels(student)
    value = kk.token_stats(student, teacher, labels, stats=[name], backend=backend)[name]
    expected = oracle.evaluate(name, student, teacher, labels)
    check_value(value, expected.value)
    if not STATISTICS[name].differentiable:
        return
    value.sum().backward()
    if STATISTICS[name].student:
        assert student.grad.dtype == torch.bfloat16
        check_gradient(student.grad, expected.student, expected.student_floor)
    if STATISTICS[name].reference:
        assert teacher.grad.dtype == torch.float32
        check_gradient(teacher.grad, expected.teacher, expected.teacher_floor)


@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 333), (1, 20_011)], ids=str)
def test_all_statistics_in_one_call(backend: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """One backward pass turns the coefficients of all statistics into the sum of their gradients."""
    student, teacher = _rows(*shape)(dtype).requires_grad_(), _rows(*shape)(dtype).requires_grad_()
    labels = _labels(student)
    options = {"temperature": 1.2, "alpha": 0.4, "beta": 0.7}
    stats = kk.token_stats(student, teacher, labels, stats=STATISTIC_NAMES, backend=backend, **options)
    assert list(stats) == STATISTIC_NAMES
    total = torch.zeros((), dtype=torch.float64)
    wanted, scale, floor = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
    for name, value in stats.items():
        cotangent = torch.randn(value.shape)
        expected = oracle.evaluate(name, student, teacher, labels, cotangent=cotangent, **options)
        check_value(value, expected.value, dtype)
        if not STATISTICS[name].differentiable:
            continue
        total = total + (cotangent * value).sum()
        for side, gradient in enumerate((expected.student, expected.teacher)):
            wanted[side] = wanted[side] + gradient
            scale[side] = scale[side] + gradient.abs().amax(-1, keepdim=True)
        floor[0], floor[1] = floor[0] + expected.student_floor, floor[1] + expected.teacher_floor
    total.backward()
    for side, got in enumerate((student.grad, teacher.grad)):
        # The largest gradients of the statistics one by one: their sum may cancel.
        check_gradient(got, wanted[side], floor[side] + scale[side] * (100 if dtype == torch.float64 else 20))
