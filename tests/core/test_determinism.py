"""The same row gives the same bits, from run to run, whatever batch it stands in and however many threads work."""

from __future__ import annotations

import pytest
import torch
from checks import BACKENDS, DIVERGENCES, STATISTIC_NAMES
from torch import Tensor

import kldiv_kernels as kk

# The reference backend sums with PyTorch, whose order depends on shape and threads; it is exact, not reproducible.
KERNELS = [name for name in BACKENDS if name != "reference"]


def _rows(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    logits, reference = (3 * torch.randn(rows, columns)).to(dtype), (3 * torch.randn(rows, columns)).to(dtype)
    return logits, reference, torch.randint(columns, (rows,))


def _bits(logits: Tensor, reference: Tensor, labels: Tensor, backend: str) -> list[Tensor]:
    """Every statistic, and the gradients of all of them, with coefficients that depend on the row only."""
    student, teacher = logits.clone().requires_grad_(), reference.clone().requires_grad_()
    stats = kk.token_stats(student, teacher, labels, stats=STATISTIC_NAMES, temperature=1.3, backend=backend)
    sum((i + 1) * value.sum() for i, value in enumerate(stats.values()) if value.requires_grad).backward()
    out = [*stats.values(), student.grad, teacher.grad]
    for kind in DIVERGENCES:
        student, teacher = logits.clone().requires_grad_(), reference.clone().requires_grad_()
        kk.divergence_loss(student, teacher, kind, reduction="sum", backend=backend).backward()
        out += [student.grad, teacher.grad]
    return [x.detach() for x in out]


def _equal(got: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize(
    ("columns", "dtype"),
    [
        (37, torch.float32),
        (5003, torch.float32),
        (5003, torch.bfloat16),
        (5003, torch.float16),
        (40_007, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", KERNELS)
def test_alone_or_in_a_batch(backend: str, columns: int, dtype: torch.dtype) -> None:
    """One row alone takes the path that splits the row; sixteen take the path that splits the rows."""
    torch.set_num_threads(2)
    rows = _rows(16, columns, dtype)
    batch = _bits(*rows, backend)
    for picked in ([0], [15], [3, 4], [7, 1, 9, 2, 8]):
        alone = _bits(*(x[picked] for x in rows), backend)
        assert _equal(alone, [x[picked] for x in batch]), picked


@pytest.mark.parametrize("backend", KERNELS)
def test_any_strides(backend: str) -> None:
    logits, reference, labels = _rows(6, 2048, torch.bfloat16)
    holed = torch.full((6, 2 * 2048 + 5), torch.nan, dtype=torch.bfloat16)
    holed[:, 3:2051] = logits
    assert _equal(_bits(holed[:, 3:2051], reference, labels, backend), _bits(logits, reference, labels, backend))


@pytest.mark.parametrize(("rows", "columns"), [(1, 151_936), (2, 70_001), (3, 5003), (33, 1031)])
@pytest.mark.parametrize("backend", KERNELS)
def test_threads(backend: str, rows: int, columns: int) -> None:
    inputs = _rows(rows, columns, torch.bfloat16)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(_bits(*inputs, backend))
    assert _equal(results[1], results[0])
    assert _equal(results[2], results[0])


@pytest.mark.parametrize("backend", KERNELS)
def test_run_to_run(backend: str) -> None:
    torch.set_num_threads(2)
    inputs = _rows(4, 3001, torch.float32)
    first = _bits(*inputs, backend)
    for _ in range(3):
        assert _equal(_bits(*inputs, backend), first)
