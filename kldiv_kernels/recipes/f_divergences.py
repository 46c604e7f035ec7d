"""f-divergences of sampled tokens, of whole sequences and of density ratios: D_f(q‖p) = E_p[f(q/p)].

Everything is a function of L = log q − log p, elementwise, in nats. q is trained, p is not. The two ways to a gradient:

    samples of p    loss f(u), with gradient      `f_value`           its mean is D_f, its gradient's mean is ∇D_f
    samples of q    loss sg[f'(u)]·log q          `f_slope`           its gradient's mean is ∇D_f, its value is none

The mean of each over the vocabulary is that of the statistic of the same name. Many papers' Jensen–Shannon divergence
is twice the one here, which has two halves before its two KL divergences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from kldiv_kernels.policy import with_slope

_LOG_2 = 0.6931471805599453
Function = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Generator:
    """f of u = e^L as functions of (L, alpha): f(u), its derivative by L, f'(u) and its derivative by L.

    f(1) = 0 and f'(1) = 0 in `value` and `rise`, so that no term is below 0; `slope` may be f' less a constant, whose
    mean gradient is 0.
    """

    value: Function
    rise: Function
    slope: Function
    curvature: Function | None


def _power(log_ratio: Tensor, c: float) -> Tensor:
    """u^c, also for c = 0 at L = ±inf."""
    return torch.ones_like(log_ratio) if c == 0 else (c * log_ratio).exp()


def _expm1_over(log_ratio: Tensor, c: float) -> Tensor:
    """(u^c − 1)/c, which is L at c = 0."""
    return log_ratio if c == 0 else torch.expm1(c * log_ratio) / c


def _alpha_rise(log_ratio: Tensor, alpha: float) -> Tensor:
    """u (1 − u^−α)/α, which is u·log u at α = 0; its limit where u is 0 and u^−α, or log u, infinite."""
    u = log_ratio.exp()
    direct = u * _expm1_over(log_ratio, -alpha)
    if alpha <= 0:
        return torch.where(log_ratio == -torch.inf, 0.0, direct)
    return torch.where(-alpha * log_ratio > 1, (u - _power(log_ratio, 1 - alpha)) / alpha, direct)


def _alpha_value(log_ratio: Tensor, alpha: float) -> Tensor:
    """In one of two forms, of which neither divides by what goes to 0: f_α(u) = u f_{1−α}(1/u)."""
    beyond = torch.expm1(log_ratio)
    if alpha >= 0.5:
        out = (beyond - _expm1_over(log_ratio, 1 - alpha)) / alpha
    else:
        out = (_alpha_rise(log_ratio, alpha) - beyond) / (1 - alpha)
    # A difference of two infinities is an infinite value.
    return torch.where(out.isnan() & ~log_ratio.isnan(), torch.inf, out.clamp_min(0))


def _js_value(log_ratio: Tensor, _: float) -> Tensor:
    """f(u) = u f(1/u), so that f is needed for u ≤ 1 alone."""
    below = -log_ratio.abs()
    part = torch.where(below == -torch.inf, 0.0, below.exp() * (_LOG_2 + logsigmoid(below)))
    return 0.5 * log_ratio.clamp_min(0).exp() * (part + _LOG_2 + logsigmoid(-below))


def _js_rise(log_ratio: Tensor, _: float) -> Tensor:
    rise = log_ratio.exp() * _js_slope(log_ratio, _)
    return torch.where(log_ratio == -torch.inf, 0.0, rise)


def _js_slope(log_ratio: Tensor, _: float) -> Tensor:
    return 0.5 * (_LOG_2 + logsigmoid(log_ratio))


GENERATORS: dict[str, Generator] = {
    "forward_kl": Generator(
        lambda x, _: _alpha_value(x, 1.0), lambda x, _: torch.expm1(x), lambda x, _: -(-x).exp(),
        lambda x, _: (-x).exp(),
    ),
    "reverse_kl": Generator(
        lambda x, _: _alpha_value(x, 0.0), lambda x, _: _alpha_rise(x, 0.0), lambda x, _: x,
        lambda x, _: torch.ones_like(x),
    ),
    "jeffreys": Generator(
        lambda x, _: torch.expm1(x) * x, lambda x, _: _alpha_rise(x, 0.0) + torch.expm1(x),
        lambda x, _: x - (-x).exp(), lambda x, _: 1 + (-x).exp(),
    ),
    "js": Generator(_js_value, _js_rise, _js_slope, lambda x, _: 0.5 * (-x).sigmoid()),
    "alpha": Generator(
        _alpha_value, _alpha_rise, lambda x, alpha: _expm1_over(x, -alpha), lambda x, alpha: _power(x, -alpha)
    ),
    "hellinger": Generator(
        lambda x, _: 0.5 * torch.expm1(x / 2).square(), lambda x, _: 0.5 * (x / 2).exp() * torch.expm1(x / 2),
        lambda x, _: -0.5 * (-x / 2).exp(), lambda x, _: 0.25 * (-x / 2).exp(),
    ),
    "tvd": Generator(
        lambda x, _: 0.5 * torch.expm1(x).abs(), lambda x, _: 0.5 * x.exp() * x.sign(), lambda x, _: 0.5 * x.sign(),
        None,
    ),
    "reverse_chi2": Generator(
        lambda x, _: torch.expm1(x).square(), lambda x, _: 2 * x.exp() * torch.expm1(x),
        lambda x, _: 2 * torch.expm1(x), lambda x, _: 2 * x.exp(),
    ),
    "forward_chi2": Generator(
        lambda x, _: 4 * (x / 2).sinh().square(), lambda x, _: 2 * x.sinh(), lambda x, _: -(-2 * x).exp(),
        lambda x, _: 2 * (-2 * x).exp(),
    ),
}  # fmt: skip


def generator(name: str, where: str = "generator") -> Generator:
    """The generator of that name. Raises ValueError, which begins with `where`, for another."""
    if name not in GENERATORS:
        raise ValueError(f"{where}: name is {name!r}; expected {', '.join(GENERATORS)}")
    return GENERATORS[name]


def f_value(name: str, log_ratio: Tensor, alpha: float = 0.5) -> Tensor:
    """f(u) ≥ 0 with its gradient u f'(u) by L, like `log_ratio`: the loss of samples of p.

    forward_kl e^L − 1 − L; reverse_kl e^L·L − e^L + 1; jeffreys (e^L − 1)·L; js ½[e^L·L − (e^L + 1)·log ½(e^L + 1)];
    alpha (e^{(1−α)L} − (1 − α)e^L − α)/(α(α − 1)); hellinger ½(e^{L/2} − 1)²; tvd ½|e^L − 1|; reverse_chi2
    (e^L − 1)²; forward_chi2 (e^L − 1)² e^−L.

    Args:
        log_ratio: L = log q − log p of the samples. At ±inf the limits; e^L·L is 0 at −inf.
        alpha: of alpha; the others have none. 1 is forward_kl, 0 is reverse_kl. Default 0.5, four times hellinger.

    Raises ValueError for another name.

    >>> f_value("reverse_kl", torch.tensor([0.0, 1.0, -torch.inf])).round(decimals=4)
    tensor([0., 1., 1.])
    """
    found, at = generator(name, "f_value"), log_ratio.detach()
    return with_slope(found.value(at, alpha), log_ratio, found.rise(at, alpha))


def f_slope(name: str, log_ratio: Tensor, alpha: float = 0.5) -> Tensor:
    """f'(u), constants dropped, like `log_ratio`: detached, the weight of log q on samples of q.

    forward_kl −e^−L; reverse_kl L; jeffreys L − e^−L; js ½(log 2 − log(1 + e^−L)); alpha (1 − e^−αL)/α; hellinger
    −½e^{−L/2}; tvd ½ sign L; reverse_chi2 2(e^L − 1); forward_chi2 −e^−2L. Args and errors: see `f_value`.

    >>> f_slope("reverse_kl", torch.tensor([0.0, 1.0])).tolist()
    [0.0, 1.0]
    """
    return generator(name, "f_slope").slope(log_ratio, alpha)


def f_curvature(name: str, log_ratio: Tensor, alpha: float = 0.5) -> Tensor:
    """u f''(u), the derivative of `f_slope` by L, like `log_ratio`.

    forward_kl e^−L; reverse_kl 1; jeffreys 1 + e^−L; js ½/(1 + e^L); alpha e^−αL; hellinger ¼e^{−L/2}; reverse_chi2
    2e^L; forward_chi2 2e^−2L. Args: see `f_value`. Raises ValueError for another name, and for tvd, whose slope jumps.

    >>> f_curvature("jeffreys", torch.tensor([0.0])).tolist()
    [2.0]
    """
    curvature = generator(name, "f_curvature").curvature
    if curvature is None:
        expected = ", ".join(other for other, found in GENERATORS.items() if found.curvature is not None)
        raise ValueError(f"f_curvature: name is {name!r}, whose slope jumps at u = 1; expected {expected}")
    return curvature(log_ratio, alpha)
