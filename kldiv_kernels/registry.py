"""The one table of statistics. It drives dispatch, documentation, tests and benchmarks.

A statistic of a row is combine(sum_j value(log p_j, log q_j)), q the student and p the teacher. A few are not
sums over divergence terms and are computed from the row directly; their `kind` says so.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kldiv_kernels import divergences as d
from kldiv_kernels.divergences import Combine, Elements, Term

Kind = Literal["sum", "label", "tail", "logsumexp", "argmax", "max_logprob"]


@dataclass(frozen=True)
class Bound:
    """What a parameter may be, checked before anything is computed. `allows` serves floats and tensors."""

    text: str
    allows: Callable[[Any], Any]


@dataclass(frozen=True)
class Statistic:
    """One row of the registry. `value`, `grad_logq`, `grad_logp` are elementwise; see `divergences.py`."""

    name: str
    formula: str
    student: bool
    reference: bool
    kind: Kind = "sum"
    value: Term | None = None
    grad_logq: Term | None = None
    grad_logp: Term | None = None
    combine: Combine | None = None
    log_sum: Callable[[Elements], Tensor] | None = None
    alpha: Bound | None = None
    beta: Bound | None = None
    builtin: bool = True
    triton: tuple[Any, Any, Any] | None = None

    @property
    def differentiable(self) -> bool:
        return self.kind not in ("argmax", "max_logprob")

    @property
    def per_label(self) -> bool:
        """Has a value for each label of a token, not one for the token."""
        return self.kind == "label"

    @property
    def needs_labels(self) -> bool:
        return self.kind in ("label", "tail")

    @property
    def is_divergence(self) -> bool:
        """Compares two rows and has a gradient: usable as `kind` of a loss."""
        return self.student and self.reference and self.differentiable


def _between(low: float, high: float) -> Bound:
    return Bound(f"between {low:g} and {high:g}", lambda x: (x >= low) & (x <= high))


_FINITE = Bound("finite", lambda x: x * 0 == 0)
_ANY = Bound("a number", lambda x: x == x)
_UNIT = _between(0.0, 1.0)
_NOT_ZERO = Bound("finite and not 0 (a pole)", lambda x: (x * 0 == 0) & (x != 0))
_RENYI = Bound(
    "above 0, finite and not 1 (a pole; forward_kl is its limit)", lambda x: (x > 0) & (x * 0 == 0) & (x != 1)
)


def _swap(term: Term) -> Term:
    return lambda e: term(e.swapped())


def _sum(
    name: str,
    formula: str,
    value: Term,
    grad_logq: Term,
    grad_logp: Term,
    *,
    alpha: Bound | None = None,
    beta: Bound | None = None,
    combine: Combine | None = None,
    log_sum: Callable[[Elements], Tensor] | None = None,
) -> Statistic:
    return Statistic(
        name,
        formula,
        student=True,
        reference=True,
        value=value,
        grad_logq=grad_logq,
        grad_logp=grad_logp,
        alpha=alpha,
        beta=beta,
        combine=combine,
        log_sum=log_sum,
    )


def _swapped(name: str, formula: str, of: Statistic) -> Statistic:
    assert of.value is not None
    assert of.grad_logq is not None
    assert of.grad_logp is not None
    return _sum(name, formula, _swap(of.value), _swap(of.grad_logp), _swap(of.grad_logq), alpha=of.alpha)


def _zero(e: Elements) -> Tensor:
    return torch.zeros_like(e.logq)


_FORWARD_KL = _sum("forward_kl", "KL(p||q) = Σ p (log p − log q)", d.kl_value, d.kl_grad_logq, d.kl_grad_logp)
_SKEW_KL = _sum("skew_kl", "KL(p || αp + (1−α)q)", d.skew_value, d.skew_grad_logq, d.skew_grad_logp, alpha=_UNIT)
_FORWARD_CHI2 = _sum("forward_chi2", "Σ (p−q)²/q", d.chi2_value, d.chi2_grad_logq, d.chi2_grad_logp)

STATISTICS: dict[str, Statistic] = {}


def _add(statistic: Statistic) -> None:
    STATISTICS[statistic.name] = statistic


for _statistic in (
    Statistic("logprob", "log q_y", True, False, "label"),
    Statistic("reference_logprob", "log p_y", False, True, "label"),
    Statistic("tail_logprob", "log Σ q over the columns that are no label", True, False, "tail"),
    Statistic("logsumexp", "logsumexp(s/τ)", True, False, "logsumexp"),
    Statistic(
        "entropy",
        "H(q) = −Σ q log q",
        True,
        False,
        value=d.entropy_value,
        grad_logq=d.entropy_grad_logq,
        grad_logp=_zero,
    ),
    Statistic(
        "reference_entropy",
        "H(p) = −Σ p log p",
        False,
        True,
        value=_swap(d.entropy_value),
        grad_logq=_zero,
        grad_logp=_swap(d.entropy_grad_logq),
    ),
    _sum("cross_entropy", "−Σ p log q", d.cross_entropy_value, d.cross_entropy_grad_logq, d.cross_entropy_value),
    _FORWARD_KL,
    _swapped("reverse_kl", "KL(q||p) = Σ q (log q − log p)", _FORWARD_KL),
    _sum("jeffreys", "KL(p||q) + KL(q||p)", d.jeffreys_value, d.jeffreys_grad_logq, _swap(d.jeffreys_grad_logq)),
    _sum(
        "js",
        "β·KL(p||m) + (1−β)·KL(q||m), m = βp + (1−β)q; β=0: KL(p||q), β=1: KL(q||p)",
        d.js_value,
        d.js_grad_logq,
        d.js_grad_logp,
        beta=_UNIT,
    ),
    _SKEW_KL,
    _swapped("skew_reverse_kl", "KL(q || (1−α)p + αq)", _SKEW_KL),
    _sum(
        "hellinger",
        "1 − Σ√(pq)  (squared Hellinger distance)",
        d.hellinger_value,
        d.hellinger_grad_logq,
        _swap(d.hellinger_grad_logq),
    ),
    _sum("tvd", "½ Σ|p−q|", d.tvd_value, d.tvd_grad_logq, _swap(d.tvd_grad_logq)),
    _FORWARD_CHI2,
    _swapped("reverse_chi2", "Σ (p−q)²/p", _FORWARD_CHI2),
    _sum(
        "renyi",
        "log(Σ p^α q^(1−α)) / (α−1)",
        d.alpha_value,
        d.renyi_grad_logq,
        d.renyi_grad_logp,
        alpha=_RENYI,
        combine=d.renyi_combine,
        log_sum=d.renyi_log_sum,
    ),
    _sum(
        "alpha",
        "(Σ p^α q^(1−α) − 1) / (α(α−1)); α→1: KL(p||q), α→0: KL(q||p)",
        d.alpha_value,
        d.alpha_grad_logq,
        d.alpha_grad_logp,
        alpha=_FINITE,
    ),
    _sum(
        "alpha_beta",
        "−1/(αβ) Σ (p^α q^β − α/(α+β) p^(α+β) − β/(α+β) q^(α+β))",
        d.alpha_beta_value,
        d.alpha_beta_grad_logq,
        d.alpha_beta_grad_logp,
        alpha=_NOT_ZERO,
        beta=_NOT_ZERO,
    ),
    _sum(
        "triangular",
        "Σ (p−q)²/(p+q)",
        d.triangular_value,
        d.triangular_grad_logq,
        _swap(d.triangular_grad_logq),
    ),
    Statistic(
        "collision",
        "log Σ q²",
        True,
        False,
        value=d.collision_value,
        grad_logq=d.collision_grad_logq,
        grad_logp=_zero,
        combine=d.collision_combine,
    ),
    _sum(
        "cauchy_schwarz",
        "−log((Σ pq)² / (Σ p² Σ q²))",
        d.cauchy_schwarz_sums,
        d.cauchy_schwarz_grad_logq,
        d.cauchy_schwarz_grad_logp,
        combine=d.cauchy_schwarz_combine,
        log_sum=lambda e: e.logp + e.logq,
    ),
    Statistic("max_logprob", "max_j log q_j (no gradient)", True, False, "max_logprob"),
    Statistic("argmax", "argmax_j q_j, the first of ties, int64 (no gradient)", True, False, "argmax"),
):
    _add(_statistic)


def get(name: str, where: str = "stats", among: Iterable[str] | None = None) -> Statistic:
    """The statistic of that name, or a ValueError that suggests the nearest names."""
    names = list(STATISTICS if among is None else among)
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.4)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"{where}: unknown statistic {name!r}{hint} (known: {', '.join(names)})")
    return STATISTICS[name]


def divergence_names() -> list[str]:
    """Names usable as `kind` of a loss."""
    return [s.name for s in STATISTICS.values() if s.is_divergence]


def _names(parameter: str, *functions: Callable[..., Tensor]) -> bool:
    return any(parameter in inspect.signature(function).parameters for function in functions)


def _elementwise(function: Callable[..., Tensor], argument: str) -> Term:
    if not callable(function):
        raise TypeError(f"register_statistic: {argument} is {type(function).__name__}; expected a function")
    names = set(inspect.signature(function).parameters)
    wanted = [name for name in ("alpha", "beta") if name in names]

    def term(e: Elements) -> Tensor:
        return function(e.logp, e.logq, **{name: getattr(e, name) for name in wanted})

    return term


def _jit_functions(functions: Any) -> tuple[Any, Any, Any] | None:
    if functions is None:
        return None
    if not isinstance(functions, (tuple, list)) or len(functions) != 3:
        raise TypeError(
            f"register_statistic: triton is {functions!r}; expected three @triton.jit functions (value, grad_logq, "
            "grad_logp)"
        )
    for function in functions:
        plain = getattr(function, "fn", None)
        if not callable(plain):
            raise TypeError(f"register_statistic: triton holds {function!r}; expected a @triton.jit function")
        names = list(inspect.signature(plain).parameters)
        if len(names) < 2 or set(names[2:]) - {"alpha", "beta"}:
            raise TypeError(
                f"register_statistic: the triton function {plain.__name__} takes ({', '.join(names)}); expected "
                "(logp, logq), and alpha or beta where it needs them"
            )
    return functions[0], functions[1], functions[2]


def kinds_with(parameter: str) -> list[str]:
    """The divergences that have this parameter, "alpha" or "beta"."""
    return [s.name for s in STATISTICS.values() if s.is_divergence and getattr(s, parameter) is not None]


def register_statistic(
    name: str,
    *,
    value: Callable[..., Tensor],
    grad_logq: Callable[..., Tensor],
    grad_logp: Callable[..., Tensor],
    triton: tuple[Any, Any, Any] | None = None,
    formula: str = "",
) -> None:
    r"""Add a statistic D = Σ_j d(log p_j, log q_j) under `name`, for every function of the package.

    Each function takes (logp, logq), both [rows, columns], p the teacher and q the student, and returns a
    tensor of that shape: d, ∂d/∂log q and ∂d/∂log p, elementwise. A function that names parameters `alpha` or
    `beta` receives them as [rows, 1] tensors. A new statistic runs on the reference backend, and with `triton` on
    every device that Triton serves, fused: (value, grad_logq, grad_logp) once more, as `@triton.jit` functions of
    (logp, logq) and, where they name them, of the scalars alpha and beta. A column without mass has a logarithm near
    -1e30 there instead of -inf.

    Raises: ValueError when `name` is taken or no Python identifier, TypeError when a function is not callable, or
    `triton` not three `@triton.jit` functions of those arguments.

    >>> import torch, kldiv_kernels as kk
    >>> kk.register_statistic(
    ...     "squared_distance",
    ...     value=lambda logp, logq: (logp.exp() - logq.exp()) ** 2,
    ...     grad_logq=lambda logp, logq: 2 * (logq.exp() - logp.exp()) * logq.exp(),
    ...     grad_logp=lambda logp, logq: 2 * (logp.exp() - logq.exp()) * logp.exp(),
    ...     formula="Σ (p−q)²",
    ... )
    >>> logits = torch.zeros(2, 4, requires_grad=True)
    >>> kk.divergence_loss(logits, torch.eye(2, 4), "squared_distance").backward()
    >>> logits.grad.shape
    torch.Size([2, 4])
    >>> kk.unregister_statistic("squared_distance")
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"register_statistic: name is {name!r}; expected a Python identifier")
    if name in STATISTICS:
        raise ValueError(f"register_statistic: name {name!r} is taken; unregister_statistic frees a registered one")
    _add(
        Statistic(
            name,
            formula or "user-defined",
            True,
            True,
            value=_elementwise(value, "value"),
            grad_logq=_elementwise(grad_logq, "grad_logq"),
            grad_logp=_elementwise(grad_logp, "grad_logp"),
            alpha=_ANY if _names("alpha", value, grad_logq, grad_logp) else None,
            beta=_ANY if _names("beta", value, grad_logq, grad_logp) else None,
            builtin=False,
            triton=_jit_functions(triton),
        )
    )


def unregister_statistic(name: str) -> None:
    """Remove a statistic that `register_statistic` added. Raises ValueError for any other name."""
    if name not in STATISTICS or STATISTICS[name].builtin:
        raise ValueError(f"unregister_statistic: {name!r} is not a statistic added by register_statistic")
    del STATISTICS[name]
