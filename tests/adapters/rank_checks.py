"""Rows whose columns are spread over ranks, beside the same rows in float64; stand-ins for modules."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from ranks import same_everywhere
from torch import Tensor


class Rows:
    """This rank's columns [first, end) as a leaf, and whole rows as a leaf in float64."""

    def __init__(self, whole: Tensor, first: int, end: int) -> None:
        self.here = slice(first, end)
        self.mine = whole[..., self.here].clone().requires_grad_()
        self.exact = whole.double().requires_grad_()

    def check(self, value: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
        """Values, the same on all ranks, and gradients of a cotangent that they have in common."""
        assert value.dtype == torch.float32
        assert value.shape == expected.shape
        same_everywhere(value)
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
        cotangent = (torch.rand(expected.shape, dtype=torch.float64) + 0.5) * torch.randn(expected.shape).sign()
        (got,) = torch.autograd.grad(value, self.mine, cotangent.float(), retain_graph=True)
        (wanted,) = torch.autograd.grad(expected, self.exact, cotangent, retain_graph=True)
        assert got.dtype == self.mine.dtype
        largest = wanted.abs().max()
        assert largest > 1e-3
        error = (got.double() - wanted[..., self.here]).abs() / largest
        # Of a rank without columns there is none.
        assert (error <= (tolerance if got.dtype == torch.float32 else 1e-2)).all(), error


@contextmanager
def standing_in(modules: dict[str, ModuleType]) -> Iterator[None]:
    """These modules under their names; unlike with mock.patch.dict, what is imported meanwhile stays imported."""
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
