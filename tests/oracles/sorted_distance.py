"""Σ_k |q_(k) − p_(k)| of sorted probabilities, one by one."""

from __future__ import annotations

import torch
from torch import Tensor


def sorted_l1(q: Tensor, p: Tensor) -> Tensor:
    first, second = sorted(q.unbind(), reverse=True), sorted(p.unbind(), reverse=True)
    zero = torch.zeros((), dtype=torch.float64)
    size = max(len(first), len(second))
    first, second = (x + [zero] * (size - len(x)) for x in (first, second))
    return torch.stack([(a - b).abs() for a, b in zip(first, second, strict=True)]).sum()
