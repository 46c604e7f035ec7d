"""The backends and the interface they share.

A backend turns a `Call` into per-token statistics, turns per-token coefficients into gradients of the logits,
and, when the coefficients are known beforehand, does both at once. Public functions validate above it: a
backend never sees a bad shape.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from kldiv_kernels import registry


@dataclass(frozen=True)
class Call:
    """What is asked of a backend. N rows are the leading dimensions of `logits` flattened.

    logits, reference [*, V], unit stride in V; labels [N, K] int64, -1 where absent; mask [N] bool;
    exclude [N] int64, -1 for none; token_parameters [4, N] float32 overrides
    parameters = (temperature, reference temperature, alpha, beta); columns from `vocab_size` on are padding.
    """

    logits: Tensor
    reference: Tensor | None
    labels: Tensor | None
    mask: Tensor | None
    exclude: Tensor | None
    token_parameters: Tensor | None
    parameters: tuple[float, float, float, float]
    stats: tuple[str, ...]
    vocab_size: int

    @property
    def rows(self) -> int:
        return self.logits.numel() // max(1, self.logits.shape[-1])

    @property
    def labels_per_row(self) -> int:
        return 1 if self.labels is None else self.labels.shape[1]


def value_rows(stats: tuple[str, ...], labels_per_row: int) -> int:
    """Rows of the [rows, N] table of values: one a statistic, one a label for the labelled ones."""
    return sum(labels_per_row if registry.STATISTICS[name].per_label else 1 for name in stats)


class Backend(Protocol):
    """One way of computing; see the table of backends in the README."""

    name: str

    def unavailable(self) -> str | None:
        """Why this backend cannot be used in this process, or None."""

    def unsupported(self, call: Call) -> str | None:
        """Why it does not serve this call, or None."""

    def state_rows(self, stats: tuple[str, ...]) -> int:
        """Floats a row that `forward` saves for `backward`."""

    def forward(self, call: Call, with_state: bool) -> tuple[Tensor, Tensor]:
        """Values [value_rows, N] and state [state_rows, N] (or [0, N])."""

    def backward(
        self, call: Call, state: Tensor, coefficients: Tensor, student: bool, reference: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of sum(coefficients * values), in the logits' dtype and shape."""

    def one_read(
        self, call: Call, coefficients: Tensor, student: bool, reference: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """forward and backward together."""


@runtime_checkable
class OneReadPolicy(Protocol):
    """A backend that goes from the values of a row to the gradient of its policy loss by itself."""

    def policy(
        self, call: Call, coefficients: Tensor, tokens: Tensor, term: str, kl: str, bounds: list[float]
    ) -> tuple[Tensor, Tensor]:
        """Values [value_rows, N] and dlogits; the arguments are those of `policy_one_read.Known`."""


@runtime_checkable
class OneReadTopK(Protocol):
    """A backend that goes from the log-probabilities of a row to the gradient of its top-k divergence by itself."""

    def topk(
        self, call: Call, teacher: Tensor, scale: Tensor, kind: str, alpha: float, beta: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Values [value_rows, N], divergences [N] and dlogits of Σ scale · divergence, for statistics ("logprob",) or
        ("logprob", "tail_logprob"), of which `teacher` [N, value_rows] has the other side."""


@functools.cache
def _all() -> dict[str, Backend]:
    from kldiv_kernels.backends.cuda import CudaBackend
    from kldiv_kernels.backends.native import NativeCpuBackend
    from kldiv_kernels.backends.reference import ReferenceBackend
    from kldiv_kernels.backends.triton import TritonBackend

    # Fastest first: `auto` takes the first that serves the call.
    found: tuple[Backend, ...] = (NativeCpuBackend(), CudaBackend(), TritonBackend(), ReferenceBackend())
    return {backend.name: backend for backend in found}


def names() -> list[str]:
    return list(_all())


def get(name: str) -> Backend:
    return _all()[name]


def backends() -> dict[str, str]:
    """Which backends work here: name → "available", or why it is not.

    >>> import kldiv_kernels as kk
    >>> kk.backends()["reference"]
    'available'
    """
    return {name: backend.unavailable() or "available" for name, backend in _all().items()}


def select(call: Call, requested: str, where: str) -> str:
    """The backend that serves the call: the one asked for, or under "auto" the fastest."""
    source = "backend"
    if requested == "auto" and os.environ.get("KLDIV_BACKEND"):
        requested, source = os.environ["KLDIV_BACKEND"], "KLDIV_BACKEND"
    if requested == "auto":
        # On a CPU Triton is an interpreter: only for those who ask for it. Asking the cuda backend would start CUDA.
        on_cpu = call.logits.device.type == "cpu"
        usable = ((name, one) for name, one in _all().items() if not (on_cpu and name in ("cuda", "triton")))
        return next(name for name, backend in usable if _refusal(backend, call) is None)
    if requested not in _all():
        raise ValueError(f"{where}: {source} is {requested!r}; expected auto or one of {', '.join(_all())}")
    refusal = _refusal(_all()[requested], call)
    if refusal:
        raise ValueError(f"{where}: {source} {requested!r} cannot serve this call: {refusal}")
    return requested


def _refusal(backend: Backend, call: Call) -> str | None:
    return backend.unavailable() or backend.unsupported(call)


def scale_in_place(gradient: Tensor, upstream: Tensor) -> Tensor:
    """gradient *= upstream; where compiled code or Triton runs, a scalar of 1 costs no pass over the gradient."""
    device = gradient.device.type
    if device == "cpu" and upstream.dtype == torch.float32 and get("cpu").unavailable() is None:
        torch.ops.kldiv_kernels_native.scale_(gradient, upstream)
        return gradient
    fits = upstream.dtype == torch.float32 and gradient.dtype != torch.float64 and gradient.is_contiguous()
    if fits and device in ("cuda", "xpu") and get("triton").unavailable() is None:
        from kldiv_kernels.backends.triton import interpreted, launch

        launch.scale_in_place(gradient, upstream, interpreted())
        return gradient
    return gradient.mul_(upstream)
