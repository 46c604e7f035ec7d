"""Top-k divergences whose gradient comes out of the pass over the logits, against the composed form in float64.

The composed form is tested against formulas (test_topk.py) and against others' functions (test_topk_parity.py).
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from checks import BACKENDS, CUDA_ON_HOST, DIVERGENCES, taken, with_parameters
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.backends import OneReadTopK, get

ONE_READ_BACKENDS = [name for name in BACKENDS if isinstance(get(name), OneReadTopK)]
TAILS = ["bucket", "renormalize", "renormalize_teacher"]
N, V, K = 6, 136, 7


def _batch(dtype: torch.dtype = torch.float32, rows: int = N, columns: int = V, k: int = K) -> dict[str, Tensor]:
    """Student logits, and of a teacher nearby k tokens in no order; one row has one token less."""
    logits = (2 * torch.randn(rows, columns)).to(dtype)
    teacher = (logits.float() + torch.randn(rows, columns)).log_softmax(-1)
    ids = teacher.topk(k, dim=-1).indices
    ids = ids.gather(1, torch.rand(ids.shape).argsort(1))
    logprobs = teacher.gather(1, ids)
    if k > 1:
        ids[1, 0] = -1
    return {"logits": logits, "topk_ids": ids, "topk_logprobs": logprobs}


def _gradient(loss: Tensor, logits: Tensor) -> Tensor:
    """Of three times the loss: a factor that comes from above."""
    (gradient,) = torch.autograd.grad(3 * loss, logits)
    return gradient


def _tokens(**options: Any) -> float:
    valid = options.get("mask", torch.ones(N)) != 0
    if "labels" in options:
        valid &= options["labels"] != -100
    return float(options.get("normalizer", valid.sum()))


def _check(batch: dict[str, Tensor], backend: str, passes: list[str], form: str = "topk_loss", **options: Any) -> None:
    logits = batch["logits"].detach().requires_grad_()
    exact = batch["logits"].detach().double().requires_grad_()
    passes.clear()
    got = kk.topk_divergence_loss(**{**batch, "logits": logits}, backend=backend, **options)
    assert passes == [form]
    # Not reduced, it is composed.
    reduction = options.pop("reduction", "mean")
    each = kk.topk_divergence_loss(**{**batch, "logits": exact}, backend="reference", **options, reduction="none")
    wanted = each.sum() / (1 if reduction == "sum" else _tokens(**options))
    assert torch.allclose(got.double(), wanted.double(), rtol=2e-5, atol=2e-6)
    if wanted.isinf():
        # A teacher without mass on the rest. What each column's gradient is then is the composed form's affair.
        each = kk.topk_divergence_loss(**{**batch, "logits": logits}, backend=backend, **options, reduction="none")
        assert torch.equal(_gradient(got, logits).isfinite(), _gradient(each.sum(), logits).isfinite())
        return
    mine, theirs = _gradient(got, logits), _gradient(wanted, exact)
    assert mine.dtype == logits.dtype
    largest = theirs.abs().amax(-1, keepdim=True)
    assert (largest > 0).any() or wanted == 0 or options.get("alpha") == 1
    rounding = 0 if logits.dtype == torch.float32 else torch.finfo(logits.dtype).eps
    assert ((mine.double() - theirs).abs() <= 3e-5 * largest + 1e-6 + rounding * theirs.abs()).all()


KINDS = [(tail, *case) for tail in TAILS for case in with_parameters(DIVERGENCES)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tail", "kind", "alpha", "beta"), KINDS)
@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_divergences(
    backend: str, tail: str, kind: str, alpha: float, beta: float, dtype: torch.dtype, plan: None, passes: list[str]
) -> None:
    batch = _batch(dtype)
    _check(batch, backend, passes, kind=kind, tail=tail, **taken(kind, alpha, beta), temperature=1.3)


OPTIONS: dict[str, dict[str, Any]] = {
    "sum": {"reduction": "sum"},
    "normalizer": {"normalizer": torch.tensor(17.0)},
    "weight": {"weight": torch.tensor([1.0, 0.0, -2.0, 0.5, 3.0, 1.0])},
    "mask": {"mask": torch.tensor([1, 0, 1, 1, 0, 1])},
    "labels": {"labels": torch.tensor([3, -100, 1, 1, 2, -100])},
    "temperatures": {"temperature": torch.linspace(0.5, 2, N), "temperature_squared": True},
    "vocabulary": {"vocab_size": 120},
    "tail": {"tail_logprob": torch.full((N,), 0.3).log()},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_options(backend: str, name: str, plan: None, passes: list[str]) -> None:
    batch = _batch()
    if name == "vocabulary":
        batch["topk_ids"] = torch.stack([torch.randperm(120)[:K] for _ in range(N)])
    _check(batch, backend, passes, kind="js", **OPTIONS[name])


@pytest.mark.parametrize("k", [1, 8, V])
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_sizes(backend: str, tail: str, k: int, plan: None, passes: list[str]) -> None:
    """One token alone is renormalised to 1: no divergence, and no gradient."""
    batch = _batch(k=k)
    if k == V:
        batch["topk_ids"][1, 0] = (set(range(V)) - set(batch["topk_ids"][1].tolist())).pop()
        batch["topk_logprobs"] = batch["topk_logprobs"].log_softmax(-1)
    _check(batch, backend, passes, kind="js", tail=tail)


@pytest.mark.parametrize("captured", [1 - 1e-7, 1 - 1e-12, 1e-7], ids=str)
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js"])
@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_next_to_all_and_next_to_nothing_captured(
    backend: str, kind: str, captured: float, plan: None, passes: list[str]
) -> None:
    base = torch.randn(N, V, dtype=torch.float64)
    batch = _batch()
    batch["topk_ids"] = torch.stack([torch.randperm(V)[:K] for _ in range(N)])
    inside = torch.zeros(N, V, dtype=torch.bool).scatter_(1, batch["topk_ids"], True)
    exact = torch.tensor(captured, dtype=torch.float64)
    logq = torch.where(inside, base, -torch.inf).log_softmax(-1) + exact.log()
    rest = torch.where(inside, -torch.inf, base).log_softmax(-1) + (-exact).log1p()
    batch["logits"] = torch.where(inside, logq, rest).float()
    batch["topk_logprobs"] = torch.full((N, K), 0.9 / K).log()
    _check(batch, backend, passes, kind=kind, reduction="sum")


@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_few_long_rows(backend: str, passes: list[str]) -> None:
    """Rows that are shared by threads, with labels at the borders of tiles, blocks and slices."""
    columns = 40_000
    batch = _batch(rows=2, columns=columns, k=32)
    edges = torch.tensor([0, 2047, 2048, 8191, 8192, 16383, 16384, 32767, 32768, columns - 1])
    for row in batch["topk_ids"]:
        row[:] = torch.cat([edges, torch.arange(100, 100 + len(row) - len(edges))])
    _check(batch, backend, passes, kind="js", reduction="sum")


@pytest.mark.parametrize("kind", ["forward_kl", "js"])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_minus_infinity(backend: str, kind: str, tail: str, plan: None, passes: list[str]) -> None:
    """Columns that the student excludes, tokens that the teacher excludes, and one that both do."""
    batch = _batch()
    outside = (batch["topk_logprobs"].exp().sum(-1) < 2).nonzero()[:, 0]
    for row in outside.tolist():
        batch["logits"][row, [c for c in range(V) if c not in batch["topk_ids"][row]][:20]] = -torch.inf
    batch["topk_logprobs"][2, 3] = -torch.inf
    batch["topk_logprobs"][4, 0] = -torch.inf
    batch["logits"][4, batch["topk_ids"][4, 0]] = -torch.inf
    _check(batch, backend, passes, kind=kind, tail=tail)


@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_an_infinite_divergence_keeps_the_gradient_of_its_formula(backend: str, plan: None) -> None:
    """A token of the teacher's that the student excludes: D is infinite, its gradient by the others is not."""
    batch = _batch()
    batch["logits"][2, batch["topk_ids"][2, 1]] = -torch.inf
    logits = batch["logits"].requires_grad_()
    loss = kk.topk_divergence_loss(**batch, reduction="sum", backend=backend)
    each = kk.topk_divergence_loss(**batch, reduction="none", backend=backend)
    assert loss == torch.inf
    one, several = _gradient(loss, logits), _gradient(each.sum(), logits)
    assert torch.allclose(one, several, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert one[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_rows_apart(backend: str, plan: None) -> None:
    """A row of NaN has NaN, and no other row knows of it, nor which batch it is in."""
    batch = _batch()
    batch["logits"][0] = torch.nan
    logits = batch["logits"].requires_grad_()
    loss = kk.topk_divergence_loss(**batch, kind="js", normalizer=5.0, backend=backend)
    got = _gradient(loss, logits)
    assert loss.isnan()
    assert got[0].isnan().all()
    assert got[1:].isfinite().all()
    fewer = {name: value[2:].detach() for name, value in batch.items()}
    alone = fewer["logits"].requires_grad_()
    again = _gradient(kk.topk_divergence_loss(**fewer, kind="js", normalizer=5.0, backend=backend), alone)
    assert torch.equal(got[2:], again)


@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_all_masked(backend: str, plan: None) -> None:
    batch = _batch()
    logits = batch["logits"].fill_(torch.nan).requires_grad_()
    loss = kk.topk_divergence_loss(**batch, mask=torch.zeros(N, dtype=torch.bool), backend=backend)
    assert loss == 0
    assert not _gradient(loss, logits).any()


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "none"}, {"tail": "none", "kind": "jeffreys"},
        {"kind": "js", "beta": torch.full((N,), 0.3)}, {"kind": "renyi", "alpha": torch.full((N,), 0.3)},
        {"normalizer": torch.tensor(3.0, requires_grad=True)},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_what_takes_two_passes(backend: str, options: dict[str, Any], passes: list[str]) -> None:
    batch = _batch()
    logits = batch["logits"].requires_grad_()
    loss = kk.topk_divergence_loss(**batch, backend=backend, **options)
    assert passes[0] == "statistics"
    assert _gradient(loss.sum(), logits).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["mean", *OPTIONS])
