"""The marks by which Triton's kernels leave labels out of the tail: at the borders of blocks, slices and words.

They run in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from checks import INTERPRETED

pytest.importorskip("triton", reason="Triton is not installed")
if not INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from triton_labels import TOP_K, check, some_labels

import kldiv_kernels as kk
from kldiv_kernels.backends import Call
from kldiv_kernels.backends.triton import launch, sizes

# As many blocks a slice as on a GPU, of few lanes: a lane then has several words of marks.
LIKE_ON_A_GPU = sizes.Tile(lanes=4, blocks=16, warps=1)


@pytest.fixture
def small_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "interpreter_tile", lambda vocab, columns: LIKE_ON_A_GPU)


@pytest.mark.usefixtures("small_lanes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_borders_of_lanes_blocks_words_and_slices(dtype: torch.dtype) -> None:
    """Slices of 256 or 512 columns in 16 blocks, and behind the last pair of whole ones a whole and a part. A label
    that a mark were missing for would be most of the tail."""
    c, columns = 16 // dtype.itemsize, 1143
    borders = [at * c + i for at in (0, 1, 4, 8, 12, 32, 64, 128) for i in (-1, 0, 1)]
    borders = [at for at in borders if at >= 0] + [1087, 1088, 1119, 1120, 1121, 1135, 1136, 1142]
    logits = torch.randn(2, columns).to(dtype)
    logits[:, borders] += 12
    check(logits, torch.tensor(borders).expand(2, -1))
    check(logits, torch.tensor(borders).expand(2, -1), ("tail_logprob", "entropy"))


@pytest.mark.usefixtures("small_lanes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_marks_are_the_labels(dtype: torch.dtype) -> None:
    columns, labels = 1095, torch.randint(-1, 1095, (3, 300))
    labels[1:] = some_labels(2, columns, 300)
    labels[2, :9] = 1200  # beyond the vocabulary: none of them is a column
    shape = sizes.Shape.of(columns, dtype.itemsize, True)
    marks, duplicates = torch.zeros(3, shape.mark_words, dtype=torch.int32), torch.full((3,), 7, dtype=torch.int32)
    call = Call(torch.empty(3, columns, dtype=dtype), None, labels, None, None, None, (1.0,) * 4, TOP_K, columns)
    kernel = launch.Launch(call, True).bound.mark_kernel
    kernel[(3,)](
        marks, duplicates, labels, labels, columns, shape.slices, 300, MASK=False, SLICE=shape.slice_columns,
        R=shape.lanes, C=shape.columns,
    )  # fmt: skip
    at = torch.arange(columns)
    # [slice, block, lane, column of the lane] of each column: see labels.py.
    lane = at // shape.columns % shape.lanes
    number = at % shape.slice_columns // (shape.lanes * shape.columns) * shape.columns + at % shape.columns
    words = shape.slice_columns // shape.lanes // 32
    assert words == {torch.float32: 2, torch.bfloat16: 4}[dtype]
    word = (at // shape.slice_columns * words + number // 32) * shape.lanes + lane
    marked = (marks[:, word] >> (number % 32)) & 1
    assert torch.equal(marked.bool(), (labels[..., None] == at).any(1))
    assert marked.sum() == torch.tensor([bin(x % 2**32).count("1") for x in marks.flatten().tolist()]).sum()
    assert (duplicates != 0).tolist() == [True, False, False]


def test_a_sweep_without_a_tail_has_no_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    monkeypatch.setattr(launch.Launch, "_run", lambda self, kernel, *_: launched.append(kernel.fn.__name__))
    logits = torch.randn(2, 60, requires_grad=True)
    for count in (3, 1):
        labels = some_labels(2, 60, count)
        kk.token_stats(logits, labels=labels, stats=["logprob"], backend="triton").logprob.sum().backward()
    once = ["sweep_kernel", "finish_kernel", "gradient_kernel"]
    assert launched == [*once, "label_gradient_kernel", *once]
