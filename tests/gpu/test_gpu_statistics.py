"""Every statistic on every backend of the GPU, against float64: dtypes, layouts, parameters, masks."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
from checks import BACKENDS, check_gradient, check_statistic, check_value, on, parameters, with_parameters
from setting import AVAILABLE, DEVICE, DTYPES, KERNELS, NAMES, QUICK, compute, labels_for, rows
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.registry import STATISTICS

# Rows that start at 16 bytes or not, lengths that are a multiple of it or not, and one, a few and many slices a row.
LAYOUTS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "contiguous": lambda dtype: rows(5, 1000, dtype=dtype),
    "odd width, shifted view": lambda dtype: rows(3, 6, 211, dtype=dtype)[:, :-1],
    "column slice": lambda dtype: rows(6, 1031, dtype=dtype)[:, 3:1003],
    "transposed leading": lambda dtype: rows(3, 4, 67, dtype=dtype).transpose(0, 1),
    "broadcast row": lambda dtype: rows(1, 64, dtype=dtype).expand(4, 64),
    "no rows": lambda dtype: rows(0, 64, dtype=dtype),
    "V=1": lambda dtype: rows(3, 1, dtype=dtype),
    "V=50257": lambda dtype: rows(3, 50_257, dtype=dtype),
    "V=151936": lambda dtype: rows(2, 151_936, dtype=dtype),
    "V=262144": lambda dtype: rows(1, 262_144, dtype=dtype),
}
# Each dtype compiles the kernels of a layout anew: all layouts in bfloat16, those that differ most in the others.
_IN_EVERY_DTYPE = ("contiguous", "odd width, shifted view", "V=151936")
_QUICK = ("contiguous", "odd width, shifted view")
CASES = [
    (dtype, layout)
    for dtype in DTYPES
    for layout in (_QUICK if QUICK else LAYOUTS)
    if dtype == torch.bfloat16 or layout in _IN_EVERY_DTYPE
]
ONE_OF_A_KIND = (torch.bfloat16,)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(("dtype", "layout"), CASES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_layouts(name: str, dtype: torch.dtype, layout: str, backend: str) -> None:
    logits, reference = LAYOUTS[layout](dtype), LAYOUTS[layout](dtype)
    check_statistic(name, logits, reference, labels_for(logits), backend=backend, device=DEVICE)


@pytest.mark.skipif("reference" not in BACKENDS, reason="the interpreter's suite has only Triton")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_reference_backend(name: str, dtype: torch.dtype) -> None:
    logits, reference = rows(3, 6, 211, dtype=dtype)[:, :-1], rows(3, 6, 211, dtype=dtype)[:, :-1]
    mask, exclude = torch.rand(3, 5) < 0.8, torch.randint(-1, 5, (3, 5))
    check_statistic(
        name, logits, reference, torch.randint(5, 200, (3, 5)), backend="reference", device=DEVICE,
        mask=mask, exclude=exclude, vocab_size=207, temperature=1.3,
    )  # fmt: skip


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("name", "alpha", "beta"), with_parameters(NAMES))
def test_parameters(name: str, alpha: float, beta: float, dtype: torch.dtype, backend: str) -> None:
    logits, reference = rows(4, 1000, dtype=dtype), rows(4, 1000, dtype=dtype)
    check_statistic(
        name, logits, reference, labels_for(logits), backend=backend, device=DEVICE,
        temperature=0.7, reference_temperature=1.6, alpha=alpha, beta=beta,
    )  # fmt: skip


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", ONE_OF_A_KIND, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_per_token_parameters(name: str, dtype: torch.dtype, backend: str) -> None:
    allowed = parameters(STATISTICS[name])
    shape = (2, len(allowed))
    logits, reference = rows(*shape, 1000, dtype=dtype), rows(*shape, 1000, dtype=dtype)
    alpha, beta = torch.tensor(allowed, dtype=torch.float32).T
    check_statistic(
        name, logits, reference, labels_for(logits), backend=backend, device=DEVICE,
        temperature=0.6 + torch.rand(shape), reference_temperature=0.6 + torch.rand(shape),
        alpha=alpha.expand(shape), beta=beta.expand(shape),
    )  # fmt: skip


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", ONE_OF_A_KIND, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_masks_exclusion_and_padding_together(name: str, dtype: torch.dtype, backend: str) -> None:
    logits, reference = rows(3, 4, 80, dtype=dtype), rows(3, 4, 80, dtype=dtype)
    logits[..., 71:], reference[..., 71:] = torch.nan, torch.inf
    mask = torch.rand(3, 4) < 0.7
    logits[0, 0], mask[0, 0] = torch.nan, False
    exclude = torch.randint(-1, 71, (3, 4))
    labels = torch.where(exclude == 5, 6, 5)
    labels[1] = -7
    check_statistic(
        name, logits, reference, labels, backend=backend, device=DEVICE,
        temperature=1.3, mask=mask, exclude=exclude, vocab_size=71, ignore_index=-7,
    )  # fmt: skip


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", ONE_OF_A_KIND, ids=str)
@pytest.mark.parametrize("name", [name for name in NAMES if STATISTICS[name].needs_labels])
def test_several_labels_a_token(name: str, dtype: torch.dtype, backend: str) -> None:
    logits, reference = rows(2, 3, 1000, dtype=dtype), rows(2, 3, 1000, dtype=dtype)
    labels = torch.randint(1000, (2, 3, 5))
    labels[..., 1] = labels[..., 3]
    labels[..., 2] = -100
    check_statistic(name, logits, reference, labels, backend=backend, device=DEVICE, temperature=0.8)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", [name for name in NAMES if STATISTICS[name].student and STATISTICS[name].reference])
def test_mixed_dtypes(name: str, backend: str) -> None:
    """A bfloat16 student with a float32 teacher: each side's gradient comes in its own dtype."""
    student, teacher = rows(3, 1000, dtype=torch.bfloat16), rows(3, 1000)
    got, expected = compute(name, student, teacher, None, backend), oracle.evaluate(name, student, teacher)
    check_value(got.value, expected.value)
    assert got.student is not None
    assert got.teacher is not None
    assert (got.student.dtype, got.teacher.dtype) == (torch.bfloat16, torch.float32)
    check_gradient(got.student, expected.student, expected.student_floor)
    check_gradient(got.teacher, expected.teacher, expected.teacher_floor)


