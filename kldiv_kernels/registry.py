"""The one table of statistics. It drives dispatch, documentation, tests and benchmarks.

A statistic of a row is combine(sum_j value(log p_j, log q_j)), q the student and p the teacher. A few are not
sums over divergence terms and are computed from the row directly; their `kind` says so.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from kldiv_kernels.divergences import ANY, DIVERGENCES, Elements, Statistic, Term

STATISTICS: dict[str, Statistic] = {
    statistic.name: statistic
    for statistic in (
        Statistic("logprob", "log q_y", True, False, "label"),
        Statistic("reference_logprob", "log p_y", False, True, "label"),
        Statistic("untempered_logprob", "log softmax(s)_y, whatever τ is", True, False, "label", tempered=False),
        Statistic("tail_logprob", "log Σ q over the columns that are no label", True, False, "tail"),
        Statistic("logsumexp", "logsumexp(s/τ)", True, False, "logsumexp"),
        *DIVERGENCES,
        Statistic("max_logprob", "max_j log q_j (no gradient)", True, False, "max_logprob"),
        Statistic("argmax", "argmax_j q_j, the first of ties, int64 (no gradient)", True, False, "argmax"),
    )
}


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
    STATISTICS[name] = Statistic(
        name,
        formula or "user-defined",
        True,
        True,
        value=_elementwise(value, "value"),
        grad_logq=_elementwise(grad_logq, "grad_logq"),
        grad_logp=_elementwise(grad_logp, "grad_logp"),
        alpha=ANY if _names("alpha", value, grad_logq, grad_logp) else None,
        beta=ANY if _names("beta", value, grad_logq, grad_logp) else None,
        builtin=False,
        triton=_jit_functions(triton),
    )


def unregister_statistic(name: str) -> None:
    """Remove a statistic that `register_statistic` added. Raises ValueError for any other name."""
    if name not in STATISTICS or STATISTICS[name].builtin:
        raise ValueError(f"unregister_statistic: {name!r} is not a statistic added by register_statistic")
    del STATISTICS[name]
