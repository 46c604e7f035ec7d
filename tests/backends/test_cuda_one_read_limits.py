"""The one-read CUDA kernel at the ends of numbers, on the host's model of a GPU: −inf, infinite values, bad rows."""

from __future__ import annotations

import itertools

import pytest
import torch
from checks import CUDA_ON_HOST, DIVERGENCES, with_parameters
from cuda_host.one_read import DTYPES, Machine, check, kernel, pair, prepare, run, some_coefficients, uneven
from torch import Tensor

if not CUDA_ON_HOST:
    pytest.skip("runs under KLDIV_CUDA_HOST=1", allow_module_level=True)


def _massless(columns: int, slice_columns: int) -> Tensor:
    """A row each: the head, the tail, a whole slice, all but one slice, every other column, one column."""
    out = torch.zeros(6, columns, dtype=torch.bool)
    out[0, :100] = out[1, -100:] = True
    out[2, slice_columns : 2 * slice_columns] = True
    out[3, :slice_columns] = out[3, 2 * slice_columns :] = True
    out[4, ::2] = out[5, 300] = True
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*DIVERGENCES, "entropy"])
def test_minus_infinity(name: str, dtype: torch.dtype, machine: Machine) -> None:
    """In both rows for every divergence; in one of them for those that are finite there."""
    slice_columns, columns = uneven(4)
    out = _massless(columns, slice_columns)
    logits, reference = pair(6, columns, dtype)
    student, teacher = logits.masked_fill(out, -torch.inf), reference.masked_fill(out, -torch.inf)
    _, gradient = check((name,), student, None if name == "entropy" else teacher)
    assert not gradient[out].any()
    if name in ("forward_kl", "js", "hellinger", "tvd", "skew_kl", "triangular", "cross_entropy"):
        check((name,), logits, teacher)
    if name in ("reverse_kl", "js", "hellinger", "tvd", "skew_reverse_kl", "triangular"):
        check((name,), student, reference)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_many_equal_terms(name: str, machine: Machine) -> None:
    """One row has a single column, the other all of them alike: their terms are equal, and merging takes most of each
    away, so that what rounding does to all of them would stay."""
    machine(2, 1, clusters=1)
    columns = 32_768
    single, alike = torch.zeros(1, columns), torch.zeros(1, columns)
    single[0, 777] = 40
    rows = (alike, single) if name == "forward_kl" else (single, alike)
    values, _ = check((name,), *rows)
    q, p = (row.double().log_softmax(-1) for row in (single, alike))
    assert values.item() == pytest.approx((q.exp() * (q - p)).sum().item(), rel=1e-6)


@pytest.mark.parametrize("bad", ["all -inf", "NaN", "+inf"])
@pytest.mark.parametrize(
    ("name", "side"), [*itertools.product(DIVERGENCES, ("student", "teacher")), ("entropy", "student")]
)
def test_a_bad_row_spoils_only_itself(name: str, side: str, bad: str, machine: Machine) -> None:
    machine(4, 3, clusters=1)
    good = pair(6, 776)
    spoilt = [x.clone() for x in good]
    row = spoilt[0 if side == "student" else 1][2]
    row[slice(None) if bad == "all -inf" else 500] = {"all -inf": -torch.inf, "NaN": torch.nan, "+inf": torch.inf}[bad]
    coefficients, others = some_coefficients((name,), 6), torch.arange(6) != 2
    wanted, got = (run(prepare((name,), *pair), coefficients) for pair in (good, spoilt))
    assert torch.equal(got[0][:, others], wanted[0][:, others])
    assert torch.equal(got[1][others], wanted[1][others])
    assert got[0][0, 2].isnan()
    assert got[1][2].isnan().any()
    # A weight of 0 keeps it out of the gradient.
    coefficients[0, 2] = 0
    assert not run(prepare((name,), *spoilt), coefficients)[1][2].any()


@pytest.mark.parametrize("side", ["student", "teacher", "disjoint"])
@pytest.mark.parametrize(("name", "alpha", "beta"), with_parameters(DIVERGENCES))
def test_infinite_where_two_sweeps_are(name: str, alpha: float, beta: float, side: str, machine: Machine) -> None:
    """Columns at −inf in one of the rows: values and gradients are infinite, NaN or finite as test_contract.py has them
    of the two-sweep kernels."""
    slice_columns, columns = uneven(4)
    out = _massless(columns, slice_columns)
    logits, reference = pair(6, columns, DTYPES[len(name) % 3])
    if side != "teacher":
        logits[out] = -torch.inf
    if side != "student":
        reference[out if side == "teacher" else ~out] = -torch.inf
    coefficients = some_coefficients((name,), 6)
    call = prepare((name,), logits, reference, alpha=alpha, beta=beta)
    assert "one-read" in kernel(call, coefficients)
    one_read = run(call, coefficients)
    machine(plan="two-sweep")
    assert "two-sweep" in kernel(call, coefficients)
    for got, wanted in zip(one_read, run(call, coefficients), strict=True):
        assert torch.equal(got.isnan(), wanted.isnan())
        assert torch.equal(got.where(got.isinf(), 0), wanted.where(wanted.isinf(), 0))
    if (name, side) in (("forward_kl", "student"), ("reverse_kl", "teacher"), ("jeffreys", "disjoint")):
        assert one_read[0].isposinf().all()


def test_code_from_older_ptx_has_no_clusters(machine: Machine) -> None:
    """A device of sm_90 runs what was compiled for sm_80 where a build has nothing newer: kernels without clusters."""
    logits, reference = pair(3, 64 * 1024)
    machine(plan="")
    check(("forward_kl",), logits, reference)
    machine.environment.setenv("KLDIV_HOST_COMPILED", "80")
    check(("forward_kl",), logits, reference, ran=lambda kernel: "two-sweep" in kernel)
