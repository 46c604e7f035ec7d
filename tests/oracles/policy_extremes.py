"""The policy losses from their definitions, in numbers that do not overflow, with the derivative of the branch taken.

mpmath's exponents have no limit, so that e^10000 is a number like any other, and a minimum has the derivatives of what
it returns. One sequence at a time; x = log π_ref − log π, and e^u is what multiplies a KL estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mpmath import mp, mpf

from kldiv_kernels.policy.options import CLIPPED, PolicyOptions

Real = Any
INF = float("inf")


class Number:
    """A value and its derivatives by the log-probabilities of the sequence's tokens."""

    def __init__(self, value: Real, slopes: Sequence[Real]) -> None:
        self.value, self.slopes = mpf(value), list(slopes)

    def __add__(self, other: Number | Real) -> Number:
        other = self.fixed(other) if not isinstance(other, Number) else other
        return Number(self.value + other.value, [a + b for a, b in zip(self.slopes, other.slopes, strict=True)])

    def __sub__(self, other: Number | Real) -> Number:
        return self + -1 * other

    def __mul__(self, other: Number | Real) -> Number:
        if not isinstance(other, Number):
            return Number(self.value * other, [other * a for a in self.slopes])
        pairs = zip(self.slopes, other.slopes, strict=True)
        return Number(self.value * other.value, [a * other.value + self.value * b for a, b in pairs])

    __rmul__ = __mul__

    def fixed(self, value: Real | None = None) -> Number:
        """The value, or another one, without derivatives."""
        return Number(self.value if value is None else value, [mpf(0)] * len(self.slopes))

    def exp(self) -> Number:
        value = mp.exp(self.value)
        return Number(value, [value * a for a in self.slopes])

    def clamp(self, low: Real, high: Real) -> Number:
        if low <= self.value <= high:
            return self
        return self.fixed(low if self.value < low else high)


def least(x: Number, y: Number) -> Number:
    return x if x.value <= y.value else y


def total(numbers: Sequence[Number]) -> Number:
    return sum(numbers[1:], numbers[0])


@dataclass
class Completion:
    """The valid tokens of one given. Without old_logprobs the policy is its own."""

    logprob: list[float]
    advantages: list[float]
    old_logprobs: list[float] | None = None
    reference_logprobs: list[float] | None = None
    sampling_logprobs: list[float] | None = None
    token_weights: list[float] | None = None


def per_token(given: Completion, options: PolicyOptions) -> list[tuple[Number, Real, Number]]:
    """Of each token, the policy term, its weight and kl_coef times the KL."""
    count = len(given.logprob)
    lp = [Number(x, [mpf(i == j) for j in range(count)]) for i, x in enumerate(given.logprob)]
    old = given.logprob if given.old_logprobs is None else given.old_logprobs
    d = [x - mpf(o) for x, o in zip(lp, old, strict=True)]
    w = d
    if options.importance_level != "token":
        w = [total(d) * (mpf(1) / count if options.importance_level == "sequence" else 1)] * count
    low, high = _pair(options.log_ratio_clamp)
    w = [x.clamp(low, high) for x in w]
    off_policy = _off_policy(old, given.sampling_logprobs, options)
    terms = _terms(lp, d, w, old, given.advantages, options, off_policy)
    out = []
    for i, term in enumerate(terms):
        weight = mpf(1) if off_policy is None or options.loss_type == "vespo" else off_policy[i]
        weight *= 1 if given.token_weights is None else given.token_weights[i]
        kl = lp[i].fixed(0)
        if given.reference_logprobs is not None:
            kl = options.kl_coef * _kl(lp[i], mpf(given.reference_logprobs[i]), w[i], options)
        out.append((term, weight, kl))
    return out


def _pair(clamp: Any) -> tuple[float, float]:
    return clamp if isinstance(clamp, tuple) else (-clamp, clamp)


def _off_policy(old: list[float], sampling: list[float] | None, options: PolicyOptions) -> list[Real] | None:
    if sampling is None or options.off_policy == "none":
        return None
    logs = [mpf(o) - mpf(s) for o, s in zip(old, sampling, strict=True)]
    if options.off_policy.startswith("sequence"):
        logs = [mp.fsum(logs)] * len(logs)
    low, high = options.off_policy_min, options.off_policy_max
    weights = [mp.exp(x) for x in logs]
    if options.off_policy.endswith("truncate"):
        return [min(max(x, low), high) for x in weights]
    return [x if low <= x <= high else mpf(0) for x in weights]


