"""Many labels a row, and the columns that are none, on the Triton backend in its interpreter, against float64.

What all backends share is in test_statistics.py and test_topk.py; here is where Triton's kernels could go wrong: with
more labels than a program takes at a time, with equal labels, with next to nothing left. Marks: test_triton_marks.py.
"""

from __future__ import annotations

import pytest
import torch
from checks import INTERPRETED
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
if not INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from triton_labels import TOP_K, check, some_labels

import kldiv_kernels as kk
from kldiv_kernels.backends import Call
from kldiv_kernels.backends.triton import launch
from kldiv_kernels.backends.triton.device import state
from kldiv_kernels.inputs import tensors
from kldiv_kernels.registry import STATISTICS


@pytest.mark.parametrize(
    ("dtype", "columns", "count"),
    [
        (torch.float32, 1100, 1), (torch.bfloat16, 1100, 2), (torch.float16, 1099, 64), (torch.bfloat16, 1099, 64),
        (torch.float32, 1100, 1024), (torch.bfloat16, 300, 299), (torch.float32, 7, 6),
    ],
    ids=str,
)  # fmt: skip
def test_sizes(dtype: torch.dtype, columns: int, count: int) -> None:
    check((3 * torch.randn(2, columns)).to(dtype), some_labels(2, columns, count), temperature=0.8)


@pytest.mark.parametrize("stats", [("logprob",), TOP_K, (*TOP_K, "entropy")], ids="+".join)
def test_equal_labels(stats: tuple[str, ...]) -> None:
    """A column takes the coefficients of all of its labels, and is no more than one column of those left out. The first
    row has no two equal labels, unlike the others; 300 labels are more than a program takes at a time."""
    labels = torch.randint(250, (3, 300))
    labels[0, :200], labels[0, 200:] = torch.randperm(250)[:200], -100
    labels[1, 7::9] = -100
    logits = 3 * torch.randn(3, 310)
    check(logits, labels, stats, temperature=1.2)
    check(logits, torch.full((3, 131), 130), stats)


def test_with_everything_else() -> None:
    """Labels of both sides, and statistics of all kinds, in one call."""
    check(2 * torch.randn(2, 301), torch.randint(301, (2, 9)), tuple(STATISTICS), alpha=0.4, beta=0.7, temperature=1.3)


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
    labels = some_labels(2, 400, 5)
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
    labels = some_labels(2, 400, 5)
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
    labels = some_labels(3, 150, 150)
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
    logits, labels = torch.randn(3, 150), some_labels(3, 150, 6)
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
    monkeypatch.setattr(tensors, "_on_host", lambda tensor: False)
    logits, labels = torch.randn(3, 120), some_labels(3, 100, 6)
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
