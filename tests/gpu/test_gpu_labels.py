"""Many labels a token, the mass of all other columns, and the top-k losses made of them, against float64."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from checks import check_gradient, check_value, on
from setting import DEVICE, DTYPES, KERNELS, QUICK, rows
from torch import Tensor

import kldiv_kernels as kk

TOP_K = ("logprob", "tail_logprob")
# Whole vectors or not; one, a few and ten slices of Triton's.
WIDTHS = (300, 301) if QUICK else (1000, 50_257, 151_936)
COUNTS = (1, 64) if QUICK else (1, 64, 1000)
# Where threads, blocks, words of marks and slices of Triton's kernels begin in bfloat16 or float32.
BORDERS = [at + i for at in (4, 8, 32, 512, 1024, 2048, 4096, 8192, 16_384, 32_768) for i in (-1, 0)]


def _labels(count: int, columns: int, tokens: int = 2) -> Tensor:
    """Different ones, in no order; the first token has those at borders."""
    labels = torch.stack([torch.randperm(columns)[:count] for _ in range(tokens)])
    borders = torch.tensor([at for at in [0, *BORDERS, columns - 1] if at < columns])
    if len(borders) <= count:
        others = torch.randperm(columns)
        others = others[~torch.isin(others, borders)]
        labels[0] = torch.cat([borders, others])[:count]
    return labels


def _check(logits: Tensor, labels: Tensor, backend: str, stats: tuple[str, ...] = TOP_K, **options: Any) -> None:
    """Values, and the gradient of their sum with random coefficients."""
    student = on(DEVICE, logits.clone()).requires_grad_()
    values = kk.token_stats(student, labels=on(DEVICE, labels), stats=stats, backend=backend, **options)
    total, wanted, floor = torch.zeros((), device=DEVICE), torch.zeros(()), torch.zeros(())
    for name, value in values.items():
        cotangent = torch.randn(value.shape)
        expected = oracle.evaluate(name, logits, None, labels, cotangent=cotangent, **options)
        check_value(value.cpu(), expected.value)
        total = total + (cotangent.to(DEVICE) * value).sum()
        wanted = wanted + expected.student
        floor = floor + expected.student_floor + expected.student.abs().amax(-1, keepdim=True)
    total.backward()
    assert student.grad is not None
    check_gradient(student.grad.cpu(), wanted, floor)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_sizes(backend: str, dtype: torch.dtype, columns: int, count: int) -> None:
    logits, labels = rows(2, columns, dtype=dtype), _labels(min(count, columns - 1), columns)
    # A label taken for one of the rest, or the other way round, is most of either.
    logits[0, labels[0]] += 12
    _check(logits, labels, backend, temperature=0.9)


@pytest.mark.parametrize("stats", [("logprob",), TOP_K, (*TOP_K, "entropy")], ids="+".join)
@pytest.mark.parametrize("backend", KERNELS)
def test_equal_labels(backend: str, stats: tuple[str, ...]) -> None:
    columns, count = (200, 150) if QUICK else (20_011, 700)
    labels = torch.randint(columns // 40, (3, count))
    labels[0, 100:], labels[1, 3::5] = -100, -100
    labels[0, :100] = torch.randperm(columns)[:100]
    _check(rows(3, columns), labels, backend, stats, temperature=1.2)


@pytest.mark.parametrize("above", [28.0, 60.0, 118.0])
@pytest.mark.parametrize("stats", [TOP_K, (*TOP_K, "entropy")], ids="+".join)
@pytest.mark.parametrize("backend", KERNELS)
def test_next_to_nothing_is_left(backend: str, stats: tuple[str, ...], above: float) -> None:
    columns = WIDTHS[-1]
    logits, labels = torch.randn(2, columns), _labels(5, columns)
    inside = torch.zeros(2, columns, dtype=torch.bool).scatter_(1, labels, True)
    logits += above * inside
    leaf, there = logits.double().requires_grad_(), on(DEVICE, logits).requires_grad_()
    got = kk.token_stats(there, labels=on(DEVICE, labels), stats=stats, backend=backend).tail_logprob
    expected = torch.where(inside, -torch.inf, leaf.log_softmax(-1)).logsumexp(-1)
    assert torch.allclose(got.cpu().double(), expected, rtol=2e-6)
    (mine,), (wanted,) = torch.autograd.grad(got.sum(), there), torch.autograd.grad(expected.sum(), leaf)
    assert torch.allclose(mine.cpu().double(), wanted, rtol=3e-5, atol=1e-30)


@pytest.mark.parametrize("stats", [("logprob",), TOP_K, (*TOP_K, "entropy")], ids="+".join)
@pytest.mark.parametrize("backend", KERNELS)
def test_the_same_bits_twice_and_in_any_batch(backend: str, stats: tuple[str, ...]) -> None:
    """Equal labels too: whichever of them is marked or written first."""
    columns, batch = (300, 14) if QUICK else (20_008, 4096)
    logits, labels = rows(7, columns, dtype=torch.bfloat16), torch.randint(columns // 50, (7, 70))
    weight = torch.randn(7, 70)
    each = [x.to(DEVICE) for x in (logits, labels, weight)]

    def bits(index: Tensor) -> list[Tensor]:
        mine, ids, scale = (x[index] for x in each)
        values = kk.token_stats(mine.requires_grad_(), labels=ids, stats=stats, backend=backend)
        total = (scale * values.logprob).sum() + sum((scale[:, 0] * values[name]).sum() for name in stats[1:])
        return [*values.values(), *torch.autograd.grad(total, mine)]

    alone = [
        torch.cat(parts) for parts in zip(*(bits(torch.tensor([i], device=DEVICE)) for i in range(7)), strict=True)
    ]
    for size in (3, batch, batch):
        index = (torch.arange(size, device=DEVICE) * 3 + 1) % 7
        for got, wanted in zip(bits(index), alone, strict=True):
            assert torch.equal(got, wanted[index]), f"in a batch of {size} a row's bits differ from those of it alone"


@pytest.mark.parametrize(
    ("kind", "tail"),
    [
        ("forward_kl", "bucket"), ("reverse_kl", "bucket"), ("js", "bucket"), ("hellinger", "bucket"),
        ("forward_kl", "renormalize"), ("forward_kl", "renormalize_teacher"), ("forward_kl", "none"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_top_k_losses(backend: str, dtype: torch.dtype, kind: str, tail: str) -> None:
    """Against the same formula on the reference backend in float64."""
    columns = WIDTHS[-1]
    logits, reference = rows(2, 3, columns, dtype=dtype), rows(2, 3, columns)
    teacher = reference.log_softmax(-1).topk(64, dim=-1)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])

    def run(leaf: Tensor, device: str, chosen: str) -> tuple[Tensor, Tensor]:
        loss = kk.topk_divergence_loss(
            leaf, on(device, teacher.indices), on(device, teacher.values), kind, tail=tail, mask=on(device, mask),
            temperature=1.3, backend=chosen,
        )  # fmt: skip
        return loss.detach().cpu().double(), torch.autograd.grad(loss, leaf)[0].cpu()

    got, mine = run(on(DEVICE, logits).requires_grad_(), DEVICE, backend)
    expected, wanted = run(logits.double().requires_grad_(), "cpu", "reference")
    assert torch.allclose(got, expected, rtol=2e-5, atol=1e-6)
    largest = wanted.abs().amax(-1, keepdim=True)
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert ((mine.double() - wanted).abs() <= 3e-5 * largest + 1e-7 + rounding * wanted.abs()).all()
    assert not mine[mask == 0].any()
    assert mine[mask != 0].any(-1).all()
