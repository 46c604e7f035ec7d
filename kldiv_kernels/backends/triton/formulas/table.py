"""Which `@triton.jit` functions compute a statistic: the built-in ones by name, and what a user registers."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from kldiv_kernels.backends.triton.device import state
from kldiv_kernels.backends.triton.formulas import divergences as d
from kldiv_kernels.backends.triton.formulas import power_divergences as w


@dataclass(frozen=True, eq=False)
class TritonStatistic:
    """See `divergences.py` for the functions. `first` is where the value stands among those of the first sweep (then
    there are no terms), with `takes` the bits of the first sweep that it needs."""

    finish: Any = None
    grad_logq: Any = None
    grad_logp: Any = None
    first: int | None = None
    takes: int = 0
    terms: Any = None
    sums: int = 0
    log_weight: Any = None
    constants: int = 0
    # A user's value, grad_logq, grad_logp of (log p, log q), instead of all of the above.
    user: tuple[Any, Any, Any] | None = None


_TWO = state.TEACHER.value
_Q_ZERO = _TWO | state.Q_IS_ZERO.value
_P_ZERO = _TWO | state.P_IS_ZERO.value

# Statistics that are no divergences have no functions: the kernels know log-probabilities, tails, logsumexp and maxima.
TABLE: dict[str, TritonStatistic] = {
    "logprob": TritonStatistic(),
    "reference_logprob": TritonStatistic(takes=_TWO),
    "tail_logprob": TritonStatistic(takes=state.TAIL.value),
    "logsumexp": TritonStatistic(),
    "max_logprob": TritonStatistic(takes=state.ARGMAX.value),
    "argmax": TritonStatistic(takes=state.ARGMAX.value),
    "entropy": TritonStatistic(d.entropy_finish, d.entropy_grad_logq, first=0, takes=state.ENTROPY.value),
    "reference_entropy": TritonStatistic(
        d.reference_entropy_finish, None, d.reference_entropy_grad_logp,
        first=1, takes=_TWO | state.REFERENCE_ENTROPY.value,
    ),
    "forward_kl": TritonStatistic(
        d.forward_kl_finish, d.forward_kl_grad_logq, d.forward_kl_grad_logp,
        first=2, takes=_Q_ZERO | state.FORWARD_KL.value,
    ),
    "reverse_kl": TritonStatistic(
        d.reverse_kl_finish, d.reverse_kl_grad_logq, d.reverse_kl_grad_logp,
        first=3, takes=_P_ZERO | state.REVERSE_KL.value,
    ),
    "hellinger": TritonStatistic(
        d.hellinger_finish, d.hellinger_grad_logq, d.hellinger_grad_logp, first=4, takes=_TWO | state.HELLINGER.value
    ),
}  # fmt: skip

for _name, _module, _sums, _takes in (
    ("cross_entropy", d, 1, _Q_ZERO),
    ("jeffreys", d, 2, _Q_ZERO | _P_ZERO),
    ("js", d, 2, _Q_ZERO | _P_ZERO),
    ("skew_kl", d, 2, _Q_ZERO),
    ("skew_reverse_kl", d, 2, _P_ZERO),
    ("tvd", d, 2, _TWO),
    ("forward_chi2", d, 1, _Q_ZERO),
    ("reverse_chi2", d, 1, _P_ZERO),
    ("triangular", d, 2, _TWO),
    ("alpha", w, 1, _Q_ZERO | _P_ZERO),
    ("renyi", w, 1, _Q_ZERO),
    ("alpha_beta", w, 2, _P_ZERO),
    ("collision", w, 1, 0),
    ("cauchy_schwarz", w, 4, _TWO),
):
    TABLE[_name] = TritonStatistic(
        getattr(_module, f"{_name}_finish"),
        getattr(_module, f"{_name}_grad_logq"),
        getattr(_module, f"{_name}_grad_logp", None),
        terms=getattr(_module, f"{_name}_terms"),
        takes=_takes,
        sums=_sums,
        log_weight=getattr(_module, f"{_name}_log_weight", None),
        constants={"renyi": 1, "collision": 1, "cauchy_schwarz": 5}.get(_name, 0),
    )


def of_user(functions: tuple[Any, Any, Any]) -> TritonStatistic:
    """A statistic of three jit functions of (log p, log q), which may also name alpha and beta."""
    # The sums of the value, of grad_logq and of grad_logp.
    return TritonStatistic(takes=_TWO, sums=3, user=functions)


def user_arguments(function: Any) -> list[str]:
    """Which of alpha and beta a user's function names."""
    names = inspect.signature(function.fn).parameters
    return [name for name in ("alpha", "beta") if name in names]
