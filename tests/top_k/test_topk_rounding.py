"""Top-k teachers as they come: rounded until nothing seems left, padded with tokens that they have, or incomplete."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import BACKENDS, CUDA_ON_HOST, INTERPRETED
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.distillation import LossOptions, topk_distillation_of
from kldiv_kernels.sources import Logits

KINDS = ["forward_kl", "reverse_kl", "js", "hellinger", "reverse_chi2"]
TAILS = ["bucket", "renormalize", "renormalize_teacher", "none"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
N, V, K = 12, 72, 5


def _divergence(kind: str, p: Tensor, q: Tensor) -> Tensor:
    """By definition, of float64 distributions; 0 log 0 = 0."""
    m = (p + q) / 2

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a > 0, a * (a.clamp_min(1e-300).log() - b.clamp_min(1e-300).log()), 0.0).sum(-1)

    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "js": lambda: (kl(p, m) + kl(q, m)) / 2,
        "hellinger": lambda: (p.sqrt() - q.sqrt()).square().sum(-1) / 2,
        "reverse_chi2": lambda: ((p - q).square() / p).sum(-1),
    }[kind]()


def _bucket(kind: str, logits: Tensor, ids: Tensor, logprobs: Tensor, rest: Tensor) -> Tensor:
    """On the k tokens and the rest, the teacher's rest [N] given; p sums to 1 as a softmax does."""
    q = logits.softmax(-1)
    inside = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
    q = torch.cat([q.gather(1, ids), torch.where(inside, 0.0, q).sum(-1, keepdim=True)], -1)
    p = torch.cat([logprobs.double().exp(), rest[:, None]], -1)
    return _divergence(kind, p / p.sum(-1, keepdim=True), q)


def _gradient(loss: Tensor, logits: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, logits)
    return gradient


def _peaked(dtype: torch.dtype, rows: int = N) -> tuple[Tensor, Tensor, Tensor]:
    """A student, and a teacher of which one token has nearly everything, the last rows more and more of it."""
    teacher = torch.randn(rows, V)
    teacher[:, 7] += torch.linspace(6, 60, rows)
    logprobs, ids = teacher.log_softmax(-1).topk(K)
    return 2 * torch.randn(rows, V), ids, logprobs.to(dtype)


