"""A loss with and without `in_place`, and all that comes out of it compared to the last bit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[..., Tensor]


def some(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (2 * torch.randn(shape)).to(dtype)


def same(got: Tensor, expected: Tensor) -> bool:
    """The same bits, NaN included."""
    return got.dtype == expected.dtype and torch.equal(got.nan_to_num(-7.0), expected.nan_to_num(-7.0))


def gradients(loss_of: Loss, data: tuple[Tensor, ...], cut: Callable[[Tensor], Tensor], in_place: bool) -> list[Tensor]:
    """The loss, the gradient that the logits' own backward gets, and those of all leaves, for two upstream scalars."""
    leaves = [x.clone().requires_grad_() for x in data]
    base = leaves[0] * 1
    logits, before = cut(base), base.detach().clone()
    passed: list[Tensor] = []
    logits.register_hook(passed.append)
    version = base._version
    loss = loss_of(logits, *leaves[1:], in_place=in_place)
    there = logits.detach().clone()
    out = [loss.detach()]
    # A kept graph gives the same again.
    for upstream in (-0.3, -0.3, 1.0):
        out += torch.autograd.grad(upstream * loss, leaves, retain_graph=True)
    assert same(out[1], out[1 + len(leaves)])
    assert (base._version > version) == in_place
    if not in_place:
        assert torch.equal(base, before)
        return [*out, passed[2]]
    assert same(there, passed[2])
    assert same(logits.detach(), there)
    assert logits.data_ptr() not in [x.data_ptr() for x in passed]
    # No other element of the base has changed.
    cut(before).copy_(there)
    assert same(base.detach(), before)
    # The graph is not kept: the gradient is multiplied where it stands.
    again = torch.autograd.grad(-0.3 * loss, leaves)
    assert passed[3].data_ptr() == logits.data_ptr()
    assert same(logits.detach(), passed[3])
    assert all(torch.allclose(x, y, rtol=1e-2, equal_nan=True) for x, y in zip(again, out[1:], strict=False))
    return [*out, there]


def check(loss_of: Loss, *data: Tensor, cut: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """The gradient where the logits were, after comparing all that comes out with the call that leaves them."""
    plain, got = (gradients(loss_of, data, cut, in_place) for in_place in (False, True))
    for x, y in zip(got, plain, strict=True):
        assert same(x, y)
    return got[-1]


def scaled_at_the_end(loss_of: Loss, data: Tensor, cut: Callable[[Tensor], Tensor]) -> None:
    """An upstream scalar and a graph that is not kept."""
    found = []
    for in_place in (False, True):
        leaf = data.clone().requires_grad_()
        (0.7 * loss_of(cut(leaf * 1), in_place=in_place)).backward()
        found.append(leaf.grad)
    assert same(*found)
