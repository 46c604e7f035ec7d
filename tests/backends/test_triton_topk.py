"""Many labels a row, and the columns that are none, on the Triton backend in its interpreter, against float64.

What all backends share is in test_statistics.py and test_topk.py; here is where Triton's kernels could go wrong: at the
borders of blocks, slices and words of marks, with more labels than a program takes at a time, with equal labels.
"""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from checks import INTERPRETED, check_gradient, check_value
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
if not INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import kldiv_kernels as kk
from kldiv_kernels import inputs
from kldiv_kernels.backends import Call
from kldiv_kernels.backends.triton import launch
from kldiv_kernels.backends.triton.device import state
from kldiv_kernels.registry import STATISTICS

TOP_K = ("logprob", "tail_logprob")
# As many blocks a slice as on a GPU, of few lanes: a lane then has several words of marks.
LIKE_ON_A_GPU = launch.Tile(lanes=4, blocks=16, warps=1)


@pytest.fixture
def small_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "interpreter_tile", lambda vocab, columns: LIKE_ON_A_GPU)


def _labels(rows: int, columns: int, count: int) -> Tensor:
    """Different ones, in no order."""
    return torch.stack([torch.randperm(columns)[:count] for _ in range(rows)])


def _check(logits: Tensor, labels: Tensor, stats: tuple[str, ...] = TOP_K, **options: Any) -> None:
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


@pytest.mark.parametrize(
    ("dtype", "columns", "count"),
    [
        (torch.float32, 1100, 1), (torch.bfloat16, 1100, 2), (torch.float16, 1099, 64), (torch.bfloat16, 1099, 64),
        (torch.float32, 1100, 1024), (torch.bfloat16, 300, 299), (torch.float32, 7, 6),
    ],
    ids=str,
)  # fmt: skip
def test_sizes(dtype: torch.dtype, columns: int, count: int) -> None:
    _check((3 * torch.randn(2, columns)).to(dtype), _labels(2, columns, count), temperature=0.8)


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
    _check(logits, torch.tensor(borders).expand(2, -1))
    _check(logits, torch.tensor(borders).expand(2, -1), ("tail_logprob", "entropy"))