@pytest.mark.parametrize("kind", ["forward_kl", "cross_entropy"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_whose_gradient_is_known_beforehand(
    backend: str, kind: str, name: str, dtype: torch.dtype, passes: list[str]
) -> None:
    if name == "tail":
        pytest.skip("a raw sum has none")
    batch = _batch(dtype)
    if name == "vocabulary":
        batch["topk_ids"] = torch.stack([torch.randperm(120)[:K] for _ in range(N)])
    batch["topk_logprobs"][0, 2] = -torch.inf
    batch["logits"][0, batch["topk_ids"][0, 2]] = -torch.inf
    _check(batch, backend, passes, "loss", kind=kind, tail="none", **OPTIONS.get(name, {}))


@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_float16_waits_for_the_loss_scale(backend: str, passes: list[str]) -> None:
    """A gradient below float16's numbers, until it is scaled."""
    batch = _batch(torch.float16)
    logits = batch["logits"].requires_grad_()
    exact = logits.detach().double().requires_grad_()
    loss = kk.topk_divergence_loss(**batch, normalizer=1e8, backend=backend)
    assert "topk_loss" not in passes
    wanted = kk.topk_divergence_loss(**{**batch, "logits": exact}, normalizer=1e8, backend="reference")
    mine, theirs = _gradient(2**20 * loss, logits), _gradient(2**20 * wanted, exact)
    assert (mine.double() - theirs).abs().max() <= 2e-3 * theirs.abs().max()
    assert theirs.any()


@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_without_gradient_there_is_none(backend: str, passes: list[str]) -> None:
    assert not kk.topk_divergence_loss(**_batch(), backend=backend).requires_grad
    assert "topk_loss" not in passes


@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_the_logits_are_not_kept(backend: str) -> None:
    batch = _batch()
    leaf = batch["logits"].requires_grad_()
    logits = leaf * 1
    alive = weakref.ref(logits)
    loss = kk.topk_divergence_loss(logits, batch["topk_ids"], batch["topk_logprobs"], backend=backend)
    del logits
    gc.collect()
    assert alive() is None
    assert _gradient(loss, leaf).any()


@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_a_kept_graph_gives_the_same_gradient_again(backend: str) -> None:
    batch = _batch()
    logits = batch["logits"].requires_grad_()
    loss = kk.topk_divergence_loss(**batch, backend=backend) / 3
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(kk.topk_divergence_loss(**batch, backend=backend), logits, create_graph=True)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_operator(backend: str, tail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema and fake, as torch.library checks them."""
    calls: list[tuple[Any, ...]] = []
    real = torch.ops.kldiv_kernels.topk
    monkeypatch.setattr(
        torch.ops.kldiv_kernels, "topk", lambda *arguments: (calls.append(arguments), real(*arguments))[1]
    )
    batch = _batch()
    batch["logits"].requires_grad_()
    kk.topk_divergence_loss(**batch, tail=tail, backend=backend)
    monkeypatch.undo()
    torch.library.opcheck(real.default, calls[0])


@pytest.mark.skipif(CUDA_ON_HOST, reason="the operators are the same")
@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_torch_compile(backend: str) -> None:
    batch = _batch()
    logits = batch.pop("logits").requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return kk.topk_divergence_loss(x, **batch, kind="js", backend=backend)

    eager = _gradient(loss(logits), logits)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(logits)
    assert torch.allclose(_gradient(compiled, logits), eager, rtol=1e-6, atol=1e-9)
