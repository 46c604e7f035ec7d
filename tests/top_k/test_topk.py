"""Top-k divergences and statistics against float64 formulas on the k tokens and the rest."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from checks import BACKENDS, DIVERGENCES, taken, with_parameters
from torch import Tensor

import kldiv_kernels as kk

TAILS = ["bucket", "renormalize", "renormalize_teacher", "none"]
RAW = ["forward_kl", "reverse_kl", "jeffreys", "cross_entropy"]
N, V, K = 6, 70, 5


def _case(dtype: torch.dtype = torch.float32, columns: int = V, k: int = K) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits, the teacher's k tokens in no order, and their log-probabilities."""
    logits = (2 * torch.randn(N, columns)).to(dtype)
    teacher = (logits.float() + torch.randn(N, columns)).log_softmax(-1)
    ids = teacher.topk(k, dim=-1).indices
    ids = ids.gather(1, torch.rand(ids.shape).argsort(1))
    return logits, ids, teacher.gather(1, ids)


def _outcomes(logits: Tensor, ids: Tensor, logprobs: Tensor, tail: str, tau: float) -> tuple[Tensor, Tensor]:
    """log q and log p over the outcomes, float64."""
    logq = (logits / tau).log_softmax(-1)
    student, teacher = logq.gather(1, ids), logprobs.double()
    if tail in ("renormalize", "none"):
        return (student, teacher) if tail == "none" else (student.log_softmax(-1), teacher.log_softmax(-1))
    others = torch.ones_like(logits, dtype=torch.bool).scatter_(1, ids, False)
    rest = torch.where(others, logq, -torch.inf).logsumexp(-1, keepdim=True)
    left = torch.log1p(-teacher.exp().sum(-1, keepdim=True))
    if tail == "renormalize_teacher":
        # A limit: next to nothing is nothing.
        teacher, left = teacher.log_softmax(-1), torch.full_like(left, -700.0)
    return torch.cat([student, rest], -1), torch.cat([teacher, left], -1)


def _divergence(kind: str, logq: Tensor, logp: Tensor, tail: str, alpha: float, beta: float) -> Tensor:
    if tail == "none":
        forward, reverse = (logp.exp() * (logp - logq)).sum(-1), (logq.exp() * (logq - logp)).sum(-1)
        return {
            "forward_kl": forward, "reverse_kl": reverse, "jeffreys": forward + reverse,
            "cross_entropy": -(logp.exp() * logq).sum(-1),
        }[kind]  # fmt: skip
    parameters = [torch.full((len(logq), 1), x, dtype=torch.float64) for x in (alpha, beta)]
    none = torch.zeros(len(logq), 1, dtype=torch.int64)
    return oracle.FORMULAS[kind](oracle.Rows(logq, logp, logq, *parameters, none))


def _check(got: Tensor, logits: Tensor, expected: Tensor, leaf: Tensor) -> None:
    """Values [N], and the gradients of their sum weighted by row."""
    assert torch.allclose(got.double(), expected, rtol=2e-5, atol=2e-6)
    weights = torch.rand(N) + 0.5
    (mine,) = torch.autograd.grad((weights * got).sum(), logits)
    (wanted,) = torch.autograd.grad((weights.double() * expected).sum(), leaf)
    largest = wanted.abs().amax(-1, keepdim=True)
    # Skewed all the way a divergence is that of a distribution from itself.
    assert (largest > 0).all() or not expected.any()
    rounding = 0 if logits.dtype == torch.float32 else torch.finfo(logits.dtype).eps
    assert ((mine.double() - wanted).abs() <= 3e-5 * largest + 1e-6 + rounding * wanted.abs()).all()


KINDS = [(tail, *case) for tail in TAILS for case in with_parameters(DIVERGENCES) if tail != "none" or case[0] in RAW]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tail", "kind", "alpha", "beta"), KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_divergences(backend: str, tail: str, kind: str, alpha: float, beta: float, dtype: torch.dtype) -> None:
    logits, ids, logprobs = _case(dtype)
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
    expected = _divergence(kind, *_outcomes(leaf, ids, logprobs, tail, 1.3), tail, alpha, beta)
    if tail == "renormalize_teacher" and (expected > 50).all():
        # Infinite where p has no mass, which the teacher here has only on its k tokens.
        assert (got == torch.inf).all()
        return
    _check(got, logits, expected, leaf)


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
    _check(got, logits, _divergence("forward_kl", *_outcomes(leaf, ids, teacher, "bucket", 1.0), "bucket", 0, 0), leaf)