@pytest.mark.usefixtures("small_lanes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_marks_are_the_labels(dtype: torch.dtype) -> None:
    columns, labels = 1095, torch.randint(-1, 1095, (3, 300))
    labels[1:] = _labels(2, columns, 300)
    labels[2, :9] = 1200  # beyond the vocabulary: none of them is a column
    shape = launch.Shape.of(columns, dtype.itemsize, True)
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


@pytest.mark.parametrize("stats", [("logprob",), TOP_K, (*TOP_K, "entropy")], ids="+".join)
def test_equal_labels(stats: tuple[str, ...]) -> None:
    """A column takes the coefficients of all of its labels, and is no more than one column of those left out. The first
    row has no two equal labels, unlike the others; 300 labels are more than a program takes at a time."""
    labels = torch.randint(250, (3, 300))
    labels[0, :200], labels[0, 200:] = torch.randperm(250)[:200], -100
    labels[1, 7::9] = -100
    logits = 3 * torch.randn(3, 310)
    _check(logits, labels, stats, temperature=1.2)
    _check(logits, torch.full((3, 131), 130), stats)


def test_with_everything_else() -> None:
    """Labels of both sides, and statistics of all kinds, in one call."""
    _check(2 * torch.randn(2, 301), torch.randint(301, (2, 9)), tuple(STATISTICS), alpha=0.4, beta=0.7, temperature=1.3)


@pytest.mark.parametrize("stats", [TOP_K, (*TOP_K, "reverse_kl")], ids="+".join)
def test_masks_exclusion_and_padding(stats: tuple[str, ...]) -> None:
    logits, reference = 2 * torch.randn(2, 3, 90), 2 * torch.randn(2, 3, 90)
    logits[..., 83:], logits[0, 1] = torch.nan, torch.nan
    labels = torch.randint(83, (2, 3, 20))
    labels[..., 4], labels[1, 0] = -7, -7
    exclude, mask = labels[..., 0].clone(), torch.ones(2, 3, dtype=torch.bool)
    exclude[1], mask[0, 1] = torch.tensor([5, -1, 6]), False
    found = {}
    for backend in ("triton", "reference"):
        leaf = logits.clone().requires_grad_()
        values = kk.token_stats(
            leaf, reference, labels, stats=stats, mask=mask, exclude=exclude, vocab_size=83, ignore_index=-7,
            temperature=torch.linspace(0.6, 1.6, 6).reshape(2, 3), backend=backend,
        )  # fmt: skip
        # A token that is excluded and a label has no log-probability.
        sum(torch.where(value.isfinite(), value, 0.0).sum() for value in values.values()).backward()
        found[backend] = [*values.values(), leaf.grad]
    for got, expected in zip(found["triton"], found["reference"], strict=True):
        assert torch.allclose(got, expected, rtol=1e-4, atol=2e-6)
    assert not found["triton"][-1][..., 83:].any()
    assert found["triton"][-1][1, 1].any()


@pytest.mark.parametrize("stats", [TOP_K, (*TOP_K, "entropy")], ids="+".join)
@pytest.mark.parametrize("rest", [27.6, 60.0, 118.0])
def test_next_to_nothing_is_left(rest: float, stats: tuple[str, ...]) -> None:
    """q_rest = 1e-12, 1e-26, and less than a float32 can be: log q_rest and its gradient have all their digits."""
    logits = torch.randn(2, 400)
    labels = _labels(2, 400, 5)
    logits.scatter_(1, labels, torch.randn(2, 5) + rest).requires_grad_()
    leaf = logits.detach().double().requires_grad_()
    inside = torch.zeros(2, 400, dtype=torch.bool).scatter_(1, labels, True)
    got = kk.token_stats(logits, labels=labels, stats=stats, backend="triton").tail_logprob
    expected = torch.where(inside, -torch.inf, leaf.log_softmax(-1)).logsumexp(-1)
    assert (expected < -rest + 12).all()
    assert torch.allclose(got.double(), expected, rtol=1e-6)
    (mine,), (wanted,) = torch.autograd.grad(got.sum(), logits), torch.autograd.grad(expected.sum(), leaf)
    assert torch.allclose(mine.double(), wanted, rtol=2e-5, atol=1e-30)
    assert (mine[~inside] > 1e-5).all()


@pytest.mark.parametrize("stats", [TOP_K, (*TOP_K, "entropy")], ids="+".join)
def test_next_to_nothing_is_taken(stats: tuple[str, ...]) -> None:
    """Labels with 1e-12 of the mass: the gradient of the rest is as small, and has its digits."""
    logits = torch.randn(2, 400)
    labels = _labels(2, 400, 5)
    logits.scatter_(1, labels, torch.randn(2, 5) - 22).requires_grad_()
    leaf = logits.detach().double()
    inside = torch.zeros(2, 400, dtype=torch.bool).scatter_(1, labels, True)
    got = kk.token_stats(logits, labels=labels, stats=stats, backend="triton").tail_logprob
    (mine,) = torch.autograd.grad(got.sum(), logits)
    # Autograd's own, even in float64, is a difference of numbers near 1.
    q, r = leaf.softmax(-1), torch.where(inside, -torch.inf, leaf).softmax(-1)
    taken = torch.where(inside, q, 0.0).sum(-1, keepdim=True)
    wanted = torch.where(inside, -q, taken * r)
    assert wanted.abs().max() < 1e-10
    assert torch.allclose(mine.double(), wanted, rtol=2e-5, atol=0)


@pytest.mark.parametrize("stats", [TOP_K, (*TOP_K, "entropy")], ids="+".join)
def test_nothing_is_left(stats: tuple[str, ...]) -> None:
    """All columns are labels, or all others are at −inf: the tail has a value of −inf and no gradient."""
    logits = torch.randn(3, 150)
    labels = _labels(3, 150, 150)
    labels[1, 20:] = -100
    logits[1] = logits[1].masked_fill((labels[1, :, None] != torch.arange(150)).all(0), -torch.inf)
    logits[2, 4:] = -torch.inf
    found = []
    for backend in ("triton", "reference"):
        leaf = logits.clone().requires_grad_()
        values = kk.token_stats(leaf, labels=labels, stats=stats, backend=backend)
        assert (values.tail_logprob == -torch.inf).all()
        weight = torch.linspace(-1, 1, 150)
        kept = torch.where(values.logprob.isfinite(), weight * values.logprob, 0.0)
        (kept.sum() + (2 * values.tail_logprob).nan_to_num(neginf=0.0).sum()).backward()
        found.append(leaf.grad)
        (alone,) = torch.autograd.grad(
            kk.token_stats(leaf, labels=labels, stats=stats, backend=backend).tail_logprob, leaf, torch.ones(3)
        )
        assert not alone.any()
    assert torch.allclose(*found, rtol=1e-4, atol=1e-6)
    assert found[0].any(-1).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("where", ["label", "rest"])
def test_a_bad_logit_spoils_its_row_alone(where: str, bad: float) -> None:
    logits, labels = torch.randn(3, 150), _labels(3, 150, 6)
    clean = kk.token_stats(logits, labels=labels, stats=TOP_K, backend="triton")
    rest = next(i for i in range(150) if i not in labels[1].tolist())
    logits[1, labels[1, 3] if where == "label" else rest] = bad
    logits.requires_grad_()
    values = kk.token_stats(logits, labels=labels, stats=TOP_K, backend="triton")
    (values.logprob.sum() + values.tail_logprob.sum()).backward()
    for name, value in values.items():
        assert value[1].isnan().all(), name
        assert torch.equal(value[[0, 2]], clean[name][[0, 2]])
    assert logits.grad[1].isnan().all()
    assert logits.grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("stats", [("logprob",), TOP_K], ids="+".join)
def test_a_label_beyond_the_vocabulary_that_nobody_checked(
    stats: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "may_look_at", lambda tensor: False)
    logits, labels = torch.randn(3, 120), _labels(3, 100, 6)
    labels[1, 2] = 100
    wide = logits.clone().requires_grad_()
    values = kk.token_stats(wide, labels=labels, stats=stats, vocab_size=100, backend="triton")
    known = labels.clone()
    known[1, 2] = -100
    expected = kk.token_stats(logits, labels=known, stats=stats, vocab_size=100, backend="triton")
    assert values.logprob[1, 2].isnan()
    assert torch.equal(torch.where(labels == 100, 0.0, values.logprob), expected.logprob)
    if "tail_logprob" in stats:
        assert torch.equal(values.tail_logprob, expected.tail_logprob)
    sum(value.nan_to_num().sum() for value in values.values()).backward()
    assert not wide.grad[:, 100:].any()
    assert wide.grad[:, :100].isfinite().all()


@pytest.mark.parametrize("stats", [("logprob",), TOP_K, (*TOP_K, "js")], ids="+".join)
def test_the_same_bits_alone_and_in_a_batch(stats: tuple[str, ...]) -> None:
    logits, reference = torch.randn(6, 500).bfloat16(), torch.randn(6, 500).bfloat16()
    labels = torch.randint(400, (6, 140))
    weight = torch.randn(6, 140)

    def bits(rows: list[int]) -> list[Tensor]:
        leaf = logits[rows].requires_grad_()
        values = kk.token_stats(leaf, reference[rows], labels[rows], stats=stats, backend="triton", temperature=1.1)
        total = (weight[rows] * values.logprob).sum()
        for name in stats[1:]:
            total = total + (weight[rows, 0] * values[name]).sum()
        return [*values.values(), *torch.autograd.grad(total, leaf)]

    batch = bits([0, 1, 2, 3, 4, 5])
    for rows in ([4, 1], [2]):
        assert all(torch.equal(got, of_all[rows]) for got, of_all in zip(bits(rows), batch, strict=True)), rows


def test_one_read_form_with_many_labels() -> None:
    """No public function asks for it: the operator gives what two passes do."""
    logits, labels = torch.randn(6, 300), torch.randint(300, (6, 4))
    call = Call(logits, None, labels, None, None, None, (1.0, 1.0, 0.5, 0.5), TOP_K, 300)
    one, coefficients = launch.Launch(call, True), torch.randn(5, 6)
    assert one.fills_the_device
    values, dlogits, _ = one.loss(coefficients, True, False)
    assert dlogits is not None
    again, saved = one.statistics(with_state=True)
    assert torch.equal(values, again)
    assert torch.equal(dlogits, one.gradients(saved, coefficients, True, False)[0])
    assert dlogits.any()


def test_one_exponential_a_column_where_nothing_else_is_summed() -> None:
    """The sums over all columns come from those of the tail and of the labels, unless another statistic needs them."""
    for names in (("tail_logprob",), TOP_K, (*TOP_K, "logsumexp")):
        assert not launch.bound_for(names, True).first & state.BOTH.value
    for other in ("entropy", "argmax", "forward_kl", "collision", "reference_logprob"):
        assert launch.bound_for((*TOP_K, other), True).first & state.BOTH.value


def test_a_sweep_without_a_tail_has_no_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    monkeypatch.setattr(launch.Launch, "_run", lambda self, kernel, *_: launched.append(kernel.fn.__name__))
    logits = torch.randn(2, 60, requires_grad=True)
    for count in (3, 1):
        labels = _labels(2, 60, count)
        kk.token_stats(logits, labels=labels, stats=["logprob"], backend="triton").logprob.sum().backward()
    once = ["sweep_kernel", "finish_kernel", "gradient_kernel"]
    assert launched == [*once, "label_gradient_kernel", *once]
