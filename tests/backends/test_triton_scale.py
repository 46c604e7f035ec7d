"""The scaling of a gradient in place, by Triton's kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import INTERPRETED
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from torch._subclasses.fake_tensor import FakeTensorMode

from kldiv_kernels.backends import scale_in_place
from kldiv_kernels.backends import triton as backend
from kldiv_kernels.backends.triton import launch

compiled_only = pytest.mark.skipif(INTERPRETED, reason="under TRITON_INTERPRET=1 nothing is compiled")
interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


@interpreted_only
@pytest.mark.parametrize("shape", [(1, 1), (3, 1001), (2, 4096), (0, 7), (11, 4099)])
def test_triton_scales_a_gradient_in_place(shape: tuple[int, int]) -> None:
    gradient = torch.randn(shape)
    expected = gradient * 0.3
    launch.scale_in_place(gradient, torch.tensor(0.3), interpreted=True)
    assert torch.equal(gradient, expected)


@interpreted_only
def test_triton_leaves_a_gradient_alone_for_a_factor_of_one() -> None:
    """NaN payloads and read-only memory would tell; here a store is what must not happen."""
    gradient = torch.randn(5000)
    before = gradient.clone()
    stored = []
    original = triton.runtime.interpreter.InterpreterBuilder.create_masked_store

    def store(self: Any, *arguments: Any) -> None:
        stored.append(arguments)
        original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.interpreter.InterpreterBuilder, "create_masked_store", store)
        launch.scale_in_place(gradient, torch.ones(()), interpreted=True)
        assert not stored
        launch.scale_in_place(gradient, torch.tensor(-1.0), interpreted=True)
        assert len(stored) == 2
    assert torch.equal(gradient, -before)


@compiled_only
@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_gpus_scale_by_the_kernel(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(backend.TritonBackend, "unavailable", lambda self: None)
    scaled: list[Tensor] = []
    monkeypatch.setattr(launch, "scale_in_place", lambda gradient, factor, interpreted: scaled.append(gradient))
    with FakeTensorMode():
        factor = torch.ones((), device=device)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            gradient = torch.empty(3, 5, dtype=dtype, device=device)
            assert scale_in_place(gradient, factor) is gradient
            assert scaled.pop() is gradient
        for other in (torch.empty(3, 5, dtype=torch.float64, device=device), torch.empty(3, 5, device=device).T):
            scale_in_place(other, factor)
            assert not scaled
