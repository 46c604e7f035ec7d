"""The Triton backend: CUDA, ROCm and XPU devices, and on CPU tensors Triton's interpreter, for tests.

formulas/    the statistics, a few functions each
device/      the kernels, the same for every statistic, and the hooks that a set of statistics gives them
bind.py, hook_text.py    bring the two together
sizes.py     how a row is cut
launch.py    launches
shards.py    those for rows whose columns are spread over processes
ops.py       the operators that torch.compile sees through
"""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kldiv_kernels import registry
from kldiv_kernels.backends.interface import READS_AGAIN, Call
from kldiv_kernels.backends.strides import leading
from kldiv_kernels.tracing import constant

if TYPE_CHECKING:
    from kldiv_kernels.backends.triton.launch import Launch
    from kldiv_kernels.backends.triton.shards import ShardLaunch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cuda", "xpu")
_INTERPRETER = "set TRITON_INTERPRET=1 before the first import to run it in Triton's interpreter, which is for tests"


@functools.cache
def interpreted() -> bool:
    """Whether the kernels run in the interpreter: TRITON_INTERPRET=1 when they were imported."""
    import triton

    from kldiv_kernels.backends.triton.device import kernels

    return not isinstance(kernels.sweep_kernel, triton.JITFunction)


@functools.cache
def _refusal() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; run: pip install triton"
    if interpreted() or any(torch.get_device_module(device).is_available() for device in DEVICES):
        return None
    return f"there is no CUDA, ROCm or XPU device here; {_INTERPRETER}"


@functools.cache
def _served() -> frozenset[str]:
    from kldiv_kernels.backends.triton.formulas import table

    return frozenset(table.TABLE)


def _why() -> str | None:
    return _refusal()


def _names() -> frozenset[str]:
    return _served()


# torch.compile takes the answers as they are instead of tracing imports (see native.py).
_unavailable = constant(_why)
_builtin = constant(_names)


def _missing(name: str) -> bool:
    statistic = registry.STATISTICS[name]
    return name not in _builtin() if statistic.builtin else statistic.triton is None


class TritonBackend:
    name = "triton"

    def unavailable(self) -> str | None:
        return _unavailable()

    def unsupported(self, call: Call) -> str | None:
        tensors = [call.logits] if call.reference is None else [call.logits, call.reference]
        for tensor in tensors:
            if tensor.device.type == "cpu" and not interpreted():
                return f"CPU tensors need the interpreter; {_INTERPRETER}"
            if tensor.device.type not in (*DEVICES, "cpu"):
                return f"it serves CUDA, ROCm and XPU tensors, not {tensor.device}"
            if tensor.dtype not in DTYPES:
                return f"it serves float32, bfloat16 and float16, not {tensor.dtype}"
            if leading(tensor) is None:
                return f"rows with strides {list(tensor.stride())} need more than two leading dimensions"
        missing = [name for name in call.stats if _missing(name)]
        if missing:
            return f"it has no {', '.join(missing)} (register_statistic takes triton= for that)"
        return None

    def state_rows(self, stats: tuple[str, ...]) -> int:
        from kldiv_kernels.backends.triton.bind import bound_for

        return bound_for(stats, False).state_rows

    def _launch(self, call: Call) -> Launch:
        from kldiv_kernels.backends.triton import launch

        return launch.Launch(call, interpreted())

    def forward(self, call: Call, with_state: bool) -> tuple[Tensor, Tensor]:
        return self._launch(call).statistics(with_state)

    def backward(
        self, call: Call, state: Tensor, coefficients: Tensor, student: bool, reference: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        return self._launch(call).gradients(state, coefficients.contiguous(), student, reference)

    def refuses_in_place(self, call: Call, reference: bool) -> str | None:
        if not call.logits.is_contiguous():
            return f"rows with strides {list(call.logits.stride())} have gaps"
        return READS_AGAIN if call.reads_labels_again else None

    def one_read(
        self, call: Call, coefficients: Tensor, student: bool, reference: bool, in_place: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self._launch(call).loss(coefficients.contiguous(), student, reference, in_place)

    def _shard(self, call: Call) -> ShardLaunch:
        from kldiv_kernels.backends.triton import shards

        return shards.ShardLaunch(call, interpreted())

    def shard_state(self, call: Call, first_column: int) -> Tensor:
        return self._shard(call).state(first_column)

    def shard_sums(self, call: Call, states: Tensor) -> Tensor | None:
        return self._shard(call).sums(states)

    def shard_finish(
        self, call: Call, states: Tensor, sums: Tensor | None, picked: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self._shard(call).finish(states, sums, picked)
