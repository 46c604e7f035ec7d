"""Whole rows on every rank, for backends that cannot share one: `reference`, and with it float64 and statistics of your
own. The only place where logits are exchanged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kldiv_kernels.parallel.shard import Shard, all_reduce


def whole(shard: Shard, logits: Tensor, vocab_size: int) -> Tensor:
    """[*, total] from this rank's columns; the gradient is that of these columns."""
    rows: Tensor = _Whole.apply(shard, logits, vocab_size)  # type: ignore[no-untyped-call]
    return rows


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Shard, logits: Tensor, vocab_size: int) -> Tensor:
        columns = shard.columns(vocab_size)
        ctx.start, ctx.columns, ctx.width = shard.start, columns, logits.shape[-1]
        rows = logits.new_zeros((*logits.shape[:-1], shard.total))
        rows[..., shard.start : shard.start + columns] = logits[..., :columns]
        # A number and zeros: exact in any order.
        all_reduce(shard.group, rows)
        return rows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        out = gradient.new_zeros((*gradient.shape[:-1], ctx.width))
        out[..., : ctx.columns] = gradient[..., ctx.start : ctx.start + ctx.columns]
        return None, out, None
