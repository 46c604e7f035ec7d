"""The numerical contract, case by case: −inf, NaN, infinite values, masks by large negatives, ties, big logits."""

from __future__ import annotations

import oracle
import pytest
import torch
from checks import (
    BACKENDS,
    DIVERGENCES,
    STATISTIC_NAMES,
    check_gradient,
    check_statistic,
    check_value,
    parameters,
    with_parameters,
)
from infinities import FINITE_GRADIENT, NO_STUDENT_MASS, NO_TEACHER_MASS, WIDE_ALPHA_BETAS, WIDE_ALPHAS, WITHOUT_SHARES
from torch import Tensor, nn

import kldiv_kernels as kk
from kldiv_kernels.registry import STATISTICS

# Student and teacher on disjoint columns.
DISJOINT = {"hellinger": 1.0, "tvd": 1.0, "triangular": 2.0, "js": 0.6931471805599453, "alpha": 4.0, "alpha_beta": 4.0,
            "renyi": torch.inf, "cauchy_schwarz": torch.inf, "forward_kl": torch.inf, "reverse_kl": torch.inf,
            "jeffreys": torch.inf, "skew_kl": 0.6931471805599453, "skew_reverse_kl": 0.6931471805599453}  # fmt: skip


def _pair(*shape: int) -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(shape), 3 * torch.randn(shape)


def _minus_infinite(side: str, columns: int) -> tuple[Tensor, Tensor]:
    """Rows with some columns at −inf: in the student, the teacher, or both; in one column or in many."""
    logits, reference = _pair(4, columns)
    rows = {"student": [logits], "teacher": [reference], "both": [logits, reference]}[side]
    for x in rows:
        x[0, 5] = x[1, columns - 1] = x[2, 3 : columns - 20] = x[3, ::2] = -torch.inf
    return logits, reference


def _stats(name: str, student: Tensor, teacher: Tensor, backend: str, **options: float | Tensor) -> Tensor:
    labels = options.pop("labels", None)
    labels = torch.ones(student.shape[:-1], dtype=torch.int64) if labels is None else labels
    return kk.token_stats(student, teacher, labels, stats=[name], backend=backend, **options)[name]


@pytest.mark.parametrize("columns", [64, 5003])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize(("name", "alpha", "beta"), with_parameters(STATISTIC_NAMES))
@pytest.mark.parametrize("backend", BACKENDS)
def test_minus_infinity(name: str, alpha: float, beta: float, side: str, columns: int, backend: str) -> None:
    """Values are infinite exactly where the contract says so; gradients are the formula's limit where it is finite."""
    logits, reference = _minus_infinite(side, columns)
    student, teacher = logits.clone().requires_grad_(), reference.clone().requires_grad_()
    value = _stats(name, student, teacher, backend, alpha=alpha, beta=beta)
    labels = torch.ones(4, dtype=torch.int64)
    near, far = (
        oracle.evaluate(name, logits, reference, labels, alpha=alpha, beta=beta, floor=floor)
        for floor in (600.0, 680.0)
    )
    table = {"student": NO_STUDENT_MASS, "teacher": NO_TEACHER_MASS, "both": {}}[side]
    infinite = name in table and table[name](alpha, beta)
    check_value(value, torch.full_like(far.value, torch.inf) if infinite else far.value)
    if not STATISTICS[name].differentiable:
        return
    value.sum().backward()
    for of, got in (("student", student.grad), ("teacher", teacher.grad)):
        if got is None or (infinite and FINITE_GRADIENT.get(name) != of):
            continue
        expected, floor = getattr(far, of), getattr(far, f"{of}_floor")
        assert torch.allclose(expected, getattr(near, of), rtol=1e-9, atol=1e-12), "the oracle's limit does not exist"
        check_gradient(got, expected, floor)


def _wide_parameters(name: str) -> list[tuple[float, float]]:
    statistic = STATISTICS[name]
    wide = () if statistic.alpha is None else WIDE_ALPHAS if statistic.beta is None else WIDE_ALPHA_BETAS
    return parameters(statistic) + [(a, b) for a, b in wide if statistic.alpha.allows(a)]


