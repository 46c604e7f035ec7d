"""One divergence, one short class: the PyTorch twin of `csrc/divergences.h`.

Notation, per row: p = softmax(t) is the teacher (reference), q = softmax(s) the student (policy),
u_j = log p_j - log q_j. A statistic is D = combine(sum_j value_j) and its gradients come from
g_j = d value_j / d log q_j:  dD/ds_k = g_k - q_k sum_j g_j  (the same with p for the teacher).

Every `value` is written so that each term is non-negative (a Bregman form: terms that sum to zero over a
row, such as q_j - p_j, are added). That keeps divergences of 1e-7 accurate, and makes sum_j g_j vanish for
the KL divergences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Below this log-probability a float64 softmax underflows to 0: such a column counts as p_j = 0.
LOG_ZERO = -745.0


@dataclass(frozen=True)
class Elements:
    """log p, log q [rows, columns] and the parameters [rows, 1] that an elementwise function may use.

    `sums` and `log_sum` [rows, 1] are the finished row sums, there when a gradient is asked for.
    """

    logp: Tensor
    logq: Tensor
    log_ratio: Tensor
    alpha: Tensor
    beta: Tensor
    sums: tuple[Tensor, ...] = ()
    log_sum: Tensor | None = None

    @cached_property
    def p(self) -> Tensor:
        return self.logp.exp()

    @cached_property
    def q(self) -> Tensor:
        return self.logq.exp()

    @property
    def u(self) -> Tensor:
        return self.log_ratio

    def swapped(self) -> Elements:
        """The same columns with the roles of student and teacher exchanged."""
        return Elements(self.logq, self.logp, -self.log_ratio, self.alpha, self.beta, self.sums, self.log_sum)

    def p_times(self, x: Tensor) -> Tensor:
        """p * x with 0 * inf = 0, and inf where p is positive but too small for the dtype."""
        return _times(self.p, self.logp, x)

    def q_times(self, x: Tensor) -> Tensor:
        return _times(self.q, self.logq, x)


def _times(weight: Tensor, log_weight: Tensor, x: Tensor) -> Tensor:
    product = torch.where(x.isinf(), x, weight * x)
    return torch.where(log_weight <= LOG_ZERO, torch.zeros_like(product), product)


Term = Callable[[Elements], Tensor | tuple[Tensor, ...]]
Combine = Callable[..., Tensor]


def expm1_over(c: Tensor, u: Tensor) -> Tensor:
    """expm1(c u) / c, which is u at c = 0."""
    return torch.where(c == 0, u, torch.expm1(c * u) / torch.where(c == 0, torch.ones_like(c), c))


def difference(e: Elements) -> Tensor:
    """p - q, relative to itself exact where the two are close."""
    return torch.where(e.u.abs() < 1, e.q * torch.expm1(e.u), e.p - e.q)


# --- forward KL: q (e^u u - e^u + 1) ---------------------------------------------------------------------
def kl_value(e: Elements) -> Tensor:
    near = e.q * (e.u * e.u.exp() - torch.expm1(e.u))
    return torch.where(e.u.abs() < 1, near, e.p_times(e.u) - e.p + e.q)


def kl_grad_logq(e: Elements) -> Tensor:
    return -difference(e)


def kl_grad_logp(e: Elements) -> Tensor:
    return e.p_times(e.u)


# --- Jeffreys: (p - q) u ---------------------------------------------------------------------------------
def jeffreys_value(e: Elements) -> Tensor:
    near = e.q * torch.expm1(e.u) * e.u
    return torch.where(e.u.abs() < 1, near, e.p_times(e.u) - e.q_times(e.u))


def jeffreys_grad_logq(e: Elements) -> Tensor:
    return -difference(e) - e.q_times(e.u)


# --- generalised Jensen-Shannon: m = beta p + (1 - beta) q, TRL's convention ------------------------------
def _log_mixture(e: Elements, weight_of_p: Tensor) -> Tensor:
    return torch.logaddexp(e.logp + weight_of_p.log(), e.logq + (1 - weight_of_p).log())


def _js_near(e: Elements, weight_of_p: Tensor) -> Tensor:
    b, m = weight_of_p, weight_of_p * e.p + (1 - weight_of_p) * e.q
    # log(q/m) = -log1p(beta expm1(u)) keeps the small differences that log q - log m would round away.
    return b * e.q * e.u.exp() * e.u - m * torch.log1p(b * torch.expm1(e.u))


def js_value(e: Elements) -> Tensor:
    b, log_m = e.beta, _log_mixture(e, e.beta)
    # From both rows' side: at beta = 1/2 exchanging the rows leaves every bit.
    near = 0.5 * (_js_near(e, b) + _js_near(e.swapped(), 1 - b))
    far = b * e.p_times(e.logp - log_m) + (1 - b) * e.q_times(e.logq - log_m)
    inside = torch.where(e.u.abs() < 1, near, far)
    return torch.where(b <= 0, kl_value(e), torch.where(b >= 1, kl_value(e.swapped()), inside))


def _log_q_over_mixture(e: Elements, weight_of_p: Tensor) -> Tensor:
    near = -torch.log1p(weight_of_p * torch.expm1(e.u))
    return torch.where(e.u.abs() < 1, near, e.logq - _log_mixture(e, weight_of_p))


def js_grad_logq(e: Elements) -> Tensor:
    inside = (1 - e.beta) * e.q_times(_log_q_over_mixture(e, e.beta))
    ends = torch.where(e.beta <= 0, kl_grad_logq(e), kl_grad_logp(e.swapped()))
    return torch.where((e.beta > 0) & (e.beta < 1), inside, ends)


def js_grad_logp(e: Elements) -> Tensor:
    inside = e.beta * e.p_times(_log_q_over_mixture(e.swapped(), 1 - e.beta))
    ends = torch.where(e.beta <= 0, kl_grad_logp(e), kl_grad_logq(e.swapped()))
    return torch.where((e.beta > 0) & (e.beta < 1), inside, ends)


# --- skew KL: KL(p || m), m = alpha p + (1 - alpha) q ----------------------------------------------------
def skew_value(e: Elements) -> Tensor:
    a, m = e.alpha, e.alpha * e.p + (1 - e.alpha) * e.q
    w = -torch.log1p((1 - a) * torch.expm1(-e.u))  # log(p/m)
    near = m * (w * w.exp() - torch.expm1(w))
    far = e.p_times(e.logp - _log_mixture(e, a)) - e.p + m
    return torch.where(e.u.abs() < 1, near, far)


def _share_of_mixture(e: Elements) -> Tensor:
    """(1 - alpha) q / m, which no underflow of q and m can spoil; 0 for a column without mass."""
    odds = (1 - e.alpha).log() - e.alpha.log()
    share = torch.sigmoid(torch.where(odds.isinf(), odds, odds - e.u))
    return torch.where((e.logp <= LOG_ZERO) & (e.logq <= LOG_ZERO), torch.zeros_like(share), share)


def skew_grad_logq(e: Elements) -> Tensor:
    return -(1 - e.alpha) * _share_of_mixture(e) * difference(e)


def skew_grad_logp(e: Elements) -> Tensor:
    log_p_over_m = _log_q_over_mixture(e.swapped(), 1 - e.alpha)
    return e.p_times(log_p_over_m) - (1 - e.alpha) * (1 - _share_of_mixture(e)) * difference(e)


# --- squared Hellinger: (sqrt p - sqrt q)^2 / 2 ----------------------------------------------------------
def hellinger_value(e: Elements) -> Tensor:
    near = 0.5 * e.q * torch.expm1(0.5 * e.u) ** 2
    return torch.where(e.u.abs() < 1, near, 0.5 * ((0.5 * e.logp).exp() - (0.5 * e.logq).exp()) ** 2)


def hellinger_grad_logq(e: Elements) -> Tensor:
    near = -0.5 * e.q * torch.expm1(0.5 * e.u)
    return torch.where(e.u.abs() < 1, near, 0.5 * (e.q - (0.5 * (e.logp + e.logq)).exp()))


# --- total variation: |p - q| / 2, gradient 0 where p = q -------------------------------------------------
def tvd_value(e: Elements) -> Tensor:
    near = 0.5 * e.q * torch.expm1(e.u).abs()
    return torch.where(e.u.abs() < 1, near, 0.5 * (e.p - e.q).abs())


def tvd_grad_logq(e: Elements) -> Tensor:
    return -0.5 * e.q * e.u.sign()


# --- chi squared: (p - q)^2 / q = p^2 / q - 2 p + q ------------------------------------------------------
def chi2_value(e: Elements) -> Tensor:
    near = e.q * torch.expm1(e.u) ** 2
    return torch.where(e.u.abs() < 1, near, _p_squared_over_q(e) - 2 * e.p + e.q)


def _p_squared_over_q(e: Elements) -> Tensor:
    return torch.where(e.logp <= LOG_ZERO, torch.zeros_like(e.p), (e.logp + e.u).exp())


def chi2_grad_logq(e: Elements) -> Tensor:
    near = -e.q * torch.expm1(2 * e.u)
    return torch.where(e.u.abs() < 1, near, e.q - _p_squared_over_q(e))


def chi2_grad_logp(e: Elements) -> Tensor:
    near = 2 * e.p * torch.expm1(e.u)
    return torch.where(e.u.abs() < 1, near, 2 * (_p_squared_over_q(e) - e.p))


# --- alpha divergence: (p^a q^(1-a) - a p - (1-a) q) / (a (a-1)) -----------------------------------------
def _alpha_half(e: Elements, a: Tensor) -> Tensor:
    """The divergence for a >= 1/2, where nothing cancels as a goes to 1."""
    near = e.q * (e.u.exp() * expm1_over(a - 1, e.u) - torch.expm1(e.u)) / a
    far = (_p_expm1_over(e, a - 1) - e.p + e.q) / a
    return torch.where(e.u.abs() < 1, near, far)


def _p_expm1_over(e: Elements, c: Tensor) -> Tensor:
    """p expm1(c u) / c without overflow where p is small, and without 0 * inf."""
    x = c * e.u
    small = e.p_times(expm1_over(c, e.u))
    # p e^(c u) where p or q is 0; a power of 0 is 1 when its exponent is 0.
    power = (_scaled_log(1 + c, e.logp) - _scaled_log(c, e.logq)).exp()
    large = (torch.where(e.u.isinf(), power, (e.logp + x).exp()) - e.p) / c
    return torch.where((c == 0) | (x < 1), small, large)


def _scaled_log(c: Tensor, log_weight: Tensor) -> Tensor:
    return torch.where(c == 0, torch.zeros_like(log_weight), c * log_weight)


def alpha_value(e: Elements) -> Tensor:
    return torch.where(e.alpha >= 0.5, _alpha_half(e, e.alpha), _alpha_half(e.swapped(), 1 - e.alpha))


def alpha_grad_logp(e: Elements) -> Tensor:
    return _p_expm1_over(e, e.alpha - 1)


def alpha_grad_logq(e: Elements) -> Tensor:
    return _p_expm1_over(e.swapped(), -e.alpha)


# --- Renyi: log(sum_j p^a q^(1-a)) / (a-1) ----------------------------------------------------------------
# Its gradient is a softmax r of a log p + (1-a) log q; q and p are taken off it, so that equal rows have a gradient of
# exactly 0: r - q = q (e^(a u - L) - 1), L the logarithm.
def renyi_log_sum(e: Elements) -> Tensor:
    return torch.where(e.logp <= LOG_ZERO, torch.full_like(e.logp, -torch.inf), e.logp + (e.alpha - 1) * e.u)


def _renyi_log(total: Tensor, log_sum: Tensor, alpha: Tensor) -> Tensor:
    """The logarithm, through log1p of the alpha divergence where the sum is near 1."""
    near = torch.log1p((alpha * (alpha - 1) * total).clamp_min(-0.5))
    return torch.where((log_sum.abs() < 0.5) & total.isfinite(), near, log_sum)


def renyi_combine(total: Tensor, log_sum: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return _renyi_log(total, log_sum, alpha) / (alpha - 1)


def _share_of_log_sum(e: Elements, log_term: Tensor) -> Tensor:
    assert e.log_sum is not None
    return (log_term - e.log_sum).exp()


def _renyi_excess(e: Elements, probability: Tensor, c: Tensor) -> Tensor:
    """r less the probability, which is r e^-(c u - L)."""
    assert e.log_sum is not None
    log = _renyi_log(e.sums[0], e.log_sum, e.alpha)
    x = c * e.u - log
    # An infinite sum leaves nothing of any term.
    far = torch.where(log == torch.inf, torch.zeros_like(probability), (renyi_log_sum(e) - log).exp()) - probability
    return torch.where(x.abs() < 1, probability * torch.expm1(x), far)


def renyi_grad_logq(e: Elements) -> Tensor:
    return -_renyi_excess(e, e.q, e.alpha)


def renyi_grad_logp(e: Elements) -> Tensor:
    return e.alpha / (e.alpha - 1) * _renyi_excess(e, e.p, e.alpha - 1)


# --- collision: log sum q^2 -------------------------------------------------------------------------------
def collision_value(e: Elements) -> Tensor:
    return e.q * e.q


def collision_combine(total: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return total.log()


def collision_grad_logq(e: Elements) -> Tensor:
    return 2 * e.q * e.q / e.sums[0]


# --- Cauchy-Schwarz: -log((sum pq)^2 / (sum p^2 sum q^2)) -------------------------------------------------
def cauchy_schwarz_sums(e: Elements) -> tuple[Tensor, ...]:
    d = difference(e)
    return e.q * e.q, e.p * e.p, e.q * d, d * d


def cauchy_schwarz_combine(
    qq: Tensor, pp: Tensor, qd: Tensor, dd: Tensor, log_pq: Tensor, alpha: Tensor, beta: Tensor
) -> Tensor:
    """With d = p - q: 1 - (sum pq)^2 / (sum p^2 sum q^2) = (sum q^2 sum d^2 - (sum qd)^2) / (sum p^2 sum q^2)."""
    missing = ((qq * dd - qd * qd) / (qq * pp)).clamp_min(0)
    far = qq.log() + pp.log() - 2 * log_pq
    return torch.where(missing < 0.5, -torch.log1p(-missing.clamp_max(0.5)), far)


def cauchy_schwarz_grad_logq(e: Elements) -> Tensor:
    """2 q (q / sum q^2 - p / sum pq); near: through d = p - q, where the two fractions agree."""
    qq, _, qd, _ = e.sums
    near = -2 * e.q * (difference(e) - e.q * (qd / qq)) / (qq + qd)
    far = 2 * e.q * e.q / qq - 2 * _share_of_log_sum(e, e.logp + e.logq)
    return torch.where(qd.abs() < 0.5 * qq, near, far)


def cauchy_schwarz_grad_logp(e: Elements) -> Tensor:
    _, pp, qd, dd = e.sums
    pd = qd + dd
    near = 2 * e.p * (difference(e) - e.p * (pd / pp)) / (pp - pd)
    far = 2 * e.p * e.p / pp - 2 * _share_of_log_sum(e, e.logp + e.logq)
    return torch.where(pd.abs() < 0.5 * pp, near, far)


# --- alpha-beta divergence (Cichocki) ---------------------------------------------------------------------
def _alpha_beta_powers(e: Elements) -> tuple[Tensor, Tensor, Tensor]:
    """p^a q^b, p^(a+b), q^(a+b); a column that is -inf in both rows contributes nothing."""
    a, b = e.alpha, e.beta
    nowhere = (e.logp <= LOG_ZERO) & (e.logq <= LOG_ZERO)
    zero = torch.zeros_like(e.logp)
    logp, logq = torch.where(nowhere, zero, e.logp), torch.where(nowhere, zero, e.logq)
    powers = ((a * logp + b * logq).exp(), ((a + b) * logp).exp(), ((a + b) * logq).exp())
    return tuple(torch.where(nowhere, zero, x) for x in powers)  # type: ignore[return-value]


def _slope(start: Tensor, end: Tensor, width: Tensor, u: Tensor) -> Tensor:
    """q^l (e^(y u) - e^(x u)) / (y - x), y = x + width, from q^l e^(x u) and q^l e^(y u)."""
    return torch.where((width * u).abs() < 1, start * torch.expm1(width * u), end - start) / width


def alpha_beta_value(e: Elements) -> Tensor:
    """q^l f[0, a, l], l = a+b: the second divided difference of f(c) = e^(c u), which has no pole.

    The textbook form is a difference of numbers a thousand times larger near a = 0, b = 0 or l = 0.
    """
    cross, p_power, q_power = _alpha_beta_powers(e)
    total = e.alpha + e.beta
    nodes, order = torch.stack([torch.zeros_like(total), e.alpha, total]).sort(dim=0)
    powers = torch.stack([q_power, cross, p_power]).gather(0, order.expand(3, *e.u.shape))
    span = nodes[2] - nodes[0]
    upper = _slope(powers[1], powers[2], nodes[2] - nodes[1], e.u)
    far = (upper - _slope(powers[0], powers[1], nodes[1] - nodes[0], e.u)) / span
    # e^(c u) / 2 u² at the mean of the nodes, with the next two terms: for span u near 0.
    centre = nodes.mean(dim=0) * e.u
    spread = ((nodes - nodes.mean(dim=0)) * e.u).square().sum(dim=0)
    cubes = ((nodes - nodes.mean(dim=0)) * e.u).pow(3).sum(dim=0)
    near = q_power * centre.exp() * e.u.square() * (0.5 + spread / 48 + cubes / 360 + spread.square() / 2880)
    return torch.where((span * e.u).abs() < _near_of(e.u.dtype), near, far)


def _near_of(dtype: torch.dtype) -> float:
    """Where the series' error and the rounding of a difference are about the same."""
    return 0.02 if dtype == torch.float64 else 0.25


