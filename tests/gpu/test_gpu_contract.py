"""The numerical contract on the GPU: −inf, bad rows, masks by large negatives, divergences of 1e-7."""

from __future__ import annotations

import oracle
import pytest
import torch
from checks import check_gradient, check_value, with_parameters
from infinities import FINITE_GRADIENT, NO_STUDENT_MASS, NO_TEACHER_MASS
from setting import DTYPES, KERNELS, LOSSES, NAMES, QUICK, compute, rows
from small_divergences import SCENARIOS, VANISHING, log_sums

from kldiv_kernels.registry import STATISTICS

SMALL = [name for name in VANISHING if name in LOSSES]
# 20,011 float32 columns are several slices, some of them at −inf from end to end.
WIDTHS = (64,) if QUICK else (64, 20_011)


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize(("name", "alpha", "beta"), with_parameters(NAMES))
@pytest.mark.parametrize("backend", KERNELS)
def test_minus_infinity(name: str, alpha: float, beta: float, side: str, columns: int, backend: str) -> None:
    logits, reference = rows(4, columns), rows(4, columns)
    for x in {"student": [logits], "teacher": [reference], "both": [logits, reference]}[side]:
        x[0, 5] = x[1, columns - 1] = x[2, 3 : columns - 20] = x[3, ::2] = -torch.inf
    labels = torch.ones(4, dtype=torch.int64)
    got = compute(name, logits, reference, labels, backend, alpha=alpha, beta=beta)
    expected = oracle.evaluate(name, logits, reference, labels, alpha=alpha, beta=beta, floor=680.0)
    table = {"student": NO_STUDENT_MASS, "teacher": NO_TEACHER_MASS, "both": {}}[side]
    infinite = name in table and table[name](alpha, beta)
    check_value(got.value, torch.full_like(expected.value, torch.inf) if infinite else expected.value)
    for of in ("student", "teacher"):
        gradient = getattr(got, of)
        if gradient is not None and not (infinite and FINITE_GRADIENT.get(name) != of):
            check_gradient(gradient, getattr(expected, of), getattr(expected, f"{of}_floor"))


@pytest.mark.parametrize("bad", ["all -inf", "NaN", "+inf"])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", KERNELS)
def test_a_bad_row_spoils_only_itself(name: str, side: str, bad: str, backend: str) -> None:
    logits, reference = rows(5, 300), rows(5, 300)
    labels = torch.ones(5, dtype=torch.int64)
    clean = compute(name, logits, reference, labels, backend)
    row = (logits if side == "student" else reference)[2]
    if bad == "all -inf":
        row.fill_(-torch.inf)
    else:
        row[250] = torch.nan if bad == "NaN" else torch.inf
    got = compute(name, logits, reference, labels, backend)
    reads = STATISTICS[name].student if side == "student" else STATISTICS[name].reference
    others = torch.arange(5) != 2
    assert torch.equal(got.value[others], clean.value[others])
    if not reads:
        assert torch.equal(got.value, clean.value)
    elif name == "argmax":
        assert got.value[2] == -1
    else:
        assert got.value[2].isnan()
    for of in ("student", "teacher"):
        gradient, wanted = getattr(got, of), getattr(clean, of)
        assert (gradient is None) == (wanted is None)
        if gradient is not None:
            assert torch.equal(gradient[others], wanted[others])
            if reads and of == side:
                assert gradient[2].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", KERNELS)
def test_masks_by_the_lowest_float(name: str, dtype: torch.dtype, backend: str) -> None:
    logits, reference = rows(3, 1000, dtype=dtype), rows(3, 1000, dtype=dtype)
    logits[:, 600:] = reference[:, 600:] = torch.finfo(dtype).min
    labels = torch.tensor([4, 5, 6])
    got = compute(name, logits, reference, labels, backend, temperature=0.5)
    expected = oracle.evaluate(name, logits[:, :600], reference[:, :600], labels, temperature=0.5)
    check_value(got.value, expected.value)
    for of in ("student", "teacher"):
        gradient = getattr(got, of)
        if gradient is not None:
            check_gradient(gradient[:, :600], getattr(expected, of), getattr(expected, f"{of}_floor"))
            assert not gradient[:, 600:].any()


def _check_small(name: str, scenario: str, alpha: float, beta: float, backend: str) -> None:
    logits, reference = SCENARIOS[scenario]()
    got = compute(name, logits, reference, None, backend, alpha=alpha, beta=beta)
    expected = oracle.evaluate(name, logits, reference, alpha=alpha, beta=beta)
    assert (got.value >= 0).all()
    error = (got.value.double() - expected.value).abs()
    assert (error <= 0.01 * expected.value.clamp_min(1e-8)).all(), f"got {got.value}, expected {expected.value}"
    if name != "tvd":  # its gradient jumps where p = q
        assert got.student is not None
        check_gradient(got.student, expected.student, log_sums(backend) * expected.student_floor)


@pytest.mark.parametrize("scenario", list(SCENARIOS)[:2] if QUICK else list(SCENARIOS))
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("backend", KERNELS)
def test_small_divergences(name: str, scenario: str, backend: str) -> None:
    """A KL of 1e-7 is right to 1 % and not negative."""
    for alpha, beta in [(0.5, 0.5)] if QUICK else [(a, b) for _, a, b in with_parameters([name])]:
        _check_small(name, scenario, alpha, beta, backend)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("backend", KERNELS)
def test_equal_rows_give_zero(name: str, backend: str) -> None:
    logits = rows(3, 1000)
    logits[1, 40:90] = -torch.inf
    logits[2] += 50
    got = compute(name, logits, logits, None, backend, temperature=0.8)
    assert (got.value == 0).all(), f"got {got.value}"
