"""f-divergences of sampled tokens beside the statistics of the same names."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from recipe_case import batch, double, gradient_of, same

import kldiv_kernels as kk
from kldiv_kernels.recipes import f_divergences
from kldiv_kernels.recipes.f_divergences import GENERATORS, f_curvature, f_slope, f_value
from kldiv_kernels.registry import STATISTICS

INF, NAN = math.inf, math.nan
NAMES = [
    (name, alpha) for name in GENERATORS for alpha in ((0.5, 0.3, 0.0, 1.0, 1.7, -0.5) if name == "alpha" else (0.5,))
]
DTYPES = (torch.float32, torch.float64)
BATCH = batch(sequences=4, tokens=3, vocab=9, seed=2)
S, T = BATCH["logits"], BATCH["teacher_logits"]
EXTREMES = [-INF, -700.0, -100.0, -30.0, -1.5, -1e-3, 0.0, 1e-3, 1.5, 30.0, 100.0, 700.0, INF]


@pytest.mark.parametrize(("name", "alpha"), NAMES)
def test_the_mean_of_a_generator_is_the_statistic(name: str, alpha: float) -> None:
    """Over the vocabulary: its value under p; and its gradient, by values under p and by slopes under q."""
    s = S.clone().requires_grad_()
    statistic = kk.token_stats(s, T, stats=(name,), alpha=alpha)[name]
    wanted = gradient_of(statistic.sum(), s)
    log_q, log_p = s.log_softmax(-1), T.log_softmax(-1)
    value = (log_p.exp() * f_value(name, log_q - log_p, alpha)).sum(-1)
    same(value, statistic)
    same(gradient_of(value.sum(), s), wanted)
    slope = f_slope(name, (log_q - log_p).detach(), alpha)
    same(gradient_of((log_q.detach().exp() * slope * log_q).sum(), s), wanted)


@pytest.mark.parametrize(("name", "alpha"), [(name, alpha) for name, alpha in NAMES if name != "tvd"])
def test_the_curvature_is_the_derivative_of_the_slope(name: str, alpha: float) -> None:
    x = torch.linspace(-8, 8, 97, dtype=torch.float64, requires_grad=True)
    same(f_curvature(name, x.detach(), alpha), gradient_of(f_slope(name, x, alpha).sum(), x))
    assert (f_curvature(name, x.detach(), alpha) > 0).all()


@pytest.mark.parametrize(("name", "alpha"), NAMES)
def test_a_generator_is_0_and_flat_at_1_and_nowhere_below(name: str, alpha: float) -> None:
    x = torch.cat([double(0.0), torch.linspace(-12, 12, 101, dtype=torch.float64)]).requires_grad_()
    value = f_value(name, x, alpha)
    rise = gradient_of(value.sum(), x)
    assert value[0] == 0
    assert rise[0] == 0
    assert (value >= 0).all()
    # u f'(u), with f' less its value at u = 1.
    slope = f_slope(name, x.detach(), alpha)
    same(rise, x.detach().exp() * (slope - slope[0]), 1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "alpha"), NAMES)
def test_extreme_ratios(name: str, alpha: float, dtype: torch.dtype) -> None:
    """No NaN; what is finite in float64 and not too large for float32 is the same there; infinities are limits."""
    x = torch.tensor(EXTREMES, dtype=dtype, requires_grad=True)
    value = f_value(name, x, alpha)
    found = [value.detach(), gradient_of(value.sum(), x), f_slope(name, x.detach(), alpha)]
    if name != "tvd":
        found.append(f_curvature(name, x.detach(), alpha))
    exact = double(*EXTREMES).requires_grad_()
    wide = f_value(name, exact, alpha)
    wanted = [wide.detach(), gradient_of(wide.sum(), exact), f_slope(name, exact.detach(), alpha)]
    for got, expected in itertools.zip_longest(found, wanted):
        assert not got.isnan().any()
        if expected is not None:
            fits = expected.abs() < torch.finfo(dtype).max
            torch.testing.assert_close(got[fits], expected[fits].to(dtype), rtol=2e-5, atol=1e-5)
            assert (got[~fits] == expected[~fits].sign() * INF).all()


@pytest.mark.parametrize(
    ("name", "value", "rise"),
    [("forward_kl", INF, -1), ("reverse_kl", 1, 0), ("jeffreys", INF, -1), ("js", math.log(2) / 2, 0),
     ("hellinger", 0.5, 0), ("tvd", 0.5, 0), ("reverse_chi2", 1, 0), ("forward_chi2", INF, -INF)],
)  # fmt: skip
def test_what_q_does_not_have_and_what_p_does_not(name: str, value: float, rise: float) -> None:
    x = double(-INF, INF).requires_grad_()
    got = f_value(name, x)
    same(got, double(value, INF))
    same(gradient_of(got.sum(), x), double(rise, INF))
    assert f_value(name, double(NAN)).isnan()


def test_alpha_near_its_limits() -> None:
    x = torch.linspace(-20, 20, 81, dtype=torch.float64)
    for limit, name in ((0.0, "reverse_kl"), (1.0, "forward_kl")):
        for function in (f_value, f_slope, f_curvature):
            for alpha in (limit, limit - 1e-9, limit + 1e-9):
                shift = function("alpha", x, alpha) - function(name, x)
                # Slopes are the same but for a constant.
                shift = shift - shift[40] if function is f_slope else shift
                assert (shift.abs() <= 1e-6 * (1 + function(name, x).abs())).all()
    same(f_value("alpha", x, 0.5), 4 * f_value("hellinger", x))
    same(2 * f_value("alpha", x, 2.0), f_value("forward_chi2", x))
    same(2 * f_value("alpha", x, -1.0), f_value("reverse_chi2", x), 1e-9)


def test_generators_that_there_are_not() -> None:
    for function in (f_value, f_slope, f_curvature):
        with pytest.raises(ValueError, match=rf"^{function.__name__}: name is 'kl'; expected forward_kl, reverse_kl"):
            function("kl", double(0.0))
    with pytest.raises(ValueError, match=r"^f_curvature: name is 'tvd', whose slope jumps at u = 1; exp"):
        f_curvature("tvd", double(0.0))
    assert set(GENERATORS) <= STATISTICS.keys()
    assert f_divergences.generator("js") is GENERATORS["js"]