def alpha_beta_grad_logq(e: Elements) -> Tensor:
    cross, _, q_power = _alpha_beta_powers(e)
    return -_slope(q_power, cross, e.alpha, e.u)


def alpha_beta_grad_logp(e: Elements) -> Tensor:
    cross, p_power, _ = _alpha_beta_powers(e)
    return _slope(cross, p_power, e.beta, e.u)


# --- triangular discrimination: (p - q)^2 / (p + q) ------------------------------------------------------
def _triangular_ratio(e: Elements) -> Tensor:
    # (p - q) / (p + q)
    return torch.tanh(0.5 * e.u)


def triangular_value(e: Elements) -> Tensor:
    r = _triangular_ratio(e)
    return (e.p + e.q) * r * r


def triangular_grad_logq(e: Elements) -> Tensor:
    r = _triangular_ratio(e)
    return -e.q * r * (2 + r)


# --- one-tensor and logarithmic statistics ---------------------------------------------------------------
def entropy_value(e: Elements) -> Tensor:
    return -e.q_times(e.logq)


def entropy_grad_logq(e: Elements) -> Tensor:
    return -e.q_times(e.logq) - e.q


def cross_entropy_value(e: Elements) -> Tensor:
    return -e.p_times(e.logq)


def cross_entropy_grad_logq(e: Elements) -> Tensor:
    """−p with q added, whose sum is 0 then: equal rows have a gradient of exactly 0."""
    return -difference(e)