def _resolution(logprobs: Tensor) -> Tensor:
    """k·eps of float32, or half a unit in the last place of each log-probability times its probability."""
    given = logprobs.double()
    arithmetic = 2.0**-52 if logprobs.dtype == torch.float64 else 2.0**-23
    place = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(logprobs.dtype, 0.0)
    return (place * given.exp() * given.abs()).sum(-1).clamp_min(K * arithmetic)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_rounds_to_nothing_is_a_rest_of_its_resolution(
    backend: str, kind: str, dtype: torch.dtype, plan: None
) -> None:
    logits, ids, logprobs = _peaked(dtype)
    left = 1 - logprobs.double().exp().sum(-1)
    assert (left <= 0).any()
    leaf = logits.double().requires_grad_()
    logits.requires_grad_()
    for floor, rest in ((None, left.maximum(_resolution(logprobs))), (1e-3, left.clamp_min(1e-3))):
        wanted = _bucket(kind, leaf, ids, logprobs, rest)
        theirs = _gradient(wanted.sum(), leaf)
        options: dict[str, Any] = {"tail_floor": floor, "backend": backend}
        each = kk.topk_divergence_loss(logits, ids, logprobs, kind, reduction="none", **options)
        total = kk.topk_divergence_loss(logits, ids, logprobs, kind, reduction="sum", **options)
        assert torch.allclose(each.double(), wanted, rtol=2e-5, atol=2e-6)
        assert torch.allclose(total.double(), wanted.sum(), rtol=2e-5)
        for got in (_gradient(each.sum(), logits), _gradient(total, logits)):
            # The difference of log-ratios and their mean, which float32 knows to units of the value's size.
            bound = 3e-5 * theirs.abs().amax(-1, keepdim=True) + 1e-6 + 2.0**-22 * wanted.detach().abs()[:, None]
            assert ((got.double() - theirs).abs() <= bound).all()
    # 0 takes the rounded sum at its word, and so is a tail of 0 that is given.
    told = kk.topk_divergence_loss(logits, ids, logprobs, "reverse_kl", tail_floor=0, reduction="none", backend=backend)
    assert torch.equal(told == torch.inf, left <= 0)
    nothing = torch.full((N,), -torch.inf)
    told = kk.topk_divergence_loss(
        logits, ids, logprobs, "reverse_kl", tail_logprob=nothing, reduction="none", backend=backend
    )
    assert (told == torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_resolution_is_below_what_is_left_of_ordinary_rows(dtype: torch.dtype) -> None:
    """64 log-probabilities in bfloat16: 64 · eps would be half of the mass."""
    teacher = 2.5 * torch.randn(64, 5000)
    student = teacher + 0.3 * torch.randn(64, 5000)
    logprobs, ids = teacher.log_softmax(-1).topk(64)
    exact = kk.topk_divergence_loss(student.double(), ids, logprobs.double(), backend="reference")
    assert kk.topk_divergence_loss(student, ids, logprobs.to(dtype)).item() == pytest.approx(exact.item(), rel=0.02)


def _padded(ids: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Before, between and behind the tokens: one of them again, at -inf, in a row's own places."""
    pads = 3
    wide_ids = torch.cat([ids, ids[:, :1].expand(-1, pads)], -1)
    wide = torch.cat([logprobs, torch.full((len(ids), pads), -torch.inf)], -1)
    order = torch.rand(wide.shape).argsort(-1)
    return wide_ids.gather(1, order), wide.gather(1, order)


def _ordinary(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    logits = 2 * torch.randn(N, V)
    logprobs, ids = (logits + torch.randn(N, V)).log_softmax(-1).topk(K)
    return logits.to(dtype), ids, logprobs


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_pads_that_are_a_token_of_the_row(backend: str, kind: str, tail: str, plan: None) -> None:
    if tail == "none" and kind == "js":
        pytest.skip("no raw sum")
    logits, ids, logprobs = _ordinary()
    logits.requires_grad_()
    wide_ids, wide = _padded(ids, logprobs)
    for reduction in ("none", "sum"):
        for check in (True, False):
            options: dict[str, Any] = {"tail": tail, "reduction": reduction, "check": check, "backend": backend}
            plain = kk.topk_divergence_loss(logits, ids, logprobs, kind, **options)
            padded = kk.topk_divergence_loss(logits, wide_ids, wide, kind, **options)
            assert torch.allclose(padded, plain, rtol=1e-5, atol=1e-7)
            one, other = _gradient(plain.sum(), logits), _gradient(padded.sum(), logits)
            # reverse_kl is infinite where the teacher's rest is made 0.
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-7, equal_nan=True)
            assert one.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_pads_by_hand(backend: str) -> None:
    """Three tokens, of which the teacher names two, .6 and .3; the pad is one of them."""
    logits, ids = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[2, 0, 0]])
    logprobs = torch.tensor([[0.6, 0.3, 0.0]]).log()
    p, q = torch.tensor([[2.0, 1.0]]).double() / 3, logits[:, [2, 0]].double().softmax(-1)
    wanted = _divergence("forward_kl", p, q).item()
    assert wanted == pytest.approx(0.15708, abs=1e-5)
    got = kk.topk_divergence_loss(logits, ids, logprobs, tail="renormalize", backend=backend)
    assert got.item() == pytest.approx(wanted, abs=1e-6)
    # As many ids as columns are not every column: there is a rest.
    got = kk.topk_divergence_loss(logits, ids, logprobs, backend=backend)
    wanted = _bucket("forward_kl", logits.double(), ids[:, :2], logprobs[:, :2], torch.tensor([0.1])).item()
    assert got.item() == pytest.approx(wanted, abs=1e-6)
    # A token without mass is a token, named once or thrice.
    for ids in (torch.tensor([[2, 0, -1, -1]]), torch.tensor([[2, 0, 0, 0]])):
        logprobs = torch.tensor([[0.0, -torch.inf, -torch.inf, -torch.inf]])
        five = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]])
        got = kk.topk_divergence_loss(five, ids, logprobs, "js", tail="renormalize", backend=backend)
        both = five[:, [2, 0]].double().softmax(-1)
        assert got.item() == pytest.approx(_divergence("js", torch.eye(2)[:1].double(), both).item(), abs=1e-6)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_with_two_log_probabilities(backend: str, tail: str, plan: None) -> None:
    logits, ids, logprobs = _ordinary()
    wide_ids, wide = _padded(ids, logprobs)
    wide_ids[3, 1], wide_ids[3, 6] = 50, 50
    wide[3, 1], wide[3, 6] = -8.0, -9.0
    ids, logprobs = ids.clone(), logprobs.clone()
    logits.requires_grad_()
    with pytest.raises(ValueError, match=r"topk_ids\[3, 6\] is 50; which occurs before in its row"):
        kk.topk_divergence_loss(logits, wide_ids, wide, tail=tail, check=True, backend=backend)
    others = torch.arange(N) != 3
    for reduction in ("none", "sum"):
        options: dict[str, Any] = {"tail": tail, "check": False, "backend": backend, "reduction": reduction}
        got = kk.topk_divergence_loss(logits, wide_ids, wide, **options)
        assert got.isnan().sum() == 1
        gradient = _gradient(got.sum(), logits)
        assert gradient[3].isnan().any()
        alone = _gradient(kk.topk_divergence_loss(logits, ids, logprobs, **options).sum(), logits)
        assert torch.allclose(gradient[others], alone[others], rtol=1e-4, atol=1e-7)
    left_out = kk.topk_divergence_loss(
        logits, wide_ids, wide, tail=tail, check=False, mask=others, reduction="sum", backend=backend
    )
    assert left_out.isfinite()


