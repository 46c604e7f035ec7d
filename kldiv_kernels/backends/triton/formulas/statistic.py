"""What the kernels have of a statistic: `@triton.jit` functions, and what they take of a row.

Per row p = softmax(t) is the teacher, q = softmax(s) the student; per column lp = log p, lq = log q, u = lp − lq. A
column without mass has lp (or lq) near −1e30 and p (or q) = 0. The functions of a statistic are called by its name:

    *_value, *_grad_logq, *_grad_logp   of (p, q, lp, lq, u, alpha, beta), elementwise: the term of D, ∂D/∂log q and
                        ∂D/∂log p. These three are all that a divergence needs; the sums of all three are taken.

One that is exact where D is small, or takes fewer sums, has instead of *_value

    *_terms             the terms whose sums over the row are wanted, each non-negative; none for a statistic whose sum
                        the first sweep takes
    *_log_weight        a term of whose exponential the row's log-sum-exp is wanted as well
    *_finish            of the sums: (value, Σ grad_logq, Σ grad_logp, constants...). q_is_zero says that q has no mass
                        somewhere where p has some. The gradients' functions get the constants behind beta.

alpha and beta are scalars: a branch on them costs nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton.language as tl

from kldiv_kernels.backends.triton.device import state

INFINITY = tl.constexpr(float("inf"))
# What a statistic takes of the first sweep: the teacher's row, and whether q (p) is 0 somewhere where p (q) has mass.
TWO = state.TEACHER.value
Q_ZERO = TWO | state.Q_IS_ZERO.value
P_ZERO = TWO | state.P_IS_ZERO.value
# The statistics that the first sweep finishes, as in csrc/first_sweep.h: where the value stands among those that it
# finds (device/row.py), and the bit that asks for it.
FIRST_SWEEP = {
    "entropy": (0, state.ENTROPY.value),
    "reference_entropy": (1, state.REFERENCE_ENTROPY.value),
    "forward_kl": (2, state.FORWARD_KL.value),
    "reverse_kl": (3, state.REVERSE_KL.value),
    "hellinger": (4, state.HELLINGER.value),
}


@dataclass(frozen=True, eq=False)
class TritonStatistic:
    """`first`: where the value stands among those of the first sweep (then there are no terms), with `takes` the bits
    of the first sweep that it needs. `three` are value, grad_logq and grad_logp of a divergence that has no more than
    them; `of_user`: those are functions of (log p, log q), and of alpha and beta where they name them."""

    finish: Any = None
    grad_logq: Any = None
    grad_logp: Any = None
    first: int | None = None
    takes: int = 0
    terms: Any = None
    sums: int = 0
    log_weight: Any = None
    constants: int = 0
    three: tuple[Any, Any, Any] | None = None
    of_user: bool = False


def _parameters(function: Any) -> list[str]:
    return list(inspect.signature(function.fn).parameters)


def rows(functions: Mapping[str, Any], **taken: int) -> dict[str, TritonStatistic]:
    """The statistics of these names, with what each takes of the first sweep; `functions` has theirs by name."""
    return {name: _row(functions, name, takes) for name, takes in taken.items()}


def _row(functions: Mapping[str, Any], name: str, takes: int) -> TritonStatistic:
    finish, terms, log_weight, value, grad_logq, grad_logp = (
        functions.get(f"{name}_{role}") for role in ("finish", "terms", "log_weight", "value", "grad_logq", "grad_logp")
    )
    if finish is None:
        return TritonStatistic(takes=takes, sums=3, three=(value, grad_logq, grad_logp))
    first, bit = FIRST_SWEEP.get(name, (None, 0))
    sums = 0 if first is not None else _parameters(finish).index("q_is_zero") - (log_weight is not None)
    gradient = _parameters(grad_logq if grad_logq is not None else grad_logp)
    constants = len(gradient) - gradient.index("beta") - 1
    return TritonStatistic(finish, grad_logq, grad_logp, first, takes | bit, terms, sums, log_weight, constants)


def of_user(functions: tuple[Any, Any, Any]) -> TritonStatistic:
    """A statistic of three jit functions of (log p, log q), which may also name alpha and beta."""
    return TritonStatistic(takes=TWO, sums=3, three=functions, of_user=True)


def user_arguments(function: Any) -> list[str]:
    """Which of alpha and beta a user's function names."""
    return [name for name in ("alpha", "beta") if name in _parameters(function)]
