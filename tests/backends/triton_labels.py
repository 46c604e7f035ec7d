"""Many labels a row on the Triton backend: values and gradients beside those in float64."""

from __future__ import annotations

from typing import Any

import oracle
import torch
from checks import check_gradient, check_value
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.registry import STATISTICS

TOP_K = ("logprob", "tail_logprob")


def some_labels(rows: int, columns: int, count: int) -> Tensor:
    """Different ones, in no order."""
    return torch.stack([torch.randperm(columns)[:count] for _ in range(rows)])


def check(logits: Tensor, labels: Tensor, stats: tuple[str, ...] = TOP_K, **options: Any) -> None:
    """Values, and the gradient of their sum with random coefficients."""
    student, teacher = logits.detach().requires_grad_(), torch.randn(logits.shape).to(logits.dtype).requires_grad_()
    values = kk.token_stats(student, teacher, labels, stats=stats, backend="triton", **options)
    total, wanted, floors = torch.zeros(()), [torch.zeros(()), torch.zeros(())], [torch.zeros(()), torch.zeros(())]
    for name, value in values.items():
        cotangent = torch.randn(value.shape)
        expected = oracle.evaluate(name, student, teacher, labels, cotangent=cotangent, **options)
        check_value(value, expected.value)
        if not STATISTICS[name].differentiable:
            continue
        total = total + (cotangent * value).sum()
        for side, (gradient, floor) in enumerate(
            ((expected.student, expected.student_floor), (expected.teacher, expected.teacher_floor))
        ):
            wanted[side] = wanted[side] + gradient
            floors[side] = floors[side] + floor + gradient.abs().amax(-1, keepdim=True)
    total.backward()
    for side, got in enumerate((student.grad, teacher.grad)):
        if got is not None:
            check_gradient(got, wanted[side], floors[side])