@pytest.mark.parametrize("k", [1, 8, V])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes(backend: str, k: int) -> None:
    logits, ids, logprobs = _case(k=k)
    leaf = logits.double().requires_grad_()
    logits.requires_grad_()
    tail = "renormalize" if k == V else "bucket"
    got = kk.topk_divergence_loss(logits, ids, logprobs, "js", tail=tail, reduction="none", backend=backend)
    _check(got, logits, _divergence("js", *_outcomes(leaf, ids, logprobs, tail, 1.0), tail, 0.5, 0.5), leaf)
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
    logits, ids, _ = _case(k=V)
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
    logits, ids, logprobs = _case()
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
    logits, ids, logprobs = (x.unflatten(0, (2, 3)) for x in _case())
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_of_one_pass(backend: str) -> None:
    logits, ids, _ = _case()
    labels = ids[:, 0].clone()
    labels[3:5] = torch.tensor([0, 1])
    labels[5] = -100
    logits.requires_grad_()
    names = ("topk_logprobs", "tail_logprob", "logprob", "entropy", "logsumexp")
    out = kk.topk_token_stats(logits, ids, labels, stats=names, temperature=0.7, backend=backend)
    leaf = logits.detach().double().requires_grad_()
    logq, rest = (leaf / 0.7).log_softmax(-1), torch.ones(N, V, dtype=torch.bool).scatter_(1, ids, False)
    expected = {
        "topk_logprobs": logq.gather(1, ids),
        "tail_logprob": torch.where(rest, logq, -torch.inf).logsumexp(-1),
        "logprob": torch.where(labels < 0, 0.0, logq.gather(1, labels.clamp_min(0)[:, None])[:, 0]),
        "entropy": -(logq.exp() * logq).sum(-1),
        "logsumexp": (leaf / 0.7).logsumexp(-1),
    }
    assert list(out) == list(names)
    total, wanted = torch.zeros(()), torch.zeros((), dtype=torch.float64)
    for name, value in expected.items():
        assert torch.allclose(out[name].double(), value, rtol=1e-5, atol=1e-6), name
        weights = torch.randn(value.shape)
        total, wanted = total + (weights * out[name]).sum(), wanted + (weights.double() * value).sum()
    (mine,), (theirs,) = torch.autograd.grad(total, logits), torch.autograd.grad(wanted, leaf)
    assert (mine.double() - theirs).abs().max() <= 3e-5 * theirs.abs().max()


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
        outcomes = _outcomes(leaf[row][None], ids[None], logprobs[None], tail, 1.2)
        values.append(_divergence("forward_kl", *outcomes, tail, 0.5, 0.5))
    _check(got, logits, torch.cat(values), leaf)


