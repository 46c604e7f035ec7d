"""More elements than 2³¹ on the GPU: offsets are 64-bit everywhere."""

from __future__ import annotations

import oracle
import pytest
import torch
from checks import check_gradient, check_value
from setting import DEVICE, KERNELS, QUICK
from torch import Tensor

import kldiv_kernels as kk

ROWS, COLUMNS = (9, 333) if QUICK else (16_384, 151_936)
# Student, teacher, one gradient, and twice as much again for what the tests themselves need.
NEEDED = 5 * 2 * ROWS * COLUMNS
# The row that holds element 2³¹, and the first and last two.
PICKED = [0, 1, ROWS // 2 if QUICK else 2**31 // COLUMNS, ROWS - 2, ROWS - 1]


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        if free < NEEDED:
            pytest.skip(f"needs {NEEDED / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} GiB are free")
    student, teacher = (
        torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16, device=DEVICE).normal_().mul_(2) for _ in range(2)
    )
    return student.requires_grad_(), teacher


def _few(x: Tensor) -> Tensor:
    return x.detach()[PICKED].cpu()


@pytest.mark.parametrize("backend", KERNELS)
def test_a_loss_beyond_two_billion_elements(logits: tuple[Tensor, Tensor], backend: str) -> None:
    student, teacher = logits
    weight = torch.rand(ROWS, device=DEVICE) + 0.5
    kk.forward_kl(student, teacher, weight=weight, reduction="sum", backend=backend).backward()
    expected = oracle.evaluate("forward_kl", _few(student), _few(teacher), cotangent=_few(weight))
    assert student.grad is not None
    check_gradient(_few(student.grad), expected.student, expected.student_floor)
    # Every row has a gradient, and its sum is 0 up to the rounding of bfloat16.
    assert (student.grad != 0).any(1).all()
    per_row = student.grad.sum(1, dtype=torch.float32).abs() / student.grad.abs().sum(1, dtype=torch.float32)
    assert per_row.max() < 0.01


@pytest.mark.parametrize("backend", KERNELS)
def test_statistics_beyond_two_billion_elements(logits: tuple[Tensor, Tensor], backend: str) -> None:
    student, _ = logits
    labels = torch.randint(COLUMNS, (ROWS,), device=DEVICE)
    stats = kk.token_stats(student, labels=labels, stats=["logprob", "entropy"], backend=backend)
    weight = torch.rand(ROWS, device=DEVICE) + 0.5
    (weight * stats.logprob).sum().backward()
    assert student.grad is not None
    for name, cotangent in (("logprob", _few(weight)), ("entropy", None)):
        expected = oracle.evaluate(name, _few(student), labels=_few(labels), cotangent=cotangent)
        check_value(_few(stats[name]), expected.value)
        if name == "logprob":
            check_gradient(_few(student.grad), expected.student, expected.student_floor)
