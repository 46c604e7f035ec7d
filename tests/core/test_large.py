"""More elements than 2³¹: offsets are 64-bit everywhere."""

from __future__ import annotations

import oracle
import pytest
import torch
from checks import BACKENDS, check_gradient, check_value

import kldiv_kernels as kk

ROWS, COLUMNS = 14_200, 151_936
LAST = 13


@pytest.mark.slow
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_rows_beyond_two_billion_elements(backend: str) -> None:
    """4.3 GB of bfloat16 logits and as much gradient; the rows near the end are checked against float64."""
    assert ROWS * COLUMNS > 2**31
    row = torch.randn(4, COLUMNS).to(torch.bfloat16)
    logits = torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16)
    rows = torch.tensor([0, ROWS // 2, ROWS - LAST, ROWS - 1])
    logits[rows] = row
    reference = torch.randn(1, COLUMNS).to(torch.bfloat16).expand(ROWS, COLUMNS)
    labels = torch.full((ROWS,), COLUMNS - 1)
    logits.requires_grad_()

    stats = kk.token_stats(logits, reference, labels, stats=["logprob", "entropy", "forward_kl"], backend=backend)
    for name, value in stats.items():
        check_value(value[rows], oracle.evaluate(name, row, reference[:4], labels[:4]).value)
    del stats, value

    weight = torch.zeros(ROWS)
    weight[rows] = torch.tensor([1.0, -2.0, 3.0, -4.0])
    kk.forward_kl(logits, reference, weight=weight, reduction="sum", backend=backend).backward()
    expected = oracle.evaluate("forward_kl", row, reference[:4], cotangent=weight[rows])
    check_gradient(logits.grad[rows], expected.student, expected.student_floor)
    assert not logits.grad[ROWS - LAST + 1 : ROWS - 1].any()
