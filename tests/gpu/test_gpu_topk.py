"""Top-k divergences and the statistics of many labels on the device: the one-read kernel in its plans, and two sweeps,
against float64."""

from __future__ import annotations

import pytest
import torch
from checks import on, taken
from setting import DEVICE, FEW, KERNELS, LOSSES, QUICK, largest_cluster, rows
from torch import Tensor

import kldiv_kernels as kk

CUDA = [name for name in KERNELS if name == "cuda"]
# Below 8192 columns the cuda backend chooses two sweeps.
WIDTHS = (136,) if QUICK else (3000, 8200, 151_936, 262_144)
DTYPES = (torch.bfloat16,) if QUICK or FEW else (torch.bfloat16, torch.float32)
# With a sum of its own, with sums of normalised terms, with a log-sum-exp.
KINDS = [name for name in ("forward_kl", "reverse_kl", "js", "tvd", "renyi", "forward_chi2") if name in LOSSES]
TAILS = ("bucket", "renormalize", "renormalize_teacher")
# More than all clusters of a GPU hold at a time.
COUNT = 7 if QUICK else 701
PLANS = (
    "two-sweep", "cluster=1,stages=3", "cluster=2,stages=1", "cluster=4,stages=2", "cluster=8,stages=4",
    "cluster=16,stages=2",
)  # fmt: skip


def some_ids(count: int, columns: int, k: int) -> Tensor:
    """Different ones in each row, the row's ends among them, and no id in the last place of every other row."""
    ids = torch.stack([torch.randperm(columns - 2)[:k] + 1 for _ in range(count)])
    ids[:, 0], ids[::2, -1] = 0, -1
    ids[1::2, -1] = columns - 1
    return ids


def teacher_of(ids: Tensor) -> Tensor:
    logits = torch.where(ids < 0, -torch.inf, torch.randn(ids.shape))
    return logits.log_softmax(-1) + torch.tensor(0.8).log()


def gradient(
    leaf: Tensor, ids: Tensor, theirs: Tensor, kind: str, backend: str, **options: object
) -> tuple[Tensor, Tensor]:
    there = {key: on(str(leaf.device), x) if isinstance(x, Tensor) else x for key, x in options.items()}
    loss = kk.topk_divergence_loss(
        leaf, on(str(leaf.device), ids), on(str(leaf.device), theirs), kind, reduction="sum", backend=backend, **there
    )  # fmt: skip
    return loss.detach().cpu(), torch.autograd.grad(loss, leaf)[0].cpu()


def check(
    logits: Tensor, ids: Tensor, theirs: Tensor, kind: str, backend: str, **options: object
) -> tuple[Tensor, Tensor]:
    """Loss and gradient, after comparing both with float64."""
    loss, got = gradient(on(DEVICE, logits).requires_grad_(), ids, theirs, kind, backend, **options)
    expected, wanted = gradient(logits.double().requires_grad_(), ids, theirs, kind, "reference", **options)
    assert loss.item() == pytest.approx(expected.item(), rel=3e-5, abs=1e-5)
    largest = wanted.abs().amax(-1, keepdim=True)
    rounding = 0 if logits.dtype == torch.float32 else torch.finfo(logits.dtype).eps
    assert (largest > 0).any()
    assert ((got.double() - wanted).abs() <= 3e-5 * largest + 2e-6 + rounding * wanted.abs()).all()
    return loss, got


