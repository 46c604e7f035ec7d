"""Rows that nearly agree: a divergence of 1e-7 is right to 1 %, never negative, and 0 where the rows are the same."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from checks import BACKENDS, DIVERGENCES, INTERPRETED, check_gradient, check_value, taken, with_parameters
from small_divergences import SCENARIOS, VANISHING, log_sums, near
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.registry import STATISTICS


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize(("name", "alpha", "beta"), with_parameters(VANISHING))
@pytest.mark.parametrize("backend", BACKENDS)
def test_right_to_one_percent(name: str, alpha: float, beta: float, scenario: str, backend: str) -> None:
    _check(name, *SCENARIOS[scenario](), alpha, beta, backend)


@pytest.mark.parametrize("offset", [0, 50])
@pytest.mark.parametrize("name", VANISHING)
@pytest.mark.parametrize("backend", BACKENDS)
def test_right_to_one_percent_over_a_large_vocabulary(name: str, offset: int, backend: str) -> None:
    _check(name, *near(offset + torch.randn(1, 151_936)), 0.5, 0.5, backend)


def _check(name: str, logits: Tensor, reference: Tensor, alpha: float, beta: float, backend: str) -> None:
    logits.requires_grad_()
    value = kk.token_stats(logits, reference, stats=[name], alpha=alpha, beta=beta, backend=backend)[name]
    expected = oracle.evaluate(name, logits, reference, alpha=alpha, beta=beta)
    kl = oracle.evaluate("forward_kl", logits, reference).value
    assert ((kl > 1e-8) & (kl < 1e-5)).all(), "the scenario is not about small divergences"
    assert (value >= 0).all()
    error = (value.detach().double() - expected.value).abs()
    # 1e-8: a statistic may be far smaller than the KL of the same rows (p^1.4 over 151,936 columns).
    assert (error <= 0.01 * expected.value.clamp_min(1e-8)).all(), f"got {value}, expected {expected.value}"
    if name != "tvd":  # its gradient jumps where p = q
        value.sum().backward()
        check_gradient(logits.grad, expected.student, log_sums(backend) * expected.student_floor)


@pytest.mark.parametrize(("name", "alpha", "beta"), with_parameters(VANISHING))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_rows_give_zero(name: str, alpha: float, beta: float, dtype: torch.dtype, backend: str) -> None:
    logits = (4 * torch.randn(3, 1031)).to(dtype)
    logits[1, 40:90] = -torch.inf
    logits[2] += 50
    student, teacher = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value = kk.token_stats(
        student, teacher, stats=[name], alpha=alpha, beta=beta, temperature=0.8, backend=backend
    )[name]  # fmt: skip
    assert (value == 0).all(), f"got {value}"
    value.sum().backward()
    # Exactly: an optimiser that divides by the size of a gradient would take a step of any other number.
    assert not student.grad.any()
    assert not teacher.grad.any()
    student.grad = None
    options = {key: x for key, x in (("alpha", alpha), ("beta", beta)) if getattr(STATISTICS[name], key)}
    loss = kk.divergence_loss(student, logits, name, temperature=0.8, backend=backend, **options)
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_rows_give_a_cross_entropy_without_a_gradient(backend: str) -> None:
    logits = (4 * torch.randn(3, 1031)).requires_grad_()
    kk.divergence_loss(logits, logits.detach().clone(), "cross_entropy", backend=backend).backward()
    assert not logits.grad.any()


# Widths of one tile and of a few, and what a trainer adds to logits or a model's head does.
SHORT_AND_LONG = [2, 3, 8, 64, 1000, *([] if INTERPRETED else [2049, 10_000])]


@pytest.mark.parametrize("offset", [0.0, 50.0, -50.0, 1e3, 1e4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_right_to_one_percent_whatever_the_width_and_the_offset(offset: float, backend: str) -> None:
    """D from 1e-9 to 1e-3; below 1e-7 the roundings of log-probabilities are a few percent of their differences."""
    names = [name for name in VANISHING if name not in ("alpha_beta", "cauchy_schwarz")]
    checked = 0
    for columns in SHORT_AND_LONG:
        for size in (3e-5, 3e-4, 3e-3, 3e-2):
            logits = 2 * torch.randn(3, columns)
            reference = logits + size * torch.randn(3, columns) + offset
            found = kk.token_stats(logits, reference, stats=names, alpha=0.7, backend=backend)
            # tvd is linear: one of 1e-7 is a log-ratio of 1e-7, which is the rounding of a log-probability.
            kl = oracle.evaluate("forward_kl", logits, reference).value
            for name in names:
                expected = oracle.evaluate(name, logits, reference, alpha=0.7).value
                wanted = (expected > 1e-9) & (kl > 1e-9) & (kl < 1e-2)
                error = (found[name].double() - expected).abs()[wanted]
                # tvd is linear in what p and q are off by, on GPUs 2^-22.
                least = 2**-22 if name == "tvd" and backend in ("cuda", "triton") else 1e-10
                assert (error <= 0.01 * expected[wanted] + least).all(), f"{name} {columns} {size}: {found[name]}"
                checked += int(wanted.sum())
    assert checked > 200


@pytest.mark.parametrize("name", VANISHING)
@pytest.mark.parametrize("backend", BACKENDS)
def test_peaked_rows_that_agree(name: str, backend: str) -> None:
    """Nearly all mass on one column of both rows: 1 − q_max is far below the rounding of q_max."""
    logits = torch.full((1, 600), -30.0).add_(torch.randn(1, 600))
    logits[0, 77] = 0
    reference = logits + 0.5 * torch.randn(1, 600)
    reference[0, 77] = 0
    value = kk.token_stats(logits, reference, stats=[name], backend=backend)[name]
    expected = oracle.evaluate(name, logits, reference).value
    assert (value >= 0).all()
    assert (value.double() - expected).abs() <= 0.01 * expected.clamp_min(1e-8)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_far_apart_in_some_places(kind: str, backend: str) -> None:
    """As far as `apart` in some runs of columns, in whatever order they come, and nearly equal in the others."""
    run = 40 if INTERPRETED else 2048
    for order in ((1, 1, 0, 0), (0, 0, 1, 1), (0, 1, 0, 1), (1, 0, 0, 1)):
        for apart in (0.15, 0.3, 1.0, 4.0):
            logits = 2 * torch.randn(2, 4 * run)
            noise = torch.tensor(order).repeat_interleave(run) * apart + 1e-4
            reference = logits + noise * torch.randn(2, 4 * run)
            # Where the rows are far apart there is little mass, or most.
            logits[1] += torch.tensor(order).repeat_interleave(run) * 5
            reference[1] += torch.tensor(order).repeat_interleave(run) * 5
            student = logits.clone().requires_grad_()
            loss = kk.divergence_loss(student, reference, kind, reduction="none", backend=backend)
            expected = oracle.evaluate(kind, logits, reference)
            assert ((loss.double() - expected.value).abs() <= 1e-5 * expected.value).all(), (order, apart)
            loss.sum().backward()
            check_gradient(student.grad, expected.student, expected.student_floor)


@pytest.mark.parametrize("kind", ["js", "skew_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mixture_of_nearly_one_row_alone(kind: str, backend: str) -> None:
    """A weight of 1e-6 decides where the other row has no mass to speak of."""
    name = "beta" if kind == "js" else "alpha"
    pairs = [tuple(scale * torch.randn(8, 67) for _ in range(2)) for scale in (1, 10)]
    # A prompt's columns hidden from one of the rows, a row that is sure, one that has converged, and an offset.
    masked, sure, offset = (pairs[0][0].clone() for _ in range(3))
    masked[:, 20:40], masked[4:, 40:50] = -1e4, torch.finfo(torch.float32).min
    sure[:, 5] += 30
    offset += 1e4
    pairs += [(masked, pairs[0][1]), (pairs[0][1], masked), (sure, pairs[0][1]), (masked, sure)]
    pairs += [(offset, pairs[0][1]), (pairs[0][0] + 1e-3 * torch.randn(8, 67), pairs[0][0])]
    for weight in (1e-6, 1e-4, 1e-2, 0.99, 1 - 2**-14):
        for first, second in pairs:
            student, teacher = (x.clone().requires_grad_() for x in (first, second))
            value = kk.token_stats(student, teacher, stats=[kind], **{name: weight}, backend=backend)[kind]
            expected = oracle.evaluate(kind, student, teacher, **{name: weight})
            check_value(value, expected.value)
            value.sum().backward()
            # log p − log q carries the roundings of both rows' log-sum-exp.
            check_gradient(student.grad, expected.student, log_sums(backend) * expected.student_floor)
            check_gradient(teacher.grad, expected.teacher, log_sums(backend) * expected.teacher_floor)


HERE = [name for name in BACKENDS if name in ("cpu", "reference")]


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("backend", HERE)
def test_a_beginning_of_little_mass_that_is_shifted(kind: str, backend: str) -> None:
    """What it says of the rows is wrong for the columns behind it, which are the same in both."""
    head, columns = torch.arange(20_000) < 2048, torch.arange(20_000)
    moved = 0.22 * (columns % 2 * 2 - 1.0) + 0.22 - math.log(math.cosh(0.22))
    for low, shift in ((-8.0, moved), (-7.6, torch.full((20_000,), 8.0)), (-7.6, torch.full((20_000,), -8.0))):
        first = torch.where(head, low, 0.0)[None]
        second = first + torch.where(head, shift, 0.0)
        for pair in ((first, second), (second, first)):
            value = kk.token_stats(*pair, stats=[kind], backend=backend)[kind]
            expected = oracle.evaluate(kind, *pair).value
            assert abs(value.item() - expected.item()) <= 1e-4 * expected.item(), (low, value, expected)


@pytest.mark.parametrize("backend", HERE)
def test_steps_along_the_vocabulary(backend: str) -> None:
    """Divergences of rows that have their mass in the same thousand columns, which must not be below 0."""
    logits = torch.randn(2, 1, 2049) + 100.0 * (torch.arange(2049) // 1024)
    for name, alpha, beta in with_parameters(DIVERGENCES):
        student = logits[0].clone().requires_grad_()
        loss = kk.divergence_loss(student, logits[1], name, **taken(name, alpha, beta), backend=backend)
        assert loss.item() >= 0, (name, alpha, beta, loss.item())


@pytest.mark.parametrize("backend", HERE)
def test_a_large_weight_beside_columns_without_mass(backend: str) -> None:
    student = torch.randn(1, 4096)
    student[:, :2048] = -torch.inf
    student[:, 2048:] -= 1e4
    student.requires_grad_()
    weight = torch.tensor([65536.0])
    kk.divergence_loss(
        student, torch.randn(1, 4096), "reverse_kl", weight=weight, reduction="sum", backend=backend
    ).backward()
    assert student.grad.isfinite().all()
