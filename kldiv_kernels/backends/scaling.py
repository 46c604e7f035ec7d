"""The gradient of the one-read form, times the scalar that comes in with the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from kldiv_kernels._ops import ops as operators
from kldiv_kernels.backends import native
from kldiv_kernels.backends.triton import DEVICES, TritonBackend, interpreted


def scale_in_place(gradient: Tensor, upstream: Tensor) -> Tensor:
    """gradient *= upstream; where compiled code or Triton runs, a scalar of 1 costs no pass over the gradient."""
    device = gradient.device.type
    if device == "cpu" and gradient.is_contiguous() and upstream.dtype == torch.float32 and native.load() is None:
        operators.scale_(gradient, upstream)
        return gradient
    fits = upstream.dtype == torch.float32 and gradient.dtype != torch.float64 and gradient.is_contiguous()
    if fits and device in DEVICES and TritonBackend().unavailable() is None:
        from kldiv_kernels.backends.triton import launch

        launch.scale_in_place(gradient, upstream, interpreted())
        return gradient
    return gradient.mul_(upstream)
