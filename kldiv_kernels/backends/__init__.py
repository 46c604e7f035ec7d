"""The backends, which of them serves a call, and the interface that they share (`interface.py`)."""

from __future__ import annotations

import functools
import os

from kldiv_kernels.backends.cuda import CudaBackend
from kldiv_kernels.backends.interface import Backend, Call, OneReadPolicy, OneReadTopK, Sharded, value_rows
from kldiv_kernels.backends.native import NativeCpuBackend
from kldiv_kernels.backends.reference import ReferenceBackend
from kldiv_kernels.backends.scaling import scale_in_place
from kldiv_kernels.backends.triton import TritonBackend

__all__ = [
    "Backend",
    "Call",
    "OneReadPolicy",
    "OneReadTopK",
    "Sharded",
    "backends",
    "get",
    "names",
    "scale_in_place",
    "select",
    "value_rows",
]


@functools.cache
def _all() -> dict[str, Backend]:
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
