"""The compiled part: loads the shared library and calls its operators. The backend on CPU tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from kldiv_kernels._ops import ops as operators
from kldiv_kernels.backends.interface import Call
from kldiv_kernels.tracing import constant

LIBRARY = Path(__file__).resolve().parent.parent / "libkldiv_kernels.so"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Floats a row in the saved state: exponent reference, scaled sum and offset of both softmaxes, the difference of
# their logarithms in two parts, then for each statistic its two gradient sums and five constants (csrc/cpu/rows.h).
_STATE_OF_ROW, _STATE_OF_STATISTIC = 8, 7


@functools.cache
def _load() -> str | None:
    if hasattr(operators, "served"):  # a Hub kernel's library is loaded where its namespace is
        return None
    if not LIBRARY.exists():
        return (
            "the compiled part was not built (KLDIV_BUILD=0, a source tree without a build, or a Hub kernel of Triton "
            "alone); run: pip install --no-build-isolation ."
        )
    try:
        torch.ops.load_library(str(LIBRARY))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"{LIBRARY.name} does not load: {error}"
    return None


def ask(operator: Callable[[], Any]) -> Any:
    """The answer of an operator without tensors, out of sight of what traces the call in which it is asked."""
    with _disable_current_modes():
        return operator()


@functools.cache
def _served() -> frozenset[str]:
    return frozenset() if _load() is not None else frozenset(ask(operators.served))


@functools.cache
def _finished_first() -> frozenset[str]:
    """The statistics that are known once the softmaxes are (csrc/first_sweep.h)."""
    return frozenset(ask(operators.finished_first))


def _refusal() -> str | None:
    return _load()


def _names() -> frozenset[str]:
    return _served()


# Load the shared library once; the reason why that is not possible, or None. torch.compile takes the answer as it
# is instead of tracing the file system (it would see through a decorated cache, hence the functions in between).
load = constant(_refusal)
# The statistics that the C++ code has.
served = constant(_names)


def selects(logits: Tensor) -> bool:
    """Whether the operator `largest` serves these."""
    return logits.device.type == "cpu" and logits.dtype in DTYPES and load() is None


@dataclass(frozen=True)
class Planned:
    """What the compiled planner says of a call (csrc/plan.h)."""

    kernel: str
    reason: str
    sweeps: int
    threads: int
    bytes: int
    cluster: int = 0
    stages: int = 0
    shared_bytes: int = 0


def plan_cpu(
    *, rows: int, columns: int, stats: list[str], student_bytes: int, teacher_bytes: int, gradient: bool,
    one_read: bool, threads: int,
) -> Planned:  # fmt: skip
    """One of the cpu backend. teacher_bytes: of an element, 0 without a teacher."""
    (sweeps, used, moved), (kernel, reason) = _planned(
        "plan_cpu", rows, columns, stats, student_bytes, teacher_bytes, gradient, one_read, threads
    )
    return Planned(kernel, reason, sweeps, used, moved)


def plan_cuda(
    *, capability: int, rows: int, columns: int, stats: list[str], student_bytes: int, teacher_bytes: int,
    student_gradient: bool, known_coefficients: bool, labels_per_row: int, topk_outcomes: int, float16: bool,
) -> Planned:  # fmt: skip
    """One of the cuda backend on a GPU of this capability, 90 for sm_90. ValueError where there is none."""
    (sweeps, cluster, stages, threads, shared_bytes, moved), (kernel, reason) = _planned(
        "plan_cuda", capability, rows, columns, stats, student_bytes, teacher_bytes, student_gradient,
        known_coefficients, labels_per_row, topk_outcomes, float16,
    )  # fmt: skip
    return Planned(kernel, reason, sweeps, threads, moved, cluster, stages, shared_bytes)


def _planned(operator: str, *arguments: object) -> tuple[list[int], list[str]]:
    numbers, texts = ask(lambda: getattr(operators, operator)(*arguments))
    if not numbers:
        raise ValueError(texts[0])
    return numbers, texts


def build_info() -> dict[str, str]:
    """What the library was built with: compiler, torch_target, cuda_archs."""
    told = ask(operators.build_info)
    return dict(zip(told[::2], told[1::2], strict=True))


def instruction_set() -> str:
    """The code path that this processor gets (KLDIV_CPU_ISA narrows it): avx512, avx2 or baseline."""
    return str(operators.isa())


class Compiled:
    """What compiled backends have in common: operators `forward` and `backward` of one schema."""

    def _operators(self) -> Any:
        return operators

    def forward(self, call: Call, with_state: bool) -> tuple[Tensor, Tensor]:
        values, state, _, _ = self._operators().forward(*_arguments(call), None, with_state, False, False, False)
        return values, state

    def backward(
        self, call: Call, state: Tensor, coefficients: Tensor, student: bool, reference: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        dlogits, dreference = self._operators().backward(
            *_arguments(call), state, coefficients.contiguous(), student, reference
        )
        return dlogits, dreference

    def one_read(
        self, call: Call, coefficients: Tensor, student: bool, reference: bool, in_place: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        values, _, dlogits, dreference = self._operators().forward(
            *_arguments(call), coefficients.contiguous(), False, student, reference, in_place
        )
        return values, call.logits if in_place else dlogits, dreference

    def policy(
        self,
        call: Call,
        coefficients: Tensor,
        tokens: Tensor,
        term: str,
        kl: str,
        bounds: list[float],
        in_place: bool = False,
    ) -> tuple[Tensor, Tensor]:
        values, dlogits = self._operators().forward_policy(
            *_arguments(call), coefficients.contiguous(), tokens.contiguous(), term, kl, bounds, in_place
        )
        return values, call.logits if in_place else dlogits

    def policy_outcome(
        self,
        values: Tensor,
        coefficients: Tensor,
        tokens: Tensor,
        valid: Tensor,
        scale: Tensor,
        old: Tensor | None,
        sampling: Tensor | None,
        off_policy_weight: Tensor | None,
        token_weights: Tensor | None,
        kl_weights: Tensor | None,
        anchored: bool,
        reference: bool,
        exact: bool,
        kl_coef: float,
        term: str,
        kl: str,
        bounds: list[float],
    ) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = self._operators().finish_policy(
            values, coefficients, tokens, valid, scale, old, sampling, off_policy_weight, token_weights, kl_weights,
            anchored, reference, exact, kl_coef, term, kl, bounds,
        )  # fmt: skip
        return found

    def topk(
        self, call: Call, teacher: Tensor, scale: Tensor, kind: str, alpha: float, beta: float, in_place: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        values, divergences, dlogits = self._operators().forward_topk(
            *_arguments(call), teacher.contiguous(), scale.contiguous(), kind, alpha, beta, in_place
        )
        return values, divergences[0], call.logits if in_place else dlogits

    def shard_state(self, call: Call, first_column: int) -> Tensor:
        found: Tensor = self._operators().shard_state(*_arguments(call), first_column)
        return found

    def shard_sums(self, call: Call, states: Tensor) -> Tensor | None:
        if _finished_first().issuperset(call.stats):
            return None
        found: Tensor = self._operators().shard_sums(*_arguments(call), states)
        return found

    def shard_finish(
        self, call: Call, states: Tensor, sums: Tensor | None, picked: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        nothing = states.new_empty((states.shape[0], 0))
        values, state = self._operators().shard_finish(
            *_arguments(call), states, nothing if sums is None else sums, picked
        )
        return values, state


class NativeCpuBackend(Compiled):
    name = "cpu"

    def unavailable(self) -> str | None:
        return load()

    def unsupported(self, call: Call) -> str | None:
        tensors = [call.logits] if call.reference is None else [call.logits, call.reference]
        for tensor in tensors:
            if tensor.device.type != "cpu":
                return f"it serves CPU tensors, not {tensor.device}"
            if tensor.dtype not in DTYPES:
                return f"it serves float32, bfloat16 and float16, not {tensor.dtype}"
        missing = [name for name in call.stats if name not in served()]
        if missing:
            return f"it has no {', '.join(missing)}"
        return None

    def refuses_in_place(self, call: Call, reference: bool) -> str | None:
        return None

    def state_rows(self, stats: tuple[str, ...]) -> int:
        return _STATE_OF_ROW + _STATE_OF_STATISTIC * len(stats)


def _arguments(call: Call) -> tuple[object, ...]:
    return (
        call.logits.detach(),
        None if call.reference is None else call.reference.detach(),
        call.labels,
        call.mask,
        call.exclude,
        call.token_parameters,
        list(call.parameters),
        list(call.stats),
        call.vocab_size,
    )
