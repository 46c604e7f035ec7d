"""A GPU that is not there: the Triton backend takes CPU tensors, compiles for a target, and runs nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from kldiv_kernels import ops
from kldiv_kernels.backends import triton as backend
from kldiv_kernels.backends.triton import bind, launch

TARGET = GPUTarget("cuda", 90, 32)


class NoDriver:
    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def _unsupported_on_gpus(self: backend.TritonBackend, call: ops.Call) -> str | None:
    """The checks that torch.compile traces, but for the one of the device."""
    if backend.leading(call.logits) is None or any(backend._missing(name) for name in call.stats):
        return "it does not serve this"
    return None


@contextmanager
def traced_for_a_gpu(cache: Path) -> Iterator[None]:
    """Fake CPU tensors, which autograd has here, are taken for those of a GPU with 132 processors."""
    bound_for = launch.bound_for
    torch.compiler.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend.TritonBackend, "unavailable", lambda self: None)
        patch.setattr(backend.TritonBackend, "unsupported", _unsupported_on_gpus)
        patch.setattr(launch, "bound_for", lambda stats, nvidia: bound_for(stats, True))
        patch.setattr(launch, "_processors", lambda device: 132)
        patch.setattr(triton.runtime.driver, "_active", NoDriver())
        patch.setenv("TRITON_CACHE_DIR", str(cache))
        yield
        torch.compiler.reset()


def pair(rows: int = 8, vocab: int = 1000, teacher: bool = False) -> tuple[Tensor, Tensor]:
    """The student's logits, which want a gradient, and the teacher's."""
    student = torch.empty(rows, vocab, dtype=torch.bfloat16, requires_grad=True)
    return student, torch.empty(rows, vocab, dtype=torch.bfloat16, requires_grad=teacher)


class Keys:
    """kernel → the keys under which it was to be compiled."""

    def __init__(self) -> None:
        self.of: dict[str, set[str]] = {}

    def __call__(self, *, key: str, fn: Any, **_: Any) -> bool:
        self.of.setdefault(fn.name.rpartition(".")[2], set()).add(key)
        return True  # neither compile nor launch

    def counts(self) -> dict[str, int]:
        return {kernel: len(keys) for kernel, keys in self.of.items()}


@contextmanager
def launched_on_a_gpu() -> Iterator[Keys]:
    """Triton's backend taking CPU tensors, and the keys of what it would compile."""
    found = Keys()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend.TritonBackend, "unavailable", lambda self: None)
        patch.setattr(backend.TritonBackend, "unsupported", lambda self, call: None)
        patch.setattr(triton.runtime.driver, "_active", NoDriver())
        patch.setattr(launch, "_processors", lambda device: 1)  # 4 rows fill it
        patch.setattr(triton.knobs.runtime, "jit_cache_hook", found)
        yield found
        bind.bind.cache_clear()
