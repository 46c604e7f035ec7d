r"""Divergences of rows that are log-probabilities already, with each column a free variable.

x = log q is the student's row, y the teacher's, [rows, V]; for `total_variation` both are probabilities. Nothing is
normalised. Per column, the term and its derivative with respect to x:

    kl                p (log max(p, ε) − x)                             −p
    kl_of_log         p (y − x),  p = e^y                               −p
    reverse_kl        q (x − y)                                         q (x − y + 1)
    jsd, 0 < β < 1    β p (y − log m) + (1−β) q (x − log m)             (1−β) q (x − log m),  m = βp + (1−β)q
    total_variation   ½ |x − y|                                         ½ sign(x − y)

A term without probability (p = 0, or q = 0) is 0, whatever it is multiplied with.

The kernels of this package do not serve here: their gradient is the logits', which is g − q Σ g for the g above. Both
lead to the same gradient of the logits behind a log_softmax, whose backward is that projection, and projecting twice is
projecting once; but who asks for the derivative at x, as `torch.nn.KLDivLoss` defines it, gets g here. It is plain
PyTorch over blocks of rows, in float32: beside the blocks, the forward pass allocates nothing of size [rows, V] and the
backward pass the gradient alone, computed again from x and y. Raw logits are better given to
`kldiv_kernels.divergence_loss`, which needs no log_softmax before it and no log-probabilities in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

REDUCTIONS = ("none", "sum", "mean", "batchmean")
# Elements a block. On a CPU the float32 temporaries should stay in cache: 2^19 was the fastest of 2^16 to 2^26 (161 ms
# for kl with its gradient, [256, 151936], 2 cores; 870 ms in one block). On a GPU a block has to fill the device.
_CPU_BLOCK, _GPU_BLOCK = 1 << 19, 1 << 24
# Beyond it the smaller of two probabilities is below e^-60 of the larger, and so is all that it contributes.
_FAR = 60.0


@dataclass(frozen=True)
class Divergence:
    """term(x, y) and gradient(x, y) with respect to x, of blocks [rows, V] in the dtype of the arithmetic."""

    term: Callable[[Tensor, Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


def kl(eps: float) -> Divergence:
    """KL(p‖q) of probabilities p and log-probabilities x; ε bounds p from below inside the logarithm only."""
    return Divergence(lambda x, p: _times(p, p.clamp_min(eps).log() - x), lambda x, p: -p)


def jsd(beta: float) -> Divergence:
    """Generalised Jensen–Shannon divergence of log-probabilities; β = 0 is KL(p‖q) and β = 1 KL(q‖p)."""
    if beta == 0:
        return kl_of_log()
    if beta == 1:
        return Divergence(lambda x, y: _times(x.exp(), x - y), lambda x, y: _times(x.exp(), x - y + 1))

    def term(x: Tensor, y: Tensor) -> Tensor:
        # log(m/p) and log(m/q) from the difference of the rows: they keep their relative accuracy where p ≈ q.
        d = _difference(x, y)
        over_p, over_q = torch.log1p((1 - beta) * torch.expm1(d)), torch.log1p(beta * torch.expm1(-d))
        return -beta * y.exp() * over_p - (1 - beta) * x.exp() * over_q

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        return (beta - 1) * x.exp() * torch.log1p(beta * torch.expm1(-_difference(x, y)))

    return Divergence(term, gradient)


def kl_of_log() -> Divergence:
    """KL(p‖q) of log-probabilities."""
    return Divergence(lambda x, y: _times(y.exp(), y - x), lambda x, y: -y.exp())


def total_variation() -> Divergence:
    return Divergence(lambda x, y: (x - y).abs() / 2, lambda x, y: torch.sign(x - y) / 2)


def reduce(divergence: Divergence, x: Tensor, y: Tensor, valid: Tensor, reduction: str) -> Tensor:
    """Sum over columns and rows, divided by 1 ("sum"), the valid rows ("batchmean") or also V ("mean"); "none": [N, V].

    x, y [N, V] of any strides; valid [N] bool: a row where it is False is 0, with gradient 0, whatever it holds.
    float32 (float64 for float64 x). x gets a gradient, as often as asked for; y does not.
    """
    scale = torch.ones((), dtype=_arithmetic(x), device=x.device)
    if reduction in ("mean", "batchmean"):
        # The count stays on the device, and no valid row is a sum of 0 over 1.
        scale = scale / (valid.sum().clamp_min(1) * (x.shape[1] if reduction == "mean" else 1))
    out: Tensor = _Reduced.apply(x, y, valid, scale, divergence, reduction == "none")  # type: ignore[no-untyped-call]
    return out


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, valid: Tensor, scale: Tensor, divergence: Divergence, columns: bool
    ) -> Tensor:
        ctx.save_for_backward(x, y, valid, scale)
        ctx.divergence, ctx.columns = divergence, columns
        out = x.new_empty(x.shape if columns else x.shape[:1], dtype=scale.dtype)
        for rows, at, to in _blocks(x, y):
            term = torch.where(valid[rows, None], divergence.term(at, to), 0.0)
            out[rows] = term if columns else term.sum(-1)
        return out if columns else (out.sum(dtype=torch.float64) * scale).to(scale.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, y, valid, scale = ctx.saved_tensors
        gradient = torch.empty_like(x)
        for rows, at, to in _blocks(x, y):
            factor = upstream[rows] if ctx.columns else upstream * scale
            gradient[rows] = torch.where(valid[rows, None], ctx.divergence.gradient(at, to) * factor, 0.0)
        return gradient, None, None, None, None, None


def _blocks(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    count = max(1, (_CPU_BLOCK if x.device.type == "cpu" else _GPU_BLOCK) // max(1, x.shape[1]))
    dtype = _arithmetic(x)
    for start in range(0, x.shape[0], count):
        rows = slice(start, start + count)
        yield rows, x[rows].to(dtype), y[rows].to(dtype)


def _arithmetic(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _times(probability: Tensor, factor: Tensor) -> Tensor:
    return torch.where(probability == 0, 0.0, probability * factor)


def _difference(x: Tensor, y: Tensor) -> Tensor:
    """x − y, 0 where both are −∞, and no farther than what a float32 exponential holds."""
    return torch.where((x == y) & (x == -math.inf), 0.0, x - y).clamp(-_FAR, _FAR)
