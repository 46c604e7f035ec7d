"""Sums of the tokens of each sequence where sequences stand behind each other, and back to the tokens.

Summed in float64, in the order of the tokens: on a GPU the bits are the same every time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kldiv_kernels.groups import numbered


@dataclass(frozen=True)
class Segments:
    """index [N] is the segment of each token. Segment i has the tokens from offsets[i] to offsets[i + 1] of `order`.

    order None: as the tokens stand. There may be more segments than sequences; those are empty.
    """

    index: Tensor
    offsets: Tensor
    order: Tensor | None = None

    def sums(self, x: Tensor) -> Tensor:
        """[N] -> [segments], with gradient; of bool the number that is True."""
        total: Tensor = _Sums.apply(x, self.index, self.offsets, self.order)  # type: ignore[no-untyped-call]
        return total

    def at_tokens(self, x: Tensor) -> Tensor:
        """[segments] -> [N], with gradient."""
        found: Tensor = _AtTokens.apply(x, self.index, self.offsets, self.order)  # type: ignore[no-untyped-call]
        return found


def of_bounds(cu_seqlens: Tensor, tokens: int) -> Segments:
    """The segments from cu_seqlens[i] to cu_seqlens[i + 1]. A token in none has any index."""
    # A bound beyond the tokens, where values are not looked at, must not be read beyond them.
    bounds = cu_seqlens.long().clamp(0, tokens)
    position = torch.arange(tokens, device=bounds.device)
    # The first segment that ends behind the token, so that an empty one has none.
    index = torch.searchsorted(bounds[1:].contiguous(), position, right=True)
    offsets = bounds if len(bounds) > 1 else bounds.repeat(2)
    return Segments(index.clamp_max(len(offsets) - 2), offsets)


def of_ids(ids: Tensor, everyone: Tensor, own: slice) -> tuple[Segments, Tensor]:
    """The segments of equal `ids` [N], and how many sequences those of `everyone` are, a scalar on the device.

    ids are everyone[own]: of all ranks, whose segments are numbered alike. The id −1 is that of no sequence.
    """
    numbers = numbered(everyone)
    count = (numbers.amax() + 1 - (everyone == -1).any().long()) if len(everyone) else numbers.new_zeros(())
    index = numbers[own]
    order = index.argsort(stable=True)
    slots = torch.arange(max(len(everyone), 1) + 1, device=ids.device)
    return Segments(index, torch.searchsorted(index[order], slots), order), count


def _segment_sums(x: Tensor, offsets: Tensor, order: Tensor | None) -> Tensor:
    wide = x.double() if order is None else x.double()[order]
    total = torch.segment_reduce(wide, "sum", offsets=offsets, axis=0, initial=0, unsafe=True)
    return total.to(torch.int64 if x.dtype == torch.bool else x.dtype)


class _Sums(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, index: Tensor, offsets: Tensor, order: Tensor | None) -> Tensor:
        return _segment_sums(x, offsets, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (index,) = ctx.saved_tensors
        return gradient[index], None, None, None


class _AtTokens(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, index: Tensor, offsets: Tensor, order: Tensor | None) -> Tensor:
        return x[index]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _segment_sums(gradient, *ctx.saved_tensors), None, None, None