def _terms(
    lp: list[Number], d: list[Number], w: list[Number], old: list[float], advantages: list[float],
    options: PolicyOptions, off_policy: list[Real] | None,
) -> list[Number]:  # fmt: skip
    kind = options.loss_type
    low, high = (options.clip_low, options.clip_high)
    if not options.clip_absolute:
        low, high = 1 - low, 1 + high
    if kind == "gmpo":
        clipped = []
        for x, a in zip(d, advantages, strict=True):
            inside = x.clamp(-options.clip_low, options.clip_high)
            smaller, larger = (x, inside) if x.value <= inside.value else (inside, x)
            clipped.append((smaller if a > 0 else larger).clamp(*_pair(options.log_ratio_clamp)))
        mean = total(clipped) * (mpf(1) / len(d))
        return [-a * mean.exp() for a in advantages]
    if kind == "vespo":
        edge = mp.log(mpf("1e-8"))
        log_w = mp.fsum(x.clamp(-20, 20).value for x in d)
        if off_policy is not None:
            log_w += mp.fsum(min(max(mp.log(x), edge), 20) if x else edge for x in off_policy)
        log_w = min(max(log_w, edge), mpf(20))
    out = []
    for x, ratio_log, before, a in zip(lp, w, old, advantages, strict=True):
        r = ratio_log.exp()
        if kind in CLIPPED:
            unclipped = least(r, r.fixed(options.delta)) if options.delta < INF else r
            loss = -1 * least(a * unclipped, a * r.clamp(low, high))
            if a < 0 and options.dual_clip < INF:
                loss = least(loss, r.fixed(-options.dual_clip * a))
        elif kind == "sapo":
            tau = options.sapo_temperatures[a <= 0]
            # sigmoid(1000) is 1 in any precision here.
            at = r if tau * r.value < 1000 else r.fixed(1000 / mpf(tau))
            s = 1 / (1 + mp.exp(-tau * (at.value - 1)))
            loss = Number(-4 / mpf(tau) * s * a, [-4 * a * s * (1 - s) * slope for slope in at.slopes])
        elif kind == "vespo":
            k, rate = options.vespo_positive if a >= 0 else options.vespo_negative
            loss = -mp.exp(rate + k * log_w - rate * mp.exp(log_w)) * a * x
        elif kind == "cispo":
            loss = -1 * r.clamp(low, high).fixed() * a * x
        elif kind == "topr":
            loss = -(1 if a >= 0 else min(r.value, mpf(1))) * a * x
        elif kind == "reinforce":
            loss = -a * x
        else:
            moved = _moved(kind, mp.exp(x.value), mp.exp(before))
            now, then = mp.exp(x.value), mp.exp(before)
            away = moved > options.clip_high and now > then if a > 0 else moved > options.clip_low and now < then
            loss = (0 if away else -min(r.value, options.delta)) * a * x
        out.append(loss)
    return out


def _moved(kind: str, now: Real, before: Real) -> Real:
    if kind == "dppo_tv":
        return abs(now - before)
    return before * mp.log(before / now) + (1 - before) * mp.log((1 - before) / (1 - now))


def _kl(lp: Number, reference: Real, w: Number, options: PolicyOptions) -> Number:
    x = (-1 * lp + reference).clamp(-options.kl_log_ratio_clamp, options.kl_log_ratio_clamp)
    u = lp.fixed(0)
    if options.kl_bias_correction:
        u = w
    if options.kl_estimator == "k3_plus":
        u = lp - lp.value
    plain = {
        "k1": lambda: -1 * x,
        "k2": lambda: mpf(0.5) * x * x,
        "abs": lambda: x if x.value > 0 else -1 * x,
    }.get(options.kl_estimator, lambda: x.exp() - 1 - x)()  # fmt: skip
    if abs(plain.value) > options.kl_clamp:
        return (options.kl_clamp if plain.value > 0 else -options.kl_clamp) * u.exp()
    if options.kl_estimator in ("k3", "k3_plus"):
        # (e^x − 1 − x)·e^u, in which e^x·e^u is one number: of x and u log π may fall out.
        return (x + u).exp() - (x + 1) * u.exp()
    return plain * u.exp()
