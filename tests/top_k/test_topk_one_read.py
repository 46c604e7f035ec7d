"""Top-k divergences whose gradient comes out of the pass over the logits, against the composed form in float64.

The composed form is tested against formulas (test_topk.py) and against others' functions (test_topk_parity.py).
"""

from __future__ import annotations

import pytest
import torch
from checks import DIVERGENCES, taken, with_parameters
from topk_two_forms import ONE_READ_BACKENDS, OPTIONS, TAILS, K, N, V, check, gradient_of, some_batch

import kldiv_kernels as kk

KINDS = [(tail, *case) for tail in TAILS for case in with_parameters(DIVERGENCES)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tail", "kind", "alpha", "beta"), KINDS)
@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_divergences(
    backend: str, tail: str, kind: str, alpha: float, beta: float, dtype: torch.dtype, plan: None, passes: list[str]
) -> None:
    batch = some_batch(dtype)
    check(batch, backend, passes, kind=kind, tail=tail, **taken(kind, alpha, beta), temperature=1.3)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_options(backend: str, name: str, plan: None, passes: list[str]) -> None:
    batch = some_batch()
    if name == "vocabulary":
        batch["topk_ids"] = torch.stack([torch.randperm(120)[:K] for _ in range(N)])
    check(batch, backend, passes, kind="js", **OPTIONS[name])


@pytest.mark.parametrize("k", [1, 8, V])
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_sizes(backend: str, tail: str, k: int, plan: None, passes: list[str]) -> None:
    """One token alone is renormalised to 1: no divergence, and no gradient."""
    batch = some_batch(k=k)
    if k == V:
        batch["topk_ids"][1, 0] = (set(range(V)) - set(batch["topk_ids"][1].tolist())).pop()
        batch["topk_logprobs"] = batch["topk_logprobs"].log_softmax(-1)
    check(batch, backend, passes, kind="js", tail=tail)


@pytest.mark.parametrize("captured", [1 - 1e-7, 1 - 1e-12, 1e-7], ids=str)
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js"])
@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_next_to_all_and_next_to_nothing_captured(
    backend: str, kind: str, captured: float, plan: None, passes: list[str]
) -> None:
    base = torch.randn(N, V, dtype=torch.float64)
    batch = some_batch()
    batch["topk_ids"] = torch.stack([torch.randperm(V)[:K] for _ in range(N)])
    inside = torch.zeros(N, V, dtype=torch.bool).scatter_(1, batch["topk_ids"], True)
    exact = torch.tensor(captured, dtype=torch.float64)
    logq = torch.where(inside, base, -torch.inf).log_softmax(-1) + exact.log()
    rest = torch.where(inside, -torch.inf, base).log_softmax(-1) + (-exact).log1p()
    batch["logits"] = torch.where(inside, logq, rest).float()
    batch["topk_logprobs"] = torch.full((N, K), 0.9 / K).log()
    check(batch, backend, passes, kind=kind, reduction="sum")


@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_few_long_rows(backend: str, passes: list[str]) -> None:
    """Rows that are shared by threads, with labels at the borders of tiles, blocks and slices."""
    columns = 40_000
    batch = some_batch(rows=2, columns=columns, k=32)
    edges = torch.tensor([0, 2047, 2048, 8191, 8192, 16383, 16384, 32767, 32768, columns - 1])
    for row in batch["topk_ids"]:
        row[:] = torch.cat([edges, torch.arange(100, 100 + len(row) - len(edges))])
    check(batch, backend, passes, kind="js", reduction="sum")


@pytest.mark.parametrize("kind", ["forward_kl", "js"])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_minus_infinity(backend: str, kind: str, tail: str, plan: None, passes: list[str]) -> None:
    """Columns that the student excludes, tokens that the teacher excludes, and one that both do."""
    batch = some_batch()
    outside = (batch["topk_logprobs"].exp().sum(-1) < 2).nonzero()[:, 0]
    for row in outside.tolist():
        batch["logits"][row, [c for c in range(V) if c not in batch["topk_ids"][row]][:20]] = -torch.inf
    batch["topk_logprobs"][2, 3] = -torch.inf
    batch["topk_logprobs"][4, 0] = -torch.inf
    batch["logits"][4, batch["topk_ids"][4, 0]] = -torch.inf
    check(batch, backend, passes, kind=kind, tail=tail)


@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_an_infinite_divergence_keeps_the_gradient_of_its_formula(backend: str, plan: None) -> None:
    """A token of the teacher's that the student excludes: D is infinite, its gradient by the others is not."""
    batch = some_batch()
    batch["logits"][2, batch["topk_ids"][2, 1]] = -torch.inf
    logits = batch["logits"].requires_grad_()
    loss = kk.topk_divergence_loss(**batch, reduction="sum", backend=backend)
    each = kk.topk_divergence_loss(**batch, reduction="none", backend=backend)
    assert loss == torch.inf
    one, several = gradient_of(loss, logits), gradient_of(each.sum(), logits)
    assert torch.allclose(one, several, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert one[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_rows_apart(backend: str, plan: None) -> None:
    """A row of NaN has NaN, and no other row knows of it, nor which batch it is in."""
    batch = some_batch()
    batch["logits"][0] = torch.nan
    logits = batch["logits"].requires_grad_()
    loss = kk.topk_divergence_loss(**batch, kind="js", normalizer=5.0, backend=backend)
    got = gradient_of(loss, logits)
    assert loss.isnan()
    assert got[0].isnan().all()
    assert got[1:].isfinite().all()
    fewer = {name: value[2:].detach() for name, value in batch.items()}
    alone = fewer["logits"].requires_grad_()
    again = gradient_of(kk.topk_divergence_loss(**fewer, kind="js", normalizer=5.0, backend=backend), alone)
    assert torch.equal(got[2:], again)


@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_all_masked(backend: str, plan: None) -> None:
    batch = some_batch()
    logits = batch["logits"].fill_(torch.nan).requires_grad_()
    loss = kk.topk_divergence_loss(**batch, mask=torch.zeros(N, dtype=torch.bool), backend=backend)
    assert loss == 0
    assert not gradient_of(loss, logits).any()