@pytest.mark.skipif(CUDA_ON_HOST or INTERPRETED, reason="what is traced is the same")
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_compile_looks_at_no_values(backend: str, tail: str) -> None:
    logits, ids, logprobs = _ordinary()
    wide_ids, wide = _padded(ids, logprobs)

    def loss(x: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
        return kk.topk_divergence_loss(x, ids, logprobs, tail=tail, reduction="none", backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(logits, wide_ids, wide), loss(logits, ids, logprobs), rtol=1e-5, atol=1e-7)
    wide_ids[5] = 1
    wide[5] = -3.0
    assert torch.equal(compiled(logits, wide_ids, wide).isnan(), torch.arange(N) == 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_token_but_not_all_of_the_mass(backend: str, dtype: torch.dtype, plan: None) -> None:
    logits = torch.randn(2, V)
    ids = torch.stack([torch.randperm(V), torch.randperm(V)])
    whole = torch.randn(2, V).log_softmax(-1)
    short = (whole + torch.tensor([[0.0], [-0.5]])).to(dtype)
    logits.requires_grad_()
    message = r"the sum of exp\(topk_logprobs\)\[1\] is 0\.6\d*; expected 1 where topk_ids has every token"
    with pytest.raises(ValueError, match=message):
        kk.topk_divergence_loss(logits, ids, short, check=True, backend=backend)
    options: dict[str, Any] = {"check": False, "reduction": "none", "backend": backend}
    # What is left is an outcome that the student cannot have.
    rest = torch.stack([torch.tensor(0.0), 1 - short[1].float().exp().sum()]).double()
    js = kk.topk_divergence_loss(logits, ids, short, "js", **options)
    assert torch.allclose(js.double(), _bucket("js", logits.double(), ids, short, rest), rtol=1e-4, atol=1e-6)
    forward = kk.topk_divergence_loss(logits, ids, short, **options)
    assert torch.equal(forward.isinf(), torch.tensor([False, True]))
    # Renormalising is another tail, and rounding is no mass.
    renormalised = kk.topk_divergence_loss(logits, ids, short, tail="renormalize", check=True, backend=backend)
    assert renormalised.isfinite()
    rounded = kk.topk_divergence_loss(logits, ids, whole.to(dtype), check=True, reduction="none", backend=backend)
    wanted = _bucket("forward_kl", logits.double(), ids, whole.to(dtype), torch.zeros(2))
    assert torch.allclose(rounded.double(), wanted, rtol=1e-4, atol=1e-6)
    assert _gradient(rounded.sum(), logits).isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_training_from_rounded_and_padded_rows(weight: float, temperature: float) -> None:
    """Both forms of the trainer's loss: from the logits, and from the outcomes that the cross-entropy's pass found."""
    logits, ids, logprobs = _peaked(torch.float16)
    wide_ids, wide = _padded(ids, logprobs)
    targets = torch.randint(V, (N,))
    targets[4] = -100
    leaf = logits.double().requires_grad_()
    logits.requires_grad_()
    rest = (1 - logprobs.double().exp().sum(-1)).maximum(_resolution(logprobs))
    valid = targets >= 0
    divergences = _bucket("reverse_kl", leaf / temperature, ids, logprobs, rest)[valid]
    cross_entropy = torch.nn.functional.cross_entropy(leaf, targets, reduction="sum")
    wanted = ((1 - weight) * divergences.sum() + weight * cross_entropy) / valid.sum()
    theirs = _gradient(wanted, leaf)
    options = LossOptions(kind="reverse_kl", ce_weight=weight, temperature=temperature)
    for rows in ((ids, logprobs), (wide_ids.int(), wide)):
        loss = topk_distillation_of(
            Logits(logits[None]), *(x[None] for x in rows), targets[None], options, vocab_size=V, normalizer=valid.sum()
        )  # fmt: skip
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
        assert (_gradient(loss, logits) - theirs).abs().max() <= 3e-5 * theirs.abs().max()
    every = torch.arange(V).expand(1, N, V)
    with pytest.raises(ValueError, match="expected 1 where topk_ids has every token"):
        topk_distillation_of(
            Logits(logits[None]), every, logits[None].log_softmax(-1) - 0.5, targets[None], options, vocab_size=V,
            normalizer=valid.sum(),
        )  # fmt: skip


def test_the_floor_is_an_option() -> None:
    logits, ids, logprobs = _peaked(torch.float32)
    module = kk.nn.TopKDivergenceLoss("reverse_kl", tail_floor=1e-2, reduction="none")
    direct = kk.topk_divergence_loss(logits, ids, logprobs, "reverse_kl", tail_floor=1e-2, reduction="none")
    assert torch.equal(module(logits, ids, logprobs), direct)
    assert (direct < kk.topk_divergence_loss(logits, ids, logprobs, "reverse_kl", reduction="none")).any()
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"tail_floor": -1e-3}, ValueError, "tail_floor is -0.001; expected at least 0 and below 1"),
        ({"tail_floor": torch.nan}, ValueError, "tail_floor is nan; expected at least 0 and below 1"),
        ({"tail_floor": "0"}, TypeError, "tail_floor is str; expected a float"),
        ({"tail_floor": 0.1, "tail": "none"}, ValueError, "tail_floor is given, but tail is 'none'; expected 'bucket'"),
        (
            {"tail_floor": 0.1, "tail_logprob": torch.zeros(N)}, ValueError,
            "tail_floor and tail_logprob are both given; expected one of them",
        ),
    ]  # fmt: skip
    for options, error, message in bad:
        with pytest.raises(error, match=f"topk_divergence_loss: {message}"):
            kk.topk_divergence_loss(logits, ids, logprobs, **options)
