"""What is particular to the Triton backend. Its correctness is tested by the suite that all backends share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import torch
from checks import INTERPRETED, STATISTIC_NAMES, check_gradient, check_value, taken
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

import kldiv_kernels as kk
from kldiv_kernels.backends.triton import launch, sizes
from kldiv_kernels.backends.triton.formulas import table
from kldiv_kernels.registry import STATISTICS

compiled_only = pytest.mark.skipif(INTERPRETED, reason="about processes without TRITON_INTERPRET=1")
interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


def test_every_statistic_has_its_functions() -> None:
    assert [name for name in STATISTIC_NAMES if name not in table.TABLE] == []


@compiled_only
def test_cpu_tensors_are_refused_without_the_interpreter() -> None:
    logits = torch.randn(2, 9)
    with pytest.raises(ValueError, match=r"backend 'triton' cannot serve this call: .*TRITON_INTERPRET=1"):
        kk.token_stats(logits, backend="triton", stats=["entropy"])
    assert kk.backends()["triton"] == "available" or "TRITON_INTERPRET=1" in kk.backends()["triton"]


@interpreted_only
def test_auto_does_not_take_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.Launch, "statistics", lambda *_: pytest.fail("the interpreter was taken"))
    kk.token_stats(torch.randn(2, 9), stats=["entropy"])


@interpreted_only
def test_what_it_does_not_serve() -> None:
    with pytest.raises(ValueError, match=r"it serves float32, bfloat16 and float16, not torch.float64"):
        kk.entropy(torch.randn(2, 9).double(), backend="triton")
    holed = torch.randn(4, 4, 4, 4, 9)[:, :3, :3, :3]
    with pytest.raises(ValueError, match="need more than two leading dimensions"):
        kk.entropy(holed, backend="triton")
    two = torch.randn(4, 4, 5, 9)[:, :3]
    assert torch.allclose(kk.entropy(two, backend="triton"), kk.entropy(two, backend="reference"), atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "view", "expected"),
    [
        ((6, 9), lambda x: x, (6, 0, 9)),
        ((2, 3, 9), lambda x: x, (6, 0, 9)),
        ((2, 4, 9), lambda x: x[:, :-1], (3, 36, 9)),
        ((2, 4, 9), lambda x: x.transpose(0, 1), (2, 9, 36)),
        ((1, 9), lambda x: x.expand(5, 9), (5, 0, 0)),
        ((9,), lambda x: x, (1, 0, 0)),
        ((2, 3, 5, 9), lambda x: x[:, :2], (10, 135, 9)),
        ((4, 4, 4, 9), lambda x: x[:, :3, :3], None),
    ],
)
def test_leading_dimensions(shape: tuple[int, ...], view: Any, expected: tuple[int, int, int] | None) -> None:
    tensor = view(torch.arange(torch.Size(shape).numel()).reshape(shape))
    got = launch.leading(tensor)
    assert got == expected
    if got is not None:
        inner, outer, stride = got
        starts = [(i // inner) * outer + (i % inner) * stride for i in range(tensor.shape[:-1].numel())]
        assert starts == (tensor[..., 0].reshape(-1) - tensor.reshape(-1)[0]).tolist()


def test_a_row_is_cut_by_its_length_alone() -> None:
    for vocab in (1, 257, 32_000, 151_936, 262_144, 600_001):
        for size in (2, 4):
            shape = sizes.Shape.of(vocab, size, False)
            assert shape.slices * shape.slice_columns >= vocab > (shape.slices - 1) * shape.slice_columns
            assert shape.slices <= shape.padded_slices <= 32
            assert shape.lanes * shape.columns <= 8192


def test_the_plan_of_top_k(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KLDIV_BACKEND", "triton")
    found = kk.plan(rows=8, vocab=1000, stats=("logprob", "tail_logprob"), device="sm_90")
    # The marks of labels are a bit a column of the slice that a row is cut into, cleared and read.
    marks = 2 * 4 * 8 * sizes.Shape.of(1000, 2, False).mark_words
    assert (found.backend, found.sweeps, found.bytes) == ("triton", 2, 3 * 8 * 1000 * 2 + marks)


@interpreted_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["forward_kl", "hellinger", "js", "renyi"])
def test_the_same_bits_alone_and_in_a_batch(kind: str, dtype: torch.dtype) -> None:
    """Two rows go through the kernels that split a row, five through the one that takes a row."""
    logits, reference = (3 * torch.randn(5, 1031)).to(dtype), (3 * torch.randn(5, 1031)).to(dtype)

    def bits(rows: list[int]) -> tuple[Tensor, ...]:
        student, teacher = logits[rows].requires_grad_(), reference[rows].requires_grad_()
        loss = kk.divergence_loss(student, teacher, kind, reduction="sum", temperature=1.3, backend="triton")
        stats = kk.token_stats(student.detach(), teacher.detach(), stats=[kind, "entropy"], backend="triton")
        return *torch.autograd.grad(loss, [student, teacher]), *stats.values()

    batch = bits([0, 1, 2, 3, 4])
    for rows in ([4, 1], [2]):
        assert all(torch.equal(got, of_all[rows]) for got, of_all in zip(bits(rows), batch, strict=True)), rows


@interpreted_only
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "hellinger", "jeffreys"])
def test_a_flat_row_against_a_peaked_one(kind: str) -> None:
    """The sums of the first sweep then hold masses of very different size."""
    flat, peaked = 0.01 * torch.randn(2, 20_000), torch.randn(2, 20_000)
    peaked[:, 17_000] = 40
    for student, teacher in ((flat, peaked), (peaked, flat)):
        student = student.clone().requires_grad_()
        value = kk.token_stats(student, teacher, stats=[kind], backend="triton")[kind]
        expected = oracle.evaluate(kind, student, teacher)
        check_value(value, expected.value)
        value.sum().backward()
        check_gradient(student.grad, expected.student, expected.student_floor)


@triton.jit
def _half_square(x):
    return 0.5 * x * x


@triton.jit
def value(logp, logq):
    return tl.exp(logp) * 2.0 * _half_square(logp - logq)


@triton.jit
def grad_logq(logp, logq):
    return -2.0 * tl.exp(logp) * (logp - logq)


@triton.jit
def grad_logp(logp, logq):
    return tl.exp(logp) * ((logp - logq) * (logp - logq) + 2.0 * (logp - logq))


@triton.jit
def scaled_value(logp, logq, beta, alpha):
    return alpha * (tl.exp(logp) - beta * tl.exp(logq)) * (tl.exp(logp) - beta * tl.exp(logq))


@triton.jit
def scaled_grad_logq(logp, logq, alpha, beta):
    return -2.0 * alpha * beta * (tl.exp(logp) - beta * tl.exp(logq)) * tl.exp(logq)


@triton.jit
def scaled_grad_logp(logp, logq, alpha, beta):
    return 2.0 * alpha * (tl.exp(logp) - beta * tl.exp(logq)) * tl.exp(logp)


@pytest.fixture
def registered() -> Iterator[None]:
    """Two divergences that the package does not have."""
    kk.register_statistic(
        "exponential",
        value=lambda logp, logq: logp.exp() * (logp - logq) ** 2,
        grad_logq=lambda logp, logq: -2 * logp.exp() * (logp - logq),
        grad_logp=lambda logp, logq: logp.exp() * ((logp - logq) ** 2 + 2 * (logp - logq)),
        triton=(value, grad_logq, grad_logp),
    )
    kk.register_statistic(
        "scaled",
        value=lambda logp, logq, alpha, beta: alpha * (logp.exp() - beta * logq.exp()) ** 2,
        grad_logq=lambda logp, logq, alpha, beta: -2 * alpha * beta * (logp.exp() - beta * logq.exp()) * logq.exp(),
        grad_logp=lambda logp, logq, alpha, beta: 2 * alpha * (logp.exp() - beta * logq.exp()) * logp.exp(),
        triton=(scaled_value, scaled_grad_logq, scaled_grad_logp),
    )
    yield
    kk.unregister_statistic("exponential")
    kk.unregister_statistic("scaled")


def _autograd(name: str, logits: Tensor, reference: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float64, through PyTorch's own gradients"""
    s, t = logits.detach().double().requires_grad_(), reference.detach().double().requires_grad_()
    p, q = (t / 0.7).softmax(-1), (s / 0.7).softmax(-1)
    terms = p * (p / q).log() ** 2 if name == "exponential" else alpha[:, None] * (p - 0.25 * q) ** 2
    return terms.sum(-1).detach(), *torch.autograd.grad(terms.sum(), [s, t])