def _rows_without_mass() -> tuple[Tensor, Tensor]:
    """Columns at −inf in the student, in the teacher, in each its own, in all that the other has."""
    logits, reference = _pair(4, 24)
    logits[0, 3] = reference[1, 20:] = logits[2, :2] = reference[2, 5:8] = -torch.inf
    logits[3, ::2] = reference[3, 1::2] = -torch.inf
    return logits, reference


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_limits_of_the_definition(name: str, backend: str) -> None:
    """A column at −inf is one whose logit goes to −inf, equally fast in both rows: what then has a limit is that limit,
    what goes to infinity is infinite. An infinite gradient is 0 in the columns of its row that have no mass, and has in
    the others the sign with which it grows where both rows have mass."""
    logits, reference = _rows_without_mass()
    common = (logits > -torch.inf) & (reference > -torch.inf)
    for alpha, beta in _wide_parameters(name):
        # The last columns are at −inf in both rows; the oracle does not have them.
        student, teacher = (
            nn.functional.pad(x, (0, 3), value=-torch.inf).requires_grad_() for x in (logits, reference)
        )
        value = _stats(name, student, teacher, backend, alpha=alpha, beta=beta)
        value.sum().backward()
        # At e^−200 the least power is negligible, and the largest still within float64.
        near, far = (
            oracle.evaluate(name, logits, reference, alpha=alpha, beta=beta, floor=floor) for floor in (190.0, 200.0)
        )
        finite = _settled(near.value, far.value)
        check_value(value, torch.where(finite, far.value, torch.inf))
        shares = WITHOUT_SHARES.get(name)
        left = (None, None) if shares is None else shares(*(x.double().softmax(-1) for x in (reference, logits)), alpha)
        for of, x, got, instead in (
            ("student", logits, student.grad, left[0]), ("teacher", reference, teacher.grad, left[1]),
        ):  # fmt: skip
            assert not got[:, 24:].any()
            got = got[:, :24]
            limit, floor = getattr(far, of), getattr(far, f"{of}_floor")
            growth = limit - getattr(near, of)
            settled = _settled(getattr(near, of), limit).all(-1)
            if instead is not None:
                limit, settled = torch.where(finite[:, None], limit, instead), torch.ones_like(settled)
                floor = torch.where(finite[:, None], floor, 1.0)
            rows = settled & (common.any(-1) | finite | (instead is not None))
            check_gradient(got[rows], limit[rows], floor[rows])
            for row in (~rows).nonzero()[:, 0].tolist():
                of_both = growth[row, common[row]] if common[row].any() else got[row, x[row] > -torch.inf]
                sign = of_both[0].sign()
                assert (of_both.sign() == sign).all()
                infinite = torch.where(x[row] > -torch.inf, sign * torch.inf, 0.0)
                assert torch.equal(got[row].double(), infinite.double()) or (
                    got[row].isfinite().all() and not common[row].any()
                ), f"row {row} of the {of}, alpha {alpha}, beta {beta}: {got[row]}"


def _settled(near: Tensor, far: Tensor) -> Tensor:
    return torch.isclose(near, far, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in STATISTIC_NAMES if STATISTICS[name].per_label])
@pytest.mark.parametrize("backend", BACKENDS)
def test_label_without_mass(name: str, backend: str) -> None:
    """log 0 = −inf at a column that is −inf or excluded; the other columns keep their gradient."""
    logits, _ = _pair(2, 50)
    logits[0, 7] = -torch.inf
    x = logits.clone().requires_grad_()
    exclude = torch.tensor([-1, 7])
    value = _stats(
        name, x, x if name == "logprob" else x.detach(), backend, labels=torch.tensor([7, 7]), exclude=exclude
    )
    if name == "reference_logprob":
        value = _stats(name, x.detach(), x, backend, labels=torch.tensor([7, 7]), exclude=exclude)
    assert (value == -torch.inf).all()
    value.sum().backward()
    q = logits.double().where(torch.arange(50) != 7, -torch.inf).softmax(-1)
    expected = -q
    expected[0, 7] = 1
    check_gradient(x.grad, expected, torch.ones(2, 1))
    assert x.grad[1, 7] == 0


@pytest.mark.parametrize("name", DISJOINT)
@pytest.mark.parametrize("backend", BACKENDS)
def test_disjoint_rows(name: str, backend: str) -> None:
    logits, reference = _pair(2, 40)
    logits[:, ::2] = reference[:, 1::2] = -torch.inf
    value = kk.token_stats(logits, reference, stats=[name], backend=backend)[name]
    check_value(value, torch.full((2,), DISJOINT[name], dtype=torch.float64))


