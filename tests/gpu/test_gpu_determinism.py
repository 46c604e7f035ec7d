"""Same input, same bits on the GPU: twice, and for a row alone, among three, and among thousands.

A few rows are cut into slices over many programs; thousands get a program each, and a loss takes its one-program form
there. A batch repeats seven rows, so that each of its rows has a twin that was computed alone.
"""

from __future__ import annotations

import oracle
import pytest
import torch
from checks import check_gradient
from setting import DEVICE, DTYPES, KERNELS, LOSSES, NAMES, QUICK, parked, rows
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.registry import STATISTICS

DIFFERENT = 7
# 4096 and 1024 rows are more than four a multiprocessor on every GPU so far; in the interpreter four rows are many.
BATCHES = [(300, 14)] if QUICK else [(5003, 4096), (40_007, 1024)]
TEMPERATURE = 1.3


def _statistic_bits(name: str, inputs: list[Tensor], backend: str) -> list[Tensor]:
    logits, reference, labels, weight = inputs
    student, teacher = logits.clone().requires_grad_(), reference.clone().requires_grad_()
    value = kk.token_stats(student, teacher, labels, stats=[name], temperature=TEMPERATURE, backend=backend)[name]
    if not STATISTICS[name].differentiable:
        return [value]
    (weight * value).sum().backward()
    return [value.detach(), *(x.grad for x in (student, teacher) if x.grad is not None)]


def _loss_bits(name: str, inputs: list[Tensor], backend: str) -> list[Tensor]:
    logits, reference, _, weight = inputs
    student, teacher = logits.clone().requires_grad_(), reference.clone().requires_grad_()
    loss = kk.divergence_loss(
        student, teacher, name, weight=weight, reduction="sum", temperature=TEMPERATURE, backend=backend
    )
    loss.backward()
    assert student.grad is not None
    assert teacher.grad is not None
    return [student.grad, teacher.grad]


def _inputs(columns: int, dtype: torch.dtype) -> list[Tensor]:
    """[7, columns] student and teacher, labels and weights, on the CPU."""
    weight = (torch.rand(DIFFERENT) + 0.5) * torch.randn(DIFFERENT).sign()
    return [
        rows(DIFFERENT, columns, dtype=dtype),
        rows(DIFFERENT, columns, dtype=dtype),
        torch.randint(columns, (DIFFERENT,)),
        weight,
    ]


def _check(bits: object, name: str, inputs: list[Tensor], batch: int, backend: str) -> list[Tensor]:
    """What `bits` gives for the seven rows, after checking every batch that they stand in."""
    assert callable(bits)
    each = [x.to(DEVICE) for x in inputs]

    def of(index: Tensor) -> list[Tensor]:
        out: list[Tensor] = bits(name, [x[index] for x in each], backend)
        return out

    one_by_one = [of(torch.tensor([row], device=DEVICE)) for row in range(DIFFERENT)]
    alone = [torch.cat(parts) for parts in zip(*one_by_one, strict=True)]
    for size in (3, batch, batch):
        index = (torch.arange(size, device=DEVICE) * 3 + 1) % DIFFERENT
        for got, wanted in zip(of(index), alone, strict=True):
            assert torch.equal(got, wanted[index]), f"in a batch of {size} a row's bits differ from those of it alone"
    return alone


@pytest.mark.parametrize(("columns", "batch"), BATCHES[:1])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", KERNELS)
def test_a_statistic_in_any_batch(name: str, dtype: torch.dtype, columns: int, batch: int, backend: str) -> None:
    _check(_statistic_bits, name, _inputs(columns, dtype), batch, backend)


@pytest.mark.parametrize(("columns", "batch"), BATCHES)
@pytest.mark.parametrize("dtype", DTYPES[:1], ids=str)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", KERNELS)
def test_a_loss_in_any_batch(name: str, dtype: torch.dtype, columns: int, batch: int, backend: str) -> None:
    """The bits, and that they are right: the one-program form is not a statistic's."""
    inputs = _inputs(columns, dtype)
    logits, reference, _, weight = inputs
    student, teacher = _check(_loss_bits, name, inputs, batch, backend)
    expected = oracle.evaluate(name, logits, reference, cotangent=weight, temperature=TEMPERATURE)
    check_gradient(student.cpu(), expected.student, expected.student_floor)
    check_gradient(teacher.cpu(), expected.teacher, expected.teacher_floor)


# A multiple of 8 columns, rows that start at 16 bytes, and no gradient of the teacher: the cuda backend reads each row
# once, in a cluster that does not depend on the batch.
ONE_READ_BATCHES = [(304, 14)] if QUICK else [(16_392, 2048), (40_008, 1024)]


def _student_bits(name: str, inputs: list[Tensor], backend: str) -> list[Tensor]:
    logits, reference, _, weight = inputs
    student = logits.clone().requires_grad_()
    kk.divergence_loss(
        student, reference, name, weight=weight, reduction="sum", temperature=TEMPERATURE, backend=backend
    ).backward()
    assert student.grad is not None
    return [student.grad]


@pytest.mark.parametrize(("columns", "batch"), ONE_READ_BATCHES)
@pytest.mark.parametrize("dtype", DTYPES[:1], ids=str)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", KERNELS)
def test_a_loss_of_the_student_in_any_batch(
    name: str, dtype: torch.dtype, columns: int, batch: int, backend: str
) -> None:
    inputs = _inputs(columns, dtype)
    logits, reference, _, weight = inputs
    (student,) = _check(_student_bits, name, inputs, batch, backend)
    expected = oracle.evaluate(name, logits, reference, cotangent=weight, temperature=TEMPERATURE)
    floor = expected.student_floor + parked(name, backend, logits, reference, weight, TEMPERATURE, TEMPERATURE)
    check_gradient(student.cpu(), expected.student, floor)
