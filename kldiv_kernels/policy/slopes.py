"""Values with the derivative that they have, and products in which 0 wins over infinity.

e^w is infinite in float32 above w = 88. Under a clamp or a minimum the loss is finite all the same, and the gradient of
the branch that is not taken is 0, of which autograd's chain rule would make NaN, 0·inf. An advantage or a weight of 0
beside a ratio that overflows is the same case. What is NaN itself stays NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def with_slope(value: Tensor, x: Tensor, slope: Tensor) -> Tensor:
    """`value`, with slope·dx added to its gradient; all of one shape. A gradient of 0 stays 0 where slope is infinite.

    >>> x = torch.tensor([1.0, 1000.0], requires_grad=True)
    >>> exp(x).clamp(max=5.0).sum().backward()
    >>> x.grad
    tensor([2.7183, 0.0000])
    """
    result: Tensor = _WithSlope.apply(value, x, slope)  # type: ignore[no-untyped-call]
    return result


def product(x: Tensor, y: Tensor) -> Tensor:
    """x·y, where 0·inf is 0; without gradient."""
    out = x * y
    return torch.where(out.isnan() & ~(x + y).isnan(), 0.0, out)


def times(x: Tensor, y: Tensor) -> Tensor:
    """x·y, of equal shapes, where 0·inf is 0; y gets no gradient."""
    return with_slope(product(x.detach(), y), x, y)


def exp(x: Tensor) -> Tensor:
    out = x.detach().exp()
    # A tensor of its own, since torch.compile takes none twice.
    return with_slope(out.clone(), x, out)


def sigmoid(x: Tensor) -> Tensor:
    """With the slope σ(x)·σ(−x): 1 − σ(x), as PyTorch has it, has no digits left where σ(x) is near 1."""
    at = x.detach()
    out = torch.sigmoid(at)
    return with_slope(out.clone(), x, out * torch.sigmoid(-at))


class _WithSlope(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, x: Tensor, slope: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (slope,) = ctx.saved_tensors
        return gradient, product(gradient, slope), None
