"""A row of the registry: a statistic, its formula, its functions, and what its parameters may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kldiv_kernels.divergences.elements import Combine, Elements, Term

Kind = Literal["sum", "label", "tail", "logsumexp", "argmax", "max_logprob"]


@dataclass(frozen=True)
class Bound:
    """What a parameter may be, checked before anything is computed. `allows` serves floats and tensors."""

    text: str
    allows: Callable[[Any], Any]


@dataclass(frozen=True)
class Statistic:
    """One row of the registry. `value`, `grad_logq`, `grad_logp` are elementwise; see `elements.py`.

    `log_sum` is a term whose log-sum-exp the row wants as well. Its gradients are then shares that sum to 1, of which
    probabilities are taken: they sum to 0 over a row. What is not `tempered` takes logits as they are.
    """

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
    tempered: bool = True
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


def between(low: float, high: float) -> Bound:
    return Bound(f"between {low:g} and {high:g}", lambda x: (x >= low) & (x <= high))


FINITE = Bound("finite", lambda x: x * 0 == 0)
ANY = Bound("a number", lambda x: x == x)
UNIT = between(0.0, 1.0)
NOT_ZERO = Bound("finite and not 0 (a pole)", lambda x: (x * 0 == 0) & (x != 0))
NOT_ONE = Bound(
    "above 0, finite and not 1 (a pole; forward_kl is its limit)", lambda x: (x > 0) & (x * 0 == 0) & (x != 1)
)


def swap(term: Term) -> Term:
    return lambda e: term(e.swapped())


def two_sided(
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


def swapped(name: str, formula: str, of: Statistic) -> Statistic:
    assert of.value is not None
    assert of.grad_logq is not None
    assert of.grad_logp is not None
    return two_sided(name, formula, swap(of.value), swap(of.grad_logp), swap(of.grad_logq), alpha=of.alpha)


def zero(e: Elements) -> Tensor:
    return torch.zeros_like(e.logq)
