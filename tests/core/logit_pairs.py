"""The student's and the teacher's logits of a few tokens."""

from __future__ import annotations

import torch
from torch import Tensor

SHAPE = (3, 4, 57)


def pair(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return (2 * torch.randn(SHAPE)).to(dtype).requires_grad_(), (2 * torch.randn(SHAPE)).to(dtype)