@pytest.mark.parametrize("backend", KERNELS)
def test_several_statistics_in_one_call(backend: str) -> None:
    """One backward pass turns the coefficients of all of them into the sum of their gradients."""
    names = [name for name in NAMES if STATISTICS[name].differentiable][: 4 if QUICK else None]
    logits, reference = rows(4, 1000, dtype=torch.bfloat16), rows(4, 1000, dtype=torch.bfloat16)
    labels = labels_for(logits)
    student, teacher = (on(DEVICE, x.clone()).requires_grad_() for x in (logits, reference))
    stats = kk.token_stats(student, teacher, on(DEVICE, labels), stats=names, temperature=1.2, backend=backend)
    assert list(stats) == names
    wanted, floor = [0.0, 0.0], [0.0, 0.0]
    total = torch.zeros((), device=DEVICE)
    for name, value in stats.items():
        cotangent = torch.randn(value.shape)
        expected = oracle.evaluate(name, logits, reference, labels, cotangent=cotangent, temperature=1.2)
        check_value(value.cpu(), expected.value)
        total = total + (cotangent.to(DEVICE) * value).sum()
        for side, (gradient, of_side) in enumerate(
            ((expected.student, expected.student_floor), (expected.teacher, expected.teacher_floor))
        ):
            wanted[side] = wanted[side] + gradient
            # The largest gradients of the statistics one by one: their sum may cancel.
            floor[side] = floor[side] + of_side + 20 * gradient.abs().amax(-1, keepdim=True)
    total.backward()
    for side, got in enumerate((student.grad, teacher.grad)):
        check_gradient(got.cpu(), wanted[side], floor[side])


@pytest.mark.skipif(QUICK, reason="on a CPU auto never takes the interpreter")
@pytest.mark.skipif(AVAILABLE[0] not in KERNELS, reason="the backend that auto takes is not tested in this run")
def test_auto_takes_the_first_backend() -> None:
    student, teacher = (on(DEVICE, rows(3, 1000, dtype=torch.bfloat16)) for _ in range(2))
    auto, first = (kk.js_divergence(student, teacher, backend=name) for name in ("auto", AVAILABLE[0]))
    assert torch.equal(auto, first)