@interpreted_only
@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("rows", [3, 5])
@pytest.mark.parametrize("name", ["exponential", "scaled"])
def test_a_divergence_of_ones_own_runs_fused(name: str, rows: int) -> None:
    logits, reference = torch.randn(rows, 301, requires_grad=True), torch.randn(rows, 301, requires_grad=True)
    alpha = torch.linspace(1, 2, rows)
    options = {"temperature": 0.7, "backend": "triton", **taken(name, alpha, 0.25)}
    expected, *gradients = _autograd(name, logits, reference, alpha)
    value = kk.token_stats(logits, reference, stats=["entropy", name], **options)[name]
    assert torch.allclose(value.double(), expected, rtol=1e-5)
    loss = kk.divergence_loss(logits, reference, name, reduction="sum", **options)
    for got_of in (value.sum(), loss):
        for got, wanted in zip(torch.autograd.grad(got_of, [logits, reference]), gradients, strict=True):
            assert torch.allclose(got.double(), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.usefixtures("registered")
def test_registering_what_is_no_jit_function() -> None:
    plain = dict.fromkeys(("value", "grad_logq", "grad_logp"), lambda logp, logq: logp)
    with pytest.raises(TypeError, match=r"triton is .*; expected three @triton.jit functions"):
        kk.register_statistic("mine", **plain, triton=value)
    with pytest.raises(TypeError, match=r"triton holds <function .*; expected a @triton.jit function"):
        kk.register_statistic("mine", **plain, triton=(value, grad_logq, lambda logp, logq: logp))
    with pytest.raises(TypeError, match=r"_half_square takes \(x\); expected \(logp, logq\)"):
        kk.register_statistic("mine", **plain, triton=(value, grad_logq, _half_square))
    assert "mine" not in STATISTICS
