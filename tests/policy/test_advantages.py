"""Advantages against loops over the groups, in float64 and in fractions."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kldiv_kernels import advantages

# Any integers, in any order; groups of five, three, two and one.
GROUPS = torch.tensor([9, -4, 9, 300, 9, -4, 9, 300, 9, 7, -4])


def _rewards() -> Tensor:
    rewards = torch.randn(11, dtype=torch.float64)
    rewards[GROUPS == 300] = 0.7
    return rewards


def _per_group(function: Callable[[list[float], int], float], rewards: Tensor) -> list[float]:
    out = []
    for i, group in enumerate(GROUPS.tolist()):
        members = [j for j, other in enumerate(GROUPS.tolist()) if other == group]
        out.append(function([rewards[j].item() for j in members], members.index(i)))
    return out


def _std(x: list[float]) -> float:
    return statistics.stdev(x) if len(x) > 1 else 0.0


def _mean(x: list[float]) -> float:
    return sum(x) / len(x) if x else 0.0


def _without(x: list[float], i: int) -> list[float]:
    return x[:i] + x[i + 1 :]


def _rloo(x: list[float], i: int) -> float:
    return x[i] - _mean(_without(x, i)) if len(x) > 1 else 0.0


def _leave_one_out(x: list[float], i: int) -> float:
    std = _std(_without(x, i))
    return _rloo(x, i) / (std + 1e-6) if std > 0 else _rloo(x, i)


EXPECTED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[list[float], int], float]]] = {
    "group_relative": (advantages.group_relative, lambda x, i: (x[i] - _mean(x)) / (_std(x) + 1e-4)),
    "eps": (
        lambda r, g: advantages.group_relative(r, g, eps=0.5), lambda x, i: (x[i] - _mean(x)) / (_std(x) + 0.5),
    ),
    "unscaled": (lambda r, g: advantages.group_relative(r, g, scale=False), lambda x, i: x[i] - _mean(x)),
    "rloo": (advantages.rloo, _rloo),
    "leave_one_out": (advantages.leave_one_out, _leave_one_out),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_groups(name: str) -> None:
    function, formula = EXPECTED[name]
    rewards = _rewards()
    got = function(rewards.requires_grad_(), GROUPS)
    assert not got.requires_grad
    assert torch.allclose(got, torch.tensor(_per_group(formula, rewards), dtype=torch.float64), rtol=1e-9, atol=1e-12)
    single = function(rewards.float(), GROUPS.int())
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), got, rtol=1e-4, atol=1e-5)


def test_scaled_by_the_batch() -> None:
    rewards = _rewards()
    got = advantages.group_relative(rewards, GROUPS, scale="batch", eps=0.1)
    centred = torch.tensor(_per_group(lambda x, i: x[i] - _mean(x), rewards), dtype=torch.float64)
    assert torch.allclose(got, centred / (_std(rewards.tolist()) + 0.1), rtol=1e-9, atol=1e-12)
    assert not got[GROUPS == 300].any()
    assert advantages.group_relative(torch.ones(1), torch.zeros(1).long(), scale="batch").item() == 0
    with pytest.raises(ValueError, match=r"group_relative: scale is 'group'; expected True, False or 'batch'"):
        advantages.group_relative(rewards, GROUPS, scale="group")


def test_groups_with_variance() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        kept = advantages.with_variance(_rewards().to(dtype), GROUPS)
        assert kept.tolist() == [group in (9, -4) for group in GROUPS.tolist()]
    assert advantages.with_variance(torch.ones(0), GROUPS[:0]).tolist() == []


def test_leave_one_out_where_the_others_agree() -> None:
    """One success among equal failures: dividing by rounding instead of a deviation would be enormous."""
    for dtype in (torch.float32, torch.float64):
        got = advantages.leave_one_out(torch.tensor([0.1, 0.1, 0.1, 0.9], dtype=dtype), torch.zeros(4).long())
        assert got[3].item() == pytest.approx(0.8)
        assert got[:3].abs().max() < 1


REINFORCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "batch": lambda r, g: advantages.reinforce_plus_plus(r),
    "groups": advantages.reinforce_plus_plus,
    "tokens": lambda r, g: advantages.reinforce_plus_plus(r, None, torch.rand(len(r), 3) < 0.7),
    "tokens of groups": lambda r, g: advantages.reinforce_plus_plus(r, g, torch.rand(len(r), 3) < 0.7),
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
_generated = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("name", [*EXPECTED, *REINFORCE])
@_generated
@given(
    st.sampled_from(DTYPES), st.sampled_from([1, 2, 3, 7, 8, 16, 100, 300, 1000]), st.floats(-100, 100),
    st.floats(1e-8, 1e-3),
)  # fmt: skip
def test_equal_rewards_have_no_advantage(name: str, dtype: torch.dtype, size: int, reward: float, eps: float) -> None:
    """Exactly: a mean that rounds is divided by the standard deviation of nothing but its own rounding."""
    equal = torch.full((size,), reward, dtype=dtype)
    if name in REINFORCE:
        assert not REINFORCE[name](equal, torch.zeros(size).long()).any()
    if name not in (*EXPECTED, "groups"):
        return
    # Beside groups that do not agree, in any order.
    order = torch.randperm(size + 9)
    rewards = torch.cat([equal, (50 * torch.randn(9)).to(dtype)])[order]
    groups = torch.cat([torch.full((size,), 3), torch.tensor([8] * 5 + [1] * 4)])[order]
    function = REINFORCE[name] if name in REINFORCE else EXPECTED[name][0]
    got = function(rewards, groups)
    assert got.dtype == dtype
    assert not got[groups == 3].any()
    assert got[groups != 3].all()
    assert got.isfinite().all()


@pytest.mark.parametrize("name", EXPECTED)
@_generated
@given(
    st.sampled_from(DTYPES), st.integers(2, 12), st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
    st.sampled_from([0.0, 1.0, 100.0, 1e4]), st.sampled_from([0.0, 1e3, 3e4]), st.integers(0, 1000),
)  # fmt: skip
def test_offsets_and_outliers(
    name: str, dtype: torch.dtype, size: int, spread: float, offset: float, outlier: float, seed: int
) -> None:
    """Rewards far from 0, nearly equal, or one far from the others, in all dtypes: the definition, rounded once."""
    generator = torch.Generator().manual_seed(seed)
    rewards = offset + spread * torch.randn(size, generator=generator, dtype=torch.float64)
    rewards[seed % size] += outlier
    rewards = rewards.to(dtype)
    function, formula = EXPECTED[name]
    members = [Fraction(x) for x in rewards.tolist()]
    # Beyond float16's range an advantage is infinite, below it 0.
    expected = torch.tensor([float(formula(members, i)) for i in range(size)], dtype=torch.float64).to(dtype)
    got = function(rewards, torch.zeros(size).long())
    relative = max(torch.finfo(dtype).eps, 1e-9)
    assert torch.allclose(got.double(), expected.double(), rtol=relative, atol=relative * torch.finfo(dtype).tiny)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_reinforce_plus_plus(grouped: bool, masked: bool) -> None:
    rewards = _rewards()
    returns = torch.tensor(_per_group(lambda x, i: x[i] - _mean(x), rewards)).double() if grouped else rewards
    mask = torch.rand(11, 5) < 0.6
    got = advantages.reinforce_plus_plus(rewards, GROUPS if grouped else None, mask.int() if masked else None)
    if not masked:
        assert torch.allclose(got, (returns - returns.mean()) / (returns.var() + 1e-8).sqrt(), atol=1e-6)
        return
    tokens = returns[:, None].expand(11, 5)[mask]
    assert torch.allclose(got[mask], (tokens - tokens.mean()) / (tokens.var() + 1e-8).sqrt(), atol=1e-6)
    assert not got[~mask].any()


def test_nothing_to_normalise() -> None:
    assert not advantages.reinforce_plus_plus(torch.ones(3), torch.arange(3), torch.zeros(3, 4).bool()).any()
    assert not advantages.reinforce_plus_plus(torch.full((1,), 5.0)).any()
    for function in (advantages.group_relative, advantages.rloo, advantages.leave_one_out):
        assert function(torch.zeros(0), torch.zeros(0).long()).shape == (0,)
        assert not function(torch.rand(3), torch.arange(3)).any()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: advantages.rloo([1.0], GROUPS), TypeError, "rloo: rewards is list; expected a floating-point torch"),
        (lambda: advantages.rloo(GROUPS, GROUPS), TypeError, "rloo: rewards is torch.int64; expected a floating"),
        (
            lambda: advantages.group_relative(torch.zeros(3, 2), GROUPS), ValueError,
            "group_relative: rewards has shape [3, 2]; expected [B], one a sample",
        ),
        (
            lambda: advantages.leave_one_out(torch.zeros(3), GROUPS), ValueError,
            "leave_one_out: groups has shape [11] on cpu; expected [3] on cpu like rewards",
        ),
        (
            lambda: advantages.group_relative(torch.zeros(3), torch.zeros(3)), TypeError,
            "group_relative: groups is torch.float32; expected a torch.Tensor of integers",
        ),
        (
            lambda: advantages.reinforce_plus_plus(torch.zeros(3), mask=torch.zeros(2, 3).bool()), ValueError,
            "reinforce_plus_plus: mask is torch.bool [2, 3]; expected bool or integers [3, tokens]",
        ),
    ],
)  # fmt: skip
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