@pytest.mark.parametrize("backend", BACKENDS)
def test_topk(backend: str) -> None:
    logits = torch.randn(2, 3, V, requires_grad=True)
    top = kk.topk(logits, 4, temperature=0.8, vocab_size=60, backend=backend)
    expected = (logits[..., :60] / 0.8).log_softmax(-1).topk(4, -1)
    assert torch.equal(top.ids, expected.indices)
    assert torch.allclose(top.values, expected.values, atol=1e-6)
    assert torch.allclose(top.log_mass, expected.values.logsumexp(-1), atol=1e-6)
    weights = torch.randn(2, 3)
    mine, theirs = (
        torch.autograd.grad((weights * x).sum(), logits)[0] for x in (top.log_mass, expected.values.logsumexp(-1))
    )
    assert torch.allclose(mine, theirs, atol=1e-6)
    assert theirs.any()
    mask = torch.rand(2, 3) < 0.5
    masked = kk.topk(logits, 4, mask=mask, backend=backend)
    assert not masked.log_mass[~mask].any()
    assert not masked.values[~mask].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_label_beyond_the_vocabulary(backend: str) -> None:
    logits, ids, _ = _case()
    with pytest.raises(IndexError, match=r"topk_token_stats: topk_ids or labels, in one table: .*\[0, 5\] is 70"):
        kk.topk_token_stats(logits, ids, torch.full((N,), V), stats=("logprob",), backend=backend)


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("js", {"beta": 2.0}, "beta is 2.0; expected between 0 and 1 for js"),
        ("renyi", {"alpha": 1.0}, "alpha is 1.0; expected above 0, finite and not 1"),
        ("alpha_beta", {"alpha": -0.5, "beta": 0.5}, "alpha + beta is 0.0; expected not 0"),
        ("skew_kl", {"alpha": torch.tensor([0.5, 1.5])}, "alpha is 1.5; expected between 0 and 1"),
    ],
)
def test_alpha_and_beta_are_those_of_the_kind(kind: str, options: dict[str, Any], message: str, gradient: bool) -> None:
    logits = torch.zeros(2, 8, requires_grad=gradient)
    with pytest.raises(ValueError, match="topk_divergence_loss: ") as caught:
        kk.topk_divergence_loss(logits, IDS, LOGPROBS, kind, **options)
    assert message in str(caught.value)


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
    logits, ids, logprobs = _case()
    logits.requires_grad_()
    plain = kk.topk_divergence_loss(logits, ids, logprobs, backend=backend)
    for other in (logprobs.double(), logprobs.T.contiguous().T):
        assert torch.equal(kk.topk_divergence_loss(logits, ids.T.contiguous().T, other, backend=backend), plain)
    half = kk.topk_divergence_loss(logits, ids, logprobs.half(), backend=backend)
    assert torch.allclose(half, plain, rtol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_ignored_label_among_the_tokens(backend: str) -> None:
    logits, ids, _ = _case()
    out = kk.topk_token_stats(logits, ids, ids[:, 1], stats=("logprob",), ignore_index=int(ids[2, 1]), backend=backend)
    ignored = ids[:, 1] == ids[2, 1]
    assert not out.logprob[ignored].any()
    assert (out.logprob[~ignored] < 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_union_of_more_tokens_than_there_are(backend: str) -> None:
    logits, reference = torch.randn(3, 6), torch.randn(3, 6)
    got = kk.topk_divergence_from_logits(
        logits, reference, k=5, support="union", vocab_size=6, reduction="none", backend=backend
    )
    wanted = kk.forward_kl(logits, reference, reduction="none")
    # One token is left at most: an outcome by itself.
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-6)


IDS, LOGPROBS = torch.tensor([[0, 1], [2, 3]]), torch.full((2, 2), 0.25).log()
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "id": ({"topk_ids": torch.tensor([[0, 1], [2, 8]])}, ValueError, "topk_ids[1, 1] is 8; expected 0 to 7, or -1"),
    "negative id": ({"topk_ids": torch.tensor([[0, -2], [2, 3]])}, ValueError, "topk_ids[0, 1] is -2; expected 0 to 7"),
    "twice": ({"topk_ids": torch.tensor([[0, 1], [3, 3]])}, ValueError, "topk_ids[1, 1] is 3; which occurs before"),
    "ids dtype": ({"topk_ids": IDS.float()}, TypeError, "topk_ids has dtype torch.float32; expected int64 or int32"),
    "ids type": ({"topk_ids": [[0]]}, TypeError, "topk_ids is list; expected a torch.Tensor"),
    "ids shape": ({"topk_ids": IDS[:1]}, ValueError, "topk_ids has shape [1, 2]; expected [2, 'K']"),
    "more than there are": (
        {"topk_ids": torch.arange(9).expand(2, 9)}, ValueError, "topk_ids has K = 9; expected at most 8",
    ),
    "logprobs shape": (
        {"topk_logprobs": LOGPROBS[:, :1]}, ValueError, "topk_logprobs has shape [2, 1]; expected [2, 2] like topk_ids",
    ),
    "logprobs dtype": ({"topk_logprobs": IDS}, TypeError, "topk_logprobs has dtype torch.int64; expected float32"),
    "above 0": (
        {"topk_logprobs": torch.tensor([[-1.0, -1.0], [0.5, -1.0]])}, ValueError,
        "topk_logprobs[1, 0] is 0.5; expected at most 0",
    ),
    "NaN": (
        {"topk_logprobs": torch.tensor([[-1.0, torch.nan], [-1.0, -1.0]])}, ValueError,
        "topk_logprobs[0, 1] is nan; expected at most 0",
    ),
    "more than 1": (
        {"topk_logprobs": torch.full((2, 2), 0.7).log()}, ValueError,
        "the sum of exp(topk_logprobs)[0] is 1.4; expected at most 1",
    ),
    "kind": ({"kind": "entropy"}, ValueError, "topk_divergence_loss: kind: unknown statistic 'entropy'"),
    "tail": ({"tail": "drop"}, ValueError, "tail is 'drop'; expected bucket, renormalize, renormalize_teacher or none"),
    "raw": ({"kind": "js", "tail": "none"}, ValueError, "kind is 'js'; expected forward_kl, reverse_kl, jeffreys"),
    "no tail to give": (
        {"tail": "renormalize", "tail_logprob": torch.zeros(2)}, ValueError, "tail_logprob is given, but tail is",
    ),
    "reduction": ({"reduction": "max"}, ValueError, "reduction is 'max'; expected mean, sum or none"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    options, error, message = BAD[name]
    arguments = {"logits": torch.zeros(2, 8), "topk_ids": IDS, "topk_logprobs": LOGPROBS, **options}
    with pytest.raises(error) as caught:
        kk.topk_divergence_loss(**arguments)
    assert message in str(caught.value)


def test_unchecked_values_are_not_looked_at() -> None:
    rounded = torch.full((2, 2), 0.7).log()
    assert kk.topk_divergence_loss(torch.zeros(2, 8), IDS, rounded, check=False).isfinite()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: kk.topk(x, 9), "topk: k is 9; expected 1 to 8"),
        (lambda x: kk.topk(x, 2, vocab_size=9), "topk: vocab_size is 9; expected 1 to 8"),
        (lambda x: kk.topk_divergence_from_logits(x, x, k=0), "topk_divergence_from_logits: k is 0; expected 1 to 8"),
        (lambda x: kk.topk_divergence_from_logits(x, x, k=1, support="both"), "support is 'both'; expected teacher,"),
        (lambda x: kk.topk_token_stats(x, IDS, stats=("argmax",)), "stats has 'argmax'; expected topk_logprobs,"),
        (lambda x: kk.topk_token_stats(x, IDS, stats=("logprob",)), "labels is None; logprob needs one label a token"),
    ],
)
def test_bad_calls(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        call(torch.zeros(2, 8))