@pytest.mark.parametrize("bad", ["all -inf", "NaN", "+inf"])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("name", STATISTIC_NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_row_spoils_only_itself(name: str, side: str, bad: str, backend: str) -> None:
    logits, reference = _pair(5, 300)
    good = [x.clone().requires_grad_() for x in (logits, reference)]
    spoilt = [x.clone() for x in (logits, reference)]
    row = spoilt[0 if side == "student" else 1][2]
    if bad == "all -inf":
        row.fill_(-torch.inf)
    else:
        row[250] = torch.nan if bad == "NaN" else torch.inf
    spoilt = [x.requires_grad_() for x in spoilt]
    reads = STATISTICS[name].student if side == "student" else STATISTICS[name].reference
    wanted, got = (_stats(name, *pair, backend) for pair in (good, spoilt))
    others = torch.arange(5) != 2
    assert torch.equal(got[others], wanted[others])
    if not reads:
        assert torch.equal(got, wanted)
    elif name == "argmax":
        assert got[2] == -1
    else:
        assert got[2].isnan()
    if not STATISTICS[name].differentiable:
        return
    wanted.sum().backward()
    got.sum().backward()
    for clean, touched in zip(good, spoilt, strict=True):
        if clean.grad is not None:
            assert torch.equal(touched.grad[others], clean.grad[others])
    own = spoilt[0 if side == "student" else 1].grad
    if reads:
        assert own[2].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tensor_statistics_ignore_a_bad_teacher(backend: str) -> None:
    """What a statistic is does not depend on what else is asked for."""
    logits, reference = _pair(3, 90)
    reference[1] = torch.nan
    alone = kk.token_stats(logits, stats=["entropy", "collision", "logsumexp"], backend=backend)
    beside = kk.token_stats(logits, reference, stats=["forward_kl", *alone], backend=backend)
    assert beside.forward_kl[1].isnan()
    for name, value in alone.items():
        assert torch.equal(beside[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "alpha", "beta"), with_parameters(STATISTIC_NAMES))
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_sixty(name: str, alpha: float, beta: float, dtype: torch.dtype, backend: str) -> None:
    """Both rows peaked, up to 120 apart. A value beyond float32 is infinite; gradients are checked below 1e30."""
    logits, reference = (120 * torch.rand(6, 700).to(dtype) - 60 for _ in range(2))
    reference[3:] = (logits[3:].float() + torch.randn(3, 700)).to(dtype)
    labels = torch.randint(700, (6,))
    full = oracle.evaluate(name, logits, reference, labels, alpha=alpha, beta=beta)
    check_value(_stats(name, logits, reference, backend, labels=labels, alpha=alpha, beta=beta), full.value)
    tame = (full.value.abs() < 1e30).reshape(6, -1).all(1)
    assert tame[3:].any()
    check_statistic(
        name, logits[tame], reference[tame], labels[tame], backend=backend, alpha=alpha, beta=beta
    )  # fmt: skip


@pytest.mark.parametrize("columns", [9, 40, 5000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_argmax_takes_the_first_of_ties(columns: int, backend: str) -> None:
    logits = -torch.rand(4, columns)
    for row, ties in enumerate(([0, 5], [columns - 1, columns - 3], [2, 3, columns - 2], list(range(columns)))):
        logits[row, ties] = 1.5
    stats = kk.token_stats(logits, stats=["argmax", "max_logprob"], backend=backend)
    assert stats.argmax.tolist() == [0, columns - 3, 2, 0]
    assert stats.argmax.dtype == torch.int64
    assert torch.allclose(stats.max_logprob, logits.log_softmax(-1).amax(-1), atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tvd_has_no_gradient_where_the_rows_agree(backend: str) -> None:
    """|p − q| has a kink at p = q; its gradient there is 0, also in columns that agree inside rows that do not."""
    logits = torch.tensor([[0.0, 0.0, 1.0, 2.0], [3.0, 1.0, 1.0, 0.0]])
    reference = torch.tensor([[0.0, 0.0, 2.0, 1.0], [3.0, 1.0, 1.0, 0.0]])
    student = logits.clone().requires_grad_()
    value = kk.token_stats(student, reference, stats=["tvd"], backend=backend).tvd
    value.sum().backward()
    q, p = logits.double().softmax(-1), reference.double().softmax(-1)
    g = 0.5 * q * torch.tensor([[0.0, 0.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(value.double(), 0.5 * (p - q).abs().sum(-1), atol=1e-6)
    assert torch.allclose(student.grad.double(), g - q * g.sum(-1, keepdim=True), atol=1e-7)
    assert not student.grad[1].any()


@pytest.mark.parametrize(("name", "alpha"), [("renyi", 1.7), ("renyi", 2.5), ("alpha", 1.7), ("alpha", 2.5)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_probability_below_every_float_is_zero(name: str, alpha: float, backend: str) -> None:
    """e^−1020 of the teacher in a column that the student has at −inf: as if the teacher had it at −inf, too."""
    student, teacher = torch.tensor([[-torch.inf, 0.0]]), torch.tensor([[-20.0, 1000.0]])
    for rows in ((student, teacher), (student.roll(1, 1), teacher.roll(1, 1))):
        x, t = (row.clone().requires_grad_() for row in rows)
        value = kk.token_stats(x, t, stats=[name], alpha=alpha, backend=backend)[name]
        value.sum().backward()
        found = value.item(), x.grad.abs().max().item(), t.grad.abs().max().item()
        assert found == pytest.approx((0, 0, 0), abs=1e-6)
