"""Top-k divergences against float64 formulas on the k tokens and the rest."""

from __future__ import annotations

import pytest
import torch
from checks import BACKENDS, DIVERGENCES, taken, with_parameters
from topk_formulas import TAILS, K, N, V, check, divergence, log_outcomes, problem

import kldiv_kernels as kk

RAW = ["forward_kl", "reverse_kl", "jeffreys", "cross_entropy"]
KINDS = [(tail, *case) for tail in TAILS for case in with_parameters(DIVERGENCES) if tail != "none" or case[0] in RAW]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tail", "kind", "alpha", "beta"), KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_divergences(backend: str, tail: str, kind: str, alpha: float, beta: float, dtype: torch.dtype) -> None:
    logits, ids, logprobs = problem(dtype)
    leaf = logits.double().requires_grad_()
    logits.requires_grad_()
    got = kk.topk_divergence_loss(
        logits,
        ids,
        logprobs,
        kind,
        tail=tail,
        **taken(kind, alpha, beta),
        temperature=1.3,
        reduction="none",
        backend=backend,
    )
    expected = divergence(kind, *log_outcomes(leaf, ids, logprobs, tail, 1.3), tail, alpha, beta)
    if tail == "renormalize_teacher" and (expected > 50).all():
        # Infinite where p has no mass, which the teacher here has only on its k tokens.
        assert (got == torch.inf).all()
        return
    check(got, logits, expected, leaf)


