"""Statistics and losses from hidden states against float64 logits that are all there, however rows are cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import BACKENDS, CUDA_ON_HOST, DIVERGENCES, INTERPRETED, STATISTIC_NAMES, check_value, taken
from projected import Model, by_oracle, check_gradients, differentiable, model
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.registry import STATISTICS

COLUMNS, PADDED = 211, 220
DTYPES = [torch.float32, torch.bfloat16]
# The kernels are slow there, and are the same for hidden states as for logits.
SLOW = INTERPRETED or CUDA_ON_HOST
STATISTICS_HERE = ["logprob", "tail_logprob", "entropy", "js", "reverse_kl"] if SLOW else STATISTIC_NAMES
KINDS_HERE = ["forward_kl", "js"] if SLOW else DIVERGENCES


def _pair(dtype: torch.dtype = torch.float32, **how: Any) -> tuple[Model, Model]:
    """A student and a teacher of another width."""
    return model((3, 4), 16, PADDED, dtype, **how), model((3, 4), 24, PADDED + 3, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_statistic_and_its_gradients(dtype: torch.dtype, backend: str) -> None:
    student, teacher = _pair(dtype)
    labels, weight = torch.randint(COLUMNS, (3, 4)), torch.rand(3, 4) + 0.5
    for name in STATISTICS_HERE:
        options: dict[str, Any] = {"temperature": 1.3, "alpha": 0.4, "beta": 0.7}
        kind = STATISTICS[name].kind
        stats = kk.linear_token_stats(
            student.hidden, student.head, labels, reference_hidden=teacher.hidden, reference_head=teacher.head,
            stats=[name], vocab_size=COLUMNS, backend=backend, rows_per_chunk=5, **options,
        )  # fmt: skip
        wanted = by_oracle(
            name, student, teacher, weight, COLUMNS, labels[..., None] if kind == "tail" else labels, **options
        )
        check_value(stats[name], wanted.statistics)
        if not differentiable(name):
            continue
        leaves = [*student.leaves, *teacher.leaves]
        got = torch.autograd.grad((weight * stats[name]).sum(), leaves, materialize_grads=True)
        check_gradients(list(got), wanted.gradients)
        # Padding has no gradient.
        assert all(x[COLUMNS:].eq(0).all() for x in (got[1], got[2], got[4], got[5]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_divergence_and_its_gradients(dtype: torch.dtype, backend: str) -> None:
    student, teacher = _pair(dtype)
    mask = torch.rand(3, 4) < 0.7
    mask[0, 0] = True
    for kind in KINDS_HERE:
        options = {"temperature": 1.3, **taken(kind, 0.4, 0.7)}
        loss = kk.linear_divergence_loss(
            student.hidden, student.head, teacher.hidden, teacher.head, kind, mask=mask, vocab_size=COLUMNS,
            backend=backend, rows_per_chunk=2, **options,
        )  # fmt: skip
        wanted = by_oracle(
            kind, student, teacher, mask / mask.sum(), COLUMNS, **{"temperature": 1.3, "alpha": 0.4, "beta": 0.7}
        )
        check_value(loss, wanted.value.float().double())
        got = torch.autograd.grad(3 * loss, [*student.leaves, *teacher.leaves])
        check_gradients(list(got), [3 * x for x in wanted.gradients])
        assert got[0][~mask].eq(0).all()


@pytest.mark.parametrize(
    "how", [{}, {"scale": 0.25}, {"softcap": 3.0}, {"softcap": 3.0, "scale": 2.5}, {"bias": False}], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_heads(how: dict[str, Any], backend: str) -> None:
    student, teacher = model((12,), 16, COLUMNS, **how), model((12,), 24, COLUMNS, **how)
    temperature = torch.rand(12) + 0.5
    for kind in ("forward_kl", "js"):
        wanted = by_oracle(kind, student, teacher, torch.full((12,), 1 / 12), COLUMNS, temperature=temperature)
        loss = kk.linear_divergence_loss(
            student.hidden, student.head, teacher.hidden, teacher.head, kind, temperature=temperature, backend=backend,
            rows_per_chunk=5,
        )  # fmt: skip
        check_value(loss, wanted.value)
        leaves = [*student.leaves, *teacher.leaves]
        check_gradients(list(torch.autograd.grad(loss, leaves)), wanted.gradients)


@pytest.mark.parametrize("how", [{"scale": 0.25}, {"scale": 4.0}, {"softcap": 3.0, "scale": 2.5}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_without_a_temperature_take_the_scale(how: dict[str, Any], backend: str) -> None:
    student, teacher = model((12,), 16, COLUMNS, **how), model((12,), 24, COLUMNS, **how)
    labels, cotangent, mask = torch.randint(5, COLUMNS, (12,)), torch.rand(12), torch.rand(12) < 0.7
    # Tokens that are not to be written, an offset, and a row that is sure of its label.
    assert student.bias is not None
    with torch.no_grad():
        student.bias[:5] = -1e4
        student.bias += 50
        student.hidden[3] = 3 * student.weight[labels[3]]
    for temperature in (1.3, torch.rand(12) + 0.5):
        stats = kk.linear_token_stats(
            student.hidden, student.head, labels, reference_hidden=teacher.hidden, reference_head=teacher.head,
            stats=["untempered_logprob", "reverse_kl"], temperature=temperature, mask=mask, backend=backend,
            rows_per_chunk=5,
        )  # fmt: skip
        for name, other in (("untempered_logprob", None), ("reverse_kl", teacher)):
            wanted = by_oracle(name, student, other, cotangent * mask, COLUMNS, labels, temperature=temperature)
            check_value(stats[name], torch.where(mask, wanted.statistics, 0.0))
            leaves = [*student.leaves, *([] if other is None else other.leaves)]
            total = (cotangent * stats[name]).sum()
            check_gradients(list(torch.autograd.grad(total, leaves, retain_graph=True)), wanted.gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_chunks_do_not_matter(dtype: torch.dtype, backend: str) -> None:
    count = 10 if SLOW else 300
    student, teacher = model((count,), 16, 97, dtype), model((count,), 24, 97, dtype)
    mask = torch.rand(count) < 0.8
    leaves = [*student.leaves, *teacher.leaves]

    def found(rows: int | None) -> list[Tensor]:
        stats = kk.linear_token_stats(
            student.hidden, student.head, reference_hidden=teacher.hidden, reference_head=teacher.head,
            stats=["entropy", "js"], mask=mask, rows_per_chunk=rows, backend=backend,
        )  # fmt: skip
        loss = kk.linear_divergence_loss(
            student.hidden, student.head, teacher.hidden, teacher.head, "js", mask=mask, rows_per_chunk=rows,
            backend=backend,
        )  # fmt: skip
        gradients = torch.autograd.grad(stats.js.sum() / mask.sum(), leaves, retain_graph=True)
        return [stats.entropy, stats.js, loss, *torch.autograd.grad(loss, leaves), *gradients]

    whole = found(count)
    bound = 1e-6 if dtype == torch.float32 else 8e-3
    for rows in (4, None) if SLOW else (1, 7, 128, None):
        for i, (got, wanted) in enumerate(zip(found(rows), whole, strict=True)):
            allowed = 1e-6 if i < 3 else bound
            assert (got - wanted).abs().max() <= allowed * wanted.abs().max().clamp_min(1e-3), (rows, i)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_a_teacher(backend: str) -> None:
    """Strided as a slice of whole sequences is, and with a gradient of their own."""
    student = model((3, 4), 16, COLUMNS)
    whole = (2 * torch.randn(3, 6, PADDED)).requires_grad_()
    for mask in (None, torch.rand(3, 4) < 0.6):
        exact, given = student.double(), whole.detach().double().requires_grad_()
        options: dict[str, Any] = {"vocab_size": COLUMNS, "mask": mask, "backend": backend}
        loss = kk.linear_divergence_loss(
            student.hidden, student.head, kind="reverse_kl", reference_logits=whole[:, 1:5], rows_per_chunk=5, **options
        )  # fmt: skip
        wanted = kk.reverse_kl(exact.logits(), given[:, 1:5], **(options | {"backend": "reference"}))
        check_value(loss, wanted.detach())
        got = torch.autograd.grad(loss, [*student.leaves, whole])
        check_gradients(list(got), list(torch.autograd.grad(wanted, [*exact.leaves, given])))


def test_users_rows() -> None:
    """Finite masks in a head's bias, an offset, a peak, a converged student: the contract of the logits."""
    teacher = model((8,), 24, 3000)
    with torch.no_grad():
        teacher.bias[5:2600] = -1e4  # type: ignore[index]
        teacher.bias[1] += 25.0  # type: ignore[index]
    student = Model(*(x.detach().clone().requires_grad_() for x in teacher.leaves))
    with torch.no_grad():
        student.bias += 50.0  # type: ignore[operator]
        student.hidden += 1e-4 * torch.randn_like(student.hidden)
    for kind in ("forward_kl", "reverse_kl", "js", "hellinger"):
        loss = kk.linear_divergence_loss(student.hidden, student.head, teacher.hidden, teacher.head, kind)
        wanted = by_oracle(kind, student, teacher, torch.full((8,), 1 / 8), 3000)
        # The float32 multiplication rounds logits near 50 by 4e-6 each, a KL of 1e-8 of them by half of itself.
        assert loss.item() == pytest.approx(wanted.value.item(), abs=3e-9), kind
        assert loss.item() >= 0


def test_a_small_divergence_in_bfloat16() -> None:
    """Where bfloat16 logits make the gradient wrong by more than itself, float32 ones of the same factors do not."""
    student = model((64,), 512, 4096, torch.bfloat16, bias=False)
    near = (student.hidden.detach().float() * (1 + 2e-2 * torch.randn(64, 512))).bfloat16()
    teacher = Model(near.requires_grad_(), student.weight.detach())
    wanted = by_oracle("forward_kl", student, teacher, torch.full((64,), 1 / 64), 4096)
    assert 1e-6 < wanted.value < 1e-2
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        loss = kk.linear_divergence_loss(
            student.hidden, student.weight, teacher.hidden, teacher.weight, logits_dtype=dtype
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, [student.hidden])
        exact = wanted.gradients[0]
        errors[dtype] = ((gradient.double() - exact).abs().max() / exact.abs().max()).item()
        if dtype == torch.float32:
            assert loss.item() == pytest.approx(wanted.value.item(), rel=1e-3)
    assert errors[torch.float32] <= 6e-3
    assert errors[torch.bfloat16] > 0.1
