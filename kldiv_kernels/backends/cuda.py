"""The CUDA C++ backend: NVIDIA GPUs from sm_80 on, through the operators of the shared library."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch

from kldiv_kernels._ops import ops as operators
from kldiv_kernels.backends import native
from kldiv_kernels.backends.interface import READS_AGAIN, Call
from kldiv_kernels.backends.strides import joined
from kldiv_kernels.tracing import constant

OLDEST = 80
# One launch takes the codes of so many statistics (csrc/cuda/job.h).
MOST_STATISTICS = 32
# Leading dimensions that no stride joins (csrc/cuda/job.h).
MOST_DIMENSIONS = 4
# Floats a row in the saved state: a reference and a scaled sum of both softmaxes, then for each statistic its two
# gradient sums and five constants (csrc/cuda/job.h).
_STATE_OF_ROW, _STATE_OF_STATISTIC = 4, 7


def architectures() -> str:
    """What the library was compiled for, such as "80;90+PTX"; "" where it has no CUDA part."""
    return str(native.ask(operators.cuda_archs)) if native.load() is None and hasattr(operators, "cuda_archs") else ""


def serves(archs: str, capability: int) -> bool:
    """Whether code for `archs` runs on a device: binaries on their own generation, PTX on every later one."""
    built = [int(arch) for arch in re.findall(r"\d+", archs)]
    if capability < OLDEST or not built:
        return False
    in_ptx = archs.endswith("+PTX") and built[-1] <= capability
    return in_ptx or any(arch // 10 == capability // 10 and arch <= capability for arch in built)


def capability(device: torch.device | int) -> int:
    """90 for sm_90."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _refusal_of(device: int) -> str | None:
    found, archs = capability(device), architectures()
    if serves(archs, found):
        return None
    return f"cuda:{device} is sm_{found}; this build serves {archs.replace(';', ', ')} (sm_{OLDEST} and later)"


@functools.cache
def _refusal() -> str | None:
    reason = native.load()
    if reason is not None:
        return reason
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm; the cuda backend serves NVIDIA GPUs"
    if not architectures():
        return (
            "this build has no CUDA part: when it was built there was no nvcc, or KLDIV_CUDA=0, or make found no GPU; "
            "with the CUDA toolkit in PATH or CUDA_HOME run: pip install --no-build-isolation ."
        )
    if not torch.cuda.is_available():
        return "there is no CUDA device here" if torch.version.cuda else "this PyTorch is built without CUDA"
    driver = str(native.ask(operators.cuda_refusal))
    if driver:
        return driver
    try:
        refusals = [_refusal_of(device) for device in range(torch.cuda.device_count())]
    except RuntimeError as error:  # a broken driver, a process forked after CUDA had started
        return f"CUDA does not start: {error}"
    return refusals[0] if None not in refusals else None


@functools.cache
def _device_refusal(device: int) -> str | None:
    return _refusal_of(device)


def _why() -> str | None:
    return _refusal()


def _why_not_there(device: int) -> str | None:
    return _device_refusal(device)


# torch.compile takes the answers as they are instead of tracing them (see native.py).
_unavailable = constant(_why)
_unavailable_on = constant(_why_not_there)


def _native() -> Any:
    return operators


class CudaBackend(native.Compiled):
    """`operators` and `device` let tests put the host's model of a GPU in the place of CUDA tensors."""

    name = "cuda"

    def __init__(self, operators: Callable[[], Any] = _native, device: str = "cuda") -> None:
        self._namespace, self._device = operators, device
        self._names: frozenset[str] | None = None

    def _operators(self) -> Any:
        return self._namespace()

    @constant
    def _served(self) -> frozenset[str]:
        if self._names is None:
            self._names = frozenset(native.ask(self._operators().cuda_served))
        return self._names

    def unavailable(self) -> str | None:
        return _unavailable() if self._device == "cuda" else None

    def unsupported(self, call: Call) -> str | None:
        tensors = [call.logits] if call.reference is None else [call.logits, call.reference]
        for tensor in tensors:
            if tensor.device.type != self._device:
                return f"it serves CUDA tensors, not {tensor.device}"
            if tensor.dtype not in native.DTYPES:
                return f"it serves float32, bfloat16 and float16, not {tensor.dtype}"
            if len(joined(tensor)) > MOST_DIMENSIONS:
                return f"rows with strides {list(tensor.stride())} need more than {MOST_DIMENSIONS} leading dimensions"
        missing = [name for name in call.stats if name not in self._served()]
        if missing:
            return f"it has no {', '.join(missing)}"
        if len(call.stats) > MOST_STATISTICS:
            return f"it takes at most {MOST_STATISTICS} statistics at a time, not {len(call.stats)}"
        return None if self._device != "cuda" else _unavailable_on(call.logits.device.index or 0)

    def refuses_in_place(self, call: Call, reference: bool) -> str | None:
        if not call.logits.is_contiguous():
            return f"rows with strides {list(call.logits.stride())} have gaps"
        if reference:
            return "it writes the gradient of the reference after that of the logits, and reads both again for it"
        return READS_AGAIN if call.reads_labels_again else None

    def state_rows(self, stats: tuple[str, ...]) -> int:
        return _STATE_OF_ROW + _STATE_OF_STATISTIC * len(stats)