@pytest.mark.parametrize("captured", [1 - 1e-7, 1 - 1e-12, 1e-7], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_next_to_all_and_next_to_nothing_captured(backend: str, captured: float) -> None:
    """The rest has its digits, and its gradient: TRL's floor of 1e-7 leaves it a constant."""
    base = torch.randn(N, V, dtype=torch.float64)
    ids = torch.stack([torch.randperm(V)[:K] for _ in range(N)])
    inside = torch.zeros(N, V, dtype=torch.bool).scatter_(1, ids, True)
    logq = torch.where(inside, base, -torch.inf).log_softmax(-1) + torch.tensor(captured, dtype=torch.float64).log()
    rest = torch.where(inside, -torch.inf, base).log_softmax(-1) + torch.tensor(-captured, dtype=torch.float64).log1p()
    logits = torch.where(inside, logq, rest).float().requires_grad_()
    leaf = logits.detach().double().requires_grad_()
    teacher = torch.full((N, K), 0.9 / K).log()
    out = kk.topk_token_stats(logits, ids, backend=backend)
    left = torch.where(inside, -torch.inf, leaf.log_softmax(-1)).logsumexp(-1)
    assert torch.allclose(out.tail_logprob.double(), left, rtol=1e-6, atol=2e-6)
    got = kk.topk_divergence_loss(logits, ids, teacher, reduction="none", backend=backend)
    check(got, logits, divergence("forward_kl", *log_outcomes(leaf, ids, teacher, "bucket", 1.0), "bucket", 0, 0), leaf)


@pytest.mark.parametrize("k", [1, 8, V])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes(backend: str, k: int) -> None:
    logits, ids, logprobs = problem(k=k)
    leaf = logits.double().requires_grad_()
    logits.requires_grad_()
    tail = "renormalize" if k == V else "bucket"
    got = kk.topk_divergence_loss(logits, ids, logprobs, "js", tail=tail, reduction="none", backend=backend)
    check(got, logits, divergence("js", *log_outcomes(leaf, ids, logprobs, tail, 1.0), tail, 0.5, 0.5), leaf)
    if k < V:
        return
    # The whole vocabulary: a bucket without anything in it.
    full = kk.topk_divergence_loss(logits, ids, logprobs, "js", reduction="none", backend=backend)
    assert torch.allclose(full, got, rtol=1e-5, atol=1e-6)
    assert (kk.topk_token_stats(logits, ids, backend=backend).tail_logprob == -torch.inf).all()
    assert torch.autograd.grad(full.sum(), logits)[0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_whole_vocabulary_has_no_rest(backend: str) -> None:
    """What rounding leaves of 1 − Σ p is not an outcome that the student fails to have."""
    logits, ids, _ = problem(k=V)
    logprobs = (logits.gather(1, ids) + torch.randn(N, V)).log_softmax(-1) - 1e-6
    full = kk.topk_divergence_loss(logits, ids, logprobs, reduction="none", backend=backend)
    assert torch.allclose(full, kk.topk_divergence_loss(
        logits, ids, logprobs, tail="renormalize", reduction="none", backend=backend
    ), rtol=1e-5)  # fmt: skip
    names = ("logprob", "topk_logprobs", "tail_logprob")
    out = kk.topk_token_stats(logits, ids, ids[:, 3], stats=names, backend=backend)
    assert list(out) == list(names)
    assert torch.allclose(out.logprob, out.topk_logprobs[:, 3], rtol=1e-6)
    one = kk.topk_token_stats(logits, ids, ids[:, 3], stats=names[:1], backend=backend)
    assert torch.equal(one.logprob, out.logprob)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pads_and_minus_infinity_are_nobody(backend: str) -> None:
    logits, ids, logprobs = problem()
    logits.requires_grad_()
    plain = kk.topk_divergence_loss(logits, ids, logprobs, reduction="none", backend=backend)
    padded_ids = torch.cat([ids, torch.full((N, 2), -1)], -1).int()
    padded = torch.cat([logprobs, torch.tensor([torch.nan, 3.0]).expand(N, 2)], -1)
    again = kk.topk_divergence_loss(logits, padded_ids, padded, reduction="none", backend=backend)
    assert torch.allclose(again, plain, rtol=1e-6)
    (first,), (second,) = (torch.autograd.grad(x.sum(), logits) for x in (plain, again))
    assert torch.allclose(first, second, rtol=1e-5, atol=1e-8)
    # A token that the teacher never has: as if it were not there, but that the student's mass there counts.
    never = logprobs.clone()
    never[:, 0] = -torch.inf
    loss = kk.topk_divergence_loss(
        logits, ids, never, "reverse_kl", tail="renormalize", reduction="none", backend=backend
    )
    assert (loss == torch.inf).all()
    loss = kk.topk_divergence_loss(logits, ids, never, "js", tail="renormalize", reduction="sum", backend=backend)
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_reductions_and_masks(backend: str, reduction: str) -> None:
    logits, ids, logprobs = (x.unflatten(0, (2, 3)) for x in problem())
    mask, weight = torch.tensor([[1, 1, 0], [1, 0, 1]]), torch.rand(2, 3)
    labels = torch.tensor([[1, -100, 1], [1, 1, 1]])
    logits = torch.where(mask[..., None] != 0, logits, torch.nan).requires_grad_()
    each = kk.topk_divergence_loss(logits, ids, logprobs, mask=mask, reduction="none", backend=backend)
    got = kk.topk_divergence_loss(
        logits, ids, logprobs, mask=mask, labels=labels, weight=weight, reduction=reduction, temperature_squared=True,
        backend=backend,
    )  # fmt: skip
    kept = torch.where((mask != 0) & (labels != -100), weight * each, 0.0)
    expected = {"mean": kept.sum() / 3, "sum": kept.sum(), "none": kept}[reduction]
    assert torch.allclose(got, expected, rtol=1e-6)
    (gradient,) = torch.autograd.grad(got.sum(), logits)
    assert not gradient[(mask == 0) | (labels == -100)].any()
    assert gradient[0, 0].any()
    none = kk.topk_divergence_loss(logits, ids, logprobs, mask=torch.zeros_like(mask), backend=backend)
    assert none.item() == 0


@pytest.mark.parametrize("support", ["teacher", "student", "union"])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_from_logits(backend: str, tail: str, support: str) -> None:
    logits = (2 * torch.randn(N, V)).requires_grad_()
    reference = logits.detach() + torch.randn(N, V)
    leaf = logits.detach().double().requires_grad_()
    of_student, of_teacher = (x.topk(K, -1).indices for x in (logits, reference))
    got = kk.topk_divergence_from_logits(
        logits, reference, k=K, support=support, tail=tail, temperature=1.2, reference_temperature=0.9,
        reduction="none", backend=backend,
    )  # fmt: skip
    values = []
    for row in range(N):
        ids = {"teacher": of_teacher[row], "student": of_student[row]}.get(
            support, torch.cat([of_teacher[row], of_student[row]]).unique()
        )
        logprobs = (reference[row].double() / 0.9).log_softmax(-1)[ids]
        outcomes = log_outcomes(leaf[row][None], ids[None], logprobs[None], tail, 1.2)
        values.append(divergence("forward_kl", *outcomes, tail, 0.5, 0.5))
    check(got, logits, torch.cat(values), leaf)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend: str, tail: str) -> None:
    logits = torch.zeros(2, 0, 8, requires_grad=True)
    loss = kk.topk_divergence_loss(
        logits, torch.zeros(2, 0, 3, dtype=torch.int64), torch.zeros(2, 0, 3), tail=tail, backend=backend
    )
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_whatever_the_teacher_came_in(backend: str) -> None:
    """Dtypes, and ids that lie in memory in another order."""
    logits, ids, logprobs = problem()
    logits.requires_grad_()
    plain = kk.topk_divergence_loss(logits, ids, logprobs, backend=backend)
    for other in (logprobs.double(), logprobs.T.contiguous().T):
        assert torch.equal(kk.topk_divergence_loss(logits, ids.T.contiguous().T, other, backend=backend), plain)
    half = kk.topk_divergence_loss(logits, ids, logprobs.half(), backend=backend)
    assert torch.allclose(half, plain, rtol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_union_of_more_tokens_than_there_are(backend: str) -> None:
    logits, reference = torch.randn(3, 6), torch.randn(3, 6)
    got = kk.topk_divergence_from_logits(
        logits, reference, k=5, support="union", vocab_size=6, reduction="none", backend=backend
    )
    wanted = kk.forward_kl(logits, reference, reduction="none")
    # One token is left at most: an outcome by itself.
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-6)