@pytest.mark.parametrize("k", [1, 64, 1024])
@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", CUDA)
def test_divergences(backend: str, dtype: torch.dtype, columns: int, k: int) -> None:
    k = min(k, columns // 3)
    for i, kind in enumerate(KINDS):
        tail = TAILS[i % 2]
        ids = some_ids(9, columns, k) if k > 1 else torch.randint(columns, (9, 1))
        if k == 1 and tail == "renormalize":
            continue
        options = {"weight": torch.rand(9) + 0.5, "mask": torch.arange(9) != 4, "temperature": 1.3}
        options |= taken(kind, 0.3, 0.5)
        _, got = check(rows(9, columns, dtype=dtype), ids, teacher_of(ids), kind, backend, tail=tail, **options)
        assert not got[4].any()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("backend", CUDA)
def test_plans(backend: str, plan: str, tail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than all clusters hold at a time, and labels in every slice."""
    if "cluster" in plan and int(plan.partition("=")[2].partition(",")[0]) > largest_cluster():
        pytest.skip(f"this device has no {plan.partition(',')[0]}")
    monkeypatch.setenv("KLDIV_CUDA_PLAN", plan)
    ids = some_ids(COUNT, 3000, 200)
    for dtype in DTYPES:
        check(rows(COUNT, 3000, dtype=dtype), ids, teacher_of(ids), "js", backend, tail=tail)


@pytest.mark.parametrize("captured", [1 - 1e-7, 1 - 1e-12], ids=str)
@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("backend", CUDA)
def test_next_to_all_captured(backend: str, columns: int, captured: float) -> None:
    """The tail has its digits, and its gradient."""
    ids = some_ids(5, columns, 32).clamp_min(1)
    ids[::2, -1] = -1
    here = torch.zeros(5, columns + 1, dtype=torch.bool).scatter_(1, ids.where(ids >= 0, columns), True)[:, :columns]
    shift = torch.tensor(-captured, dtype=torch.float64).log1p().float()
    logits = rows(5, columns) + torch.where(here, 0.0, shift - torch.tensor(float(columns)).log())
    _, got = check(logits, ids, teacher_of(ids), "forward_kl", backend)
    assert (got.masked_fill(here, 0.0).abs().amax(-1) > 1e-6).all()
    stats = kk.topk_token_stats(on(DEVICE, logits), on(DEVICE, ids), check=False, backend=backend)
    wanted = kk.topk_token_stats(logits.double(), ids, backend="reference")
    assert torch.allclose(stats.tail_logprob.cpu().double(), wanted.tail_logprob, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("backend", CUDA)
def test_many_labels(backend: str, columns: int) -> None:
    """Statistics and their gradient from coefficients that come later."""
    ids = some_ids(4, columns, min(1024, columns // 3))
    logits, weights = rows(4, columns), [torch.randn(4, ids.shape[1]), torch.randn(4), torch.randn(4)]

    def both(leaf: Tensor, device: str, name: str) -> tuple[list[Tensor], Tensor]:
        out = kk.topk_token_stats(
            leaf, on(device, ids), stats=("topk_logprobs", "tail_logprob", "entropy"), check=False, backend=name
        )  # fmt: skip
        values = [torch.where(x == -torch.inf, 0.0, x) for x in out.values()]
        total = sum((on(device, w).to(x.dtype) * x).sum() for w, x in zip(weights, values, strict=True))
        assert isinstance(total, Tensor)
        return [x.detach().cpu() for x in values], torch.autograd.grad(total, leaf)[0].cpu()

    got, dlogits = both(on(DEVICE, logits).requires_grad_(), DEVICE, backend)
    expected, wanted = both(logits.double().requires_grad_(), "cpu", "reference")
    for one, other in zip(got, expected, strict=True):
        assert torch.allclose(one.double(), other, rtol=1e-5, atol=1e-5)
    assert ((dlogits.double() - wanted).abs() <= 3e-5 * wanted.abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("backend", CUDA)
def test_same_bits(backend: str, columns: int) -> None:
    """Twice, alone, and among many."""
    ids = some_ids(7, columns, 40)
    theirs, logits = teacher_of(ids), rows(7, columns, dtype=torch.bfloat16)
    _, first = gradient(on(DEVICE, logits).requires_grad_(), ids, theirs, "js", backend)
    for count in (1, 300):
        many, more, most = (x.repeat(count, *(1,) * (x.dim() - 1)) for x in (logits, ids, theirs))
        _, again = gradient(on(DEVICE, many).requires_grad_(), more, most, "js", backend)
        assert torch.equal(again, first.repeat(count, 1))
    for row in range(7):
        one = slice(row, row + 1)
        _, alone = gradient(on(DEVICE, logits[one]).requires_grad_(), ids[one], theirs[one], "js", backend)
        assert torch.equal(alone, first[one])
