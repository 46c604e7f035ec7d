"""Rows as users have them (see `user_rows`) against the textbook formulas in float64, on every backend."""

from __future__ import annotations

import os
from dataclasses import replace

import oracle
import pytest
import torch
from checks import BACKENDS, DIVERGENCES, STATISTIC_NAMES, check_gradient, check_value, parameters
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from infinities import NO_STUDENT_MASS, NO_TEACHER_MASS
from torch import Tensor
from user_rows import MASKS, SLOW, Rows, user_rows

import kldiv_kernels as kk
from kldiv_kernels.registry import STATISTICS

# `make fuzz` asks for many more, and for others every time.
EXAMPLES = int(os.environ.get("KLDIV_FUZZ_EXAMPLES", "0"))
thorough = settings(
    max_examples=EXAMPLES or (60 if SLOW else 400),
    deadline=None,
    derandomize=EXAMPLES == 0,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def _of_powers(name: str) -> bool:
    return STATISTICS[name].alpha is not None or name in ("forward_chi2", "reverse_chi2", "cauchy_schwarz")


def _rows_apart(rows: Rows, temperature: float) -> Tensor:
    """The largest log-ratio of a row, columns at −inf apart."""
    logs = [x.double().div(temperature).log_softmax(-1) for x in (rows.logits, rows.reference)]
    ratio = (logs[0] - logs[1]).abs()
    return torch.where(ratio.isfinite(), ratio, 0.0).amax(-1)


@pytest.mark.parametrize("backend", BACKENDS)
@thorough
@given(user_rows(), st.data())
def test_values_and_gradients(backend: str, rows: Rows, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(STATISTIC_NAMES), "statistic")
    statistic = STATISTICS[name]
    alpha, beta = data.draw(st.sampled_from(parameters(statistic)), "alpha, beta")
    temperature = data.draw(st.sampled_from([1.0, 1.0, 0.7, 2.0]), "temperature")
    # Powers of a ratio beyond these leave the range of float32, or of the exponential of a float32.
    if _of_powers(name) and bool((_rows_apart(rows, temperature) > 60).any()):
        event("powers: too far apart")
        return
    if name == "tail_logprob" and bool(((rows.logits > -1e30) & (rows.logits < -2e9)).any()):
        event("a tail so far below the labels that 24 bits do not hold its exponent")
        return
    student, teacher = (x.clone().requires_grad_() for x in (rows.logits, rows.reference))
    options = {"temperature": temperature, "alpha": alpha, "beta": beta}
    with_gradients = data.draw(st.booleans(), "with gradients")
    sides = (student, teacher) if with_gradients else (rows.logits, rows.reference)
    value = kk.token_stats(*sides, rows.labels, stats=[name], backend=backend, **options)[name]
    expected = _expected(name, rows, temperature, alpha, beta)
    check_value(value, expected.value)
    event(f"{name}: {'finite' if expected.value.isfinite().all() else 'infinite'}")
    # tvd's gradient jumps where p = q, which equal rows with an offset are but for a rounding.
    if not statistic.differentiable or not with_gradients or name == "tvd":
        return
    value.sum().backward()
    for got, side, floor in (
        (student.grad, expected.student, expected.student_floor),
        (teacher.grad, expected.teacher, expected.teacher_floor),
    ):
        usable = expected.value.isfinite() & side.isfinite().all(-1) & (side.abs().amax(-1) < 1e30)
        if got is not None and bool(usable.any()):
            # log p − log q carries the roundings of both rows' log-sum-exp, and inherits a mask's size.
            check_gradient(got[usable], side[usable], 2 * floor[usable])


def _expected(name: str, rows: Rows, temperature: float, alpha: float, beta: float) -> oracle.Expected:
    """The oracle puts −inf so far below the row's largest logit that no mask is further, and its limits are known."""
    given = [torch.where(x.double() <= -1e30, -torch.inf, x.double()) for x in (rows.logits, rows.reference)]
    logq, logp = ((x / temperature).log_softmax(-1) for x in given)
    powers = _of_powers(name)
    if powers:  # of a column that counts as without mass, a ratio to one without any is none
        given = [torch.where(logs < -745, -torch.inf, x) for x, logs in zip(given, (logq, logp), strict=True)]
    options = {"temperature": temperature, "alpha": alpha, "beta": beta}
    expected = oracle.evaluate(name, *given, rows.labels, floor=oracle.FLOOR if powers else 1e31, **options)
    value = expected.value
    for conditions, log_a, log_b in ((NO_STUDENT_MASS, logp, logq), (NO_TEACHER_MASS, logq, logp)):
        if name in conditions and conditions[name](alpha, beta):
            blocked = ((log_a > -745) & (log_b == -torch.inf)).any(-1)
            value = torch.where(blocked, torch.inf, value)
    return replace(expected, value=torch.where(value < -1e30, -torch.inf, value))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(thorough, max_examples=EXAMPLES or (25 if SLOW else 150))
@given(user_rows(), st.data())
def test_losses_are_their_statistics(backend: str, rows: Rows, data: st.DataObject) -> None:
    """The one-read form gives the gradient that the two-pass form gives, for one token each of two weights."""
    name = data.draw(st.sampled_from(DIVERGENCES), "kind")
    weight = torch.tensor([1.5, -0.25])
    student, again = rows.logits.clone().requires_grad_(), rows.logits.clone().requires_grad_()
    value = kk.token_stats(again, rows.reference, stats=[name], alpha=0.7, backend=backend)[name]
    if not bool(value.isfinite().all()):
        return
    (weight * value).sum().backward()
    options = {"alpha": 0.7} if STATISTICS[name].alpha else {}
    loss = kk.divergence_loss(
        student, rows.reference, name, weight=weight, reduction="sum", backend=backend, **options
    )  # fmt: skip
    loss.backward()
    expected = oracle.evaluate(name, rows.logits, rows.reference, alpha=0.7, cotangent=weight)
    check_value(loss, (weight * value.detach()).sum())
    if bool(expected.student.isfinite().all()) and bool((expected.student.abs() < 1e30).all()):
        largest = expected.student.abs().amax(-1, keepdim=True)
        usable = (_rows_apart(rows, 1.0) < 60)[:, None] | torch.tensor(not _of_powers(name))
        difference = (student.grad.double() - again.grad.double()).abs()
        eps = torch.finfo(student.dtype).eps
        bound = (eps + 2e-5) * largest + 2e-6 * expected.student_floor
        assert ((difference <= bound) | ~usable).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_over_a_tile(backend: str) -> None:
    """A teacher (or student) masked by a finite value over 2,048 columns: forward KL was 0.0 for 4.0161."""
    generator = torch.Generator().manual_seed(1)
    s, t = ((2 * torch.randn(1, 8192, generator=generator)).bfloat16() for _ in "st")
    t[:, :2048] = -1e4
    assert abs(kk.token_stats(s, t, stats=("forward_kl",), backend=backend).forward_kl.item() - 4.0161) < 1e-3
    names = ["forward_kl", "reverse_kl", "hellinger", "js", "jeffreys"]
    for value in MASKS[:4] if SLOW else MASKS:
        for first, count in ((0, 2048), (4096, 2048), (100, 7)):
            masked = t.float()
            masked[:, first : first + count] = value
            for pair in ((s.float(), masked), (masked, s.float())):
                found = kk.token_stats(*pair, stats=names, backend=backend)
                for name in names:
                    given = [torch.where(x <= -1e30, -torch.inf, x) for x in pair]
                    expected = oracle.evaluate(name, *given).value
                    infinite = found[name].isinf() & torch.tensor(value <= -1e30)
                    check_value(torch.where(infinite, 0.0, found[name]), torch.where(infinite, 0.0, expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_added_to_a_row_changes_nothing(backend: str) -> None:
    """Rows whose entries are multiples of 1/8 can be shifted exactly by any power of two up to 2^20."""
    s, t = ((4 * torch.randn(2, 300)).round() / 4 for _ in "st")
    names = [name for name, statistic in STATISTICS.items() if statistic.kind == "sum"]
    options = {"stats": names, "alpha": 0.7, "backend": backend}
    plain = kk.token_stats(s, t, **options)
    for of_student, of_teacher in ((2.0**13, 2.0**13), (-(2.0**17), 0.0), (0.0, 2.0**17), (2.0**20, -(2.0**20))):
        shifted = kk.token_stats(s + of_student, t + of_teacher, **options)
        for name in names:
            check_value(shifted[name], plain[name].double())
    assert abs(kk.entropy(torch.full((1, 4), 1e4), backend=backend).item() - 1.3862943611) < 1e-6
    one_hot = torch.tensor([[1000.0, 0.0], [0.0, 1000.0], [1e4, -1e4]])
    assert (kk.entropy(one_hot, backend=backend) >= 0).all()
    assert (kk.entropy(one_hot, backend=backend) < 1e-6).all()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("cpu", "reference")])
def test_the_ends_of_the_range(backend: str) -> None:
    """Logits of 3e38 and rows of one column. (GPUs: exponents of logits beyond 1e38 leave the range of floats.)"""
    largest = torch.tensor([[3e38, 1e38, 0.0]]).bfloat16()
    found = kk.token_stats(
        largest, labels=torch.tensor([0]), stats=("logprob", "entropy"), temperature=1.3, backend=backend
    )  # fmt: skip
    assert found.logprob.item() == 0
    assert found.entropy.item() == 0
    one = torch.tensor([[3.1], [-70.3]])
    for name in DIVERGENCES:
        logits, reference = one.clone().requires_grad_(), (one + 3).requires_grad_()
        value = kk.token_stats(logits, reference, stats=[name], alpha=0.7, backend=backend)[name]
        value.sum().backward()
        assert (value == 0).all(), name
        assert not logits.grad.any(), name
        assert not reference.grad.any(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_js_at_one_half_is_symmetric_to_the_bit(backend: str) -> None:
    for size, offset in ((3.0, 0.0), (3.0, 50.0), (1e-3, 0.0), (0.3, 1e3)):
        s = 3 * torch.randn(4, 600)
        t = s + size * torch.randn(4, 600) + offset
        t[0, 5:9] = -torch.inf
        assert torch.equal(*(kk.token_stats(a, b, stats=["js"], backend=backend).js for a, b in ((s, t), (t, s))))


POLES = [(1e-3, 0.5), (0.5, 1e-3), (-1e-3, 0.5), (0.5, -0.499999), (1.5, -1.499), (1e-3, 1e-3), (2.0, -1e-3),
         (1e-3, -2e-3), (1e-6, 0.7)]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_alpha_beta_near_its_poles(backend: str) -> None:
    for alpha, beta in POLES:
        s, t = (3 * torch.randn(3, 200) for _ in "st")
        student, teacher = s.clone().requires_grad_(), t.clone().requires_grad_()
        options = {"alpha": alpha, "beta": beta}
        value = kk.token_stats(student, teacher, stats=["alpha_beta"], backend=backend, **options).alpha_beta
        value.sum().backward()
        expected = oracle.evaluate("alpha_beta", s, t, **options)
        check_value(value, expected.value)
        check_gradient(student.grad, expected.student, 2 * expected.student_floor)
        check_gradient(teacher.grad, expected.teacher, 2 * expected.teacher_floor)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_infinite_values(backend: str) -> None:
    """One rule: an infinite sum outweighs the own term of every column that has mass; there is no NaN."""
    s, t = torch.randn(3, 9), torch.randn(3, 9)
    s[0, 2] = t[1, 3] = s[2, 2] = t[2, 5] = -torch.inf
    s[:, 7] = t[:, 7] = -torch.inf
    infinite = 0
    for name in DIVERGENCES:
        for alpha, beta in parameters(STATISTICS[name]):
            sides = s.clone().requires_grad_(), t.clone().requires_grad_()
            value = kk.token_stats(*sides, stats=[name], alpha=alpha, beta=beta, backend=backend)[name]
            value.sum().backward()
            infinite += int(value.isinf().sum())
            for side in sides:
                assert not side.grad.isnan().any(), name
                for row, gradient in zip(side.detach(), side.grad, strict=True):
                    of_mass = gradient[row > -torch.inf]
                    same = of_mass.isinf().all() and (of_mass == of_mass[0]).all()
                    rest = gradient[row == -torch.inf]
                    assert gradient.isfinite().all() or (same and not rest.any()), f"{name}: {gradient}"
    assert infinite > 20
