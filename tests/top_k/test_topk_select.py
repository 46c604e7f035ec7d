"""The k largest columns of each row on a CPU, against torch.topk."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels import ops
from kldiv_kernels.backends import native

pytestmark = pytest.mark.skipif(kk.backends()["cpu"] != "available", reason="the compiled part is not built")


def _largest(logits: Tensor, k: int, columns: int | None = None, mask: Tensor | None = None) -> Tensor:
    return ops.largest(logits, mask, k, logits.shape[-1] if columns is None else columns)


def _in_order(row: list[float], k: int) -> list[int]:
    """The largest first, of equal ones the first first."""
    return sorted(range(len(row)), key=lambda column: (-row[column], column))[:k]


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 7, 64, 65, 500, 1999, 2000])
@pytest.mark.parametrize("order", ["random", "ascending", "descending", "steps", "equal"])
def test_as_sorting(order: str, k: int, dtype: torch.dtype) -> None:
    logits = torch.randn(3, 2000)
    if order in ("ascending", "descending"):
        logits = logits.sort(-1, descending=order == "descending").values
    if order in ("steps", "equal"):
        logits = (logits * (3 if order == "steps" else 0)).round()
    logits = logits.to(dtype)
    assert _largest(logits, k).tolist() == [_in_order(row, k) for row in logits.tolist()]


@pytest.mark.parametrize("columns", [1, 15, 63, 64, 65, 129, 200])
def test_columns_behind_the_vocabulary_are_not_looked_at(columns: int) -> None:
    logits = torch.randn(2, 3, 300)[..., 3:]
    logits[..., columns:] = 1e9
    k = min(columns, 4)
    expected = [_in_order(row, k) for row in logits[..., :columns].flatten(0, 1).tolist()]
    assert _largest(logits, k, columns).tolist() == expected


def test_infinite_and_missing_logits() -> None:
    """Always k different columns, NaN last."""
    logits = torch.randn(4, 200)
    logits[0] = -torch.inf
    logits[1] = torch.nan
    logits[2, 5:] = -torch.inf
    logits[3, ::2] = torch.nan
    logits[3, 7] = torch.inf
    ids = _largest(logits, 30)
    assert all(len(set(row)) == 30 for row in ids.tolist())
    assert (ids >= 0).all()
    assert (ids < 200).all()
    assert ids[2, :5].tolist() == _in_order(logits[2, :5].tolist(), 5)
    assert ids[3, 0] == 7
    assert not logits[3, ids[3]].isnan().any()


def test_masked_rows_are_not_read() -> None:
    logits, mask = torch.randn(6, 300), torch.tensor([True, False, True, True, False, True])
    ids = _largest(torch.where(mask[:, None], logits, torch.nan), 5, mask=mask)
    assert torch.equal(ids[mask], logits[mask].topk(5).indices)
    assert (ids[~mask] == torch.arange(5)).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        logits = torch.randn(40, 9_000)
        assert torch.equal(_largest(logits, 16), logits.topk(16).indices)
    finally:
        torch.set_num_threads(before)


def test_no_rows() -> None:
    assert _largest(torch.zeros(0, 8), 3).shape == (0, 3)


def test_operator() -> None:
    torch.library.opcheck(torch.ops.kldiv_kernels.largest.default, (torch.randn(2, 3, 40), torch.rand(6) < 0.5, 4, 38))
    for k, columns, message in ((0, 8, "k must be 1 to 8"), (9, 8, "k must be 1 to 8"), (1, 9, "vocab_size must be")):
        with pytest.raises(RuntimeError, match=message):
            _largest(torch.zeros(2, 8), k, columns)
