"""The matrix multiplications: logits in float32 from low-precision factors, and gradients.

A GPU multiplies bfloat16 and float16 into float32. PyTorch has no such operator on CPUs: there the factors are
converted to float32, the weight a slice at a time, and where the processor multiplies bfloat16 oneDNN is told to take
them back: exact for logits, whose factors were bfloat16; for gradients it rounds the logits' gradient, once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

# Of a weight, converted at a time.
_SLICE_BYTES = 32 << 20


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Whether this CPU does, so that it pays."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _in_bfloat16(*factors: Tensor) -> bool:
    bfloat16 = all(x.dtype == torch.bfloat16 for x in factors)
    return bfloat16 and factors[0].device.type == "cpu" and _multiplies_bfloat16()


@contextlib.contextmanager
def _as_bfloat16(allowed: bool) -> Iterator[None]:
    """Lets oneDNN multiply float32 as bfloat16, in all threads of the process: there is no switch for one call."""
    if not allowed:
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _wide(tensor: Tensor, out_dtype: torch.dtype) -> bool:
    """Whether the device multiplies this dtype into a wider one."""
    return tensor.device.type == "cuda" and tensor.dtype != out_dtype


class Gemm:
    """The multiplications of one head, with the memory that they want from chunk to chunk."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._slice: Tensor | None = None
        self._low: Tensor | None = None

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        """out [n, V] = hidden @ weightᵀ, in the dtype of `out`."""
        weight = self.weight
        if weight.dtype == out.dtype:
            torch.mm(hidden, weight.t(), out=out)
        elif _wide(weight, out.dtype):
            torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
        else:
            with _as_bfloat16(_in_bfloat16(hidden, weight)):
                wide = hidden.to(out.dtype)
                for begin, part in self._slices(out.dtype):
                    torch.mm(wide, part.t(), out=out[:, begin : begin + part.shape[0]])

    def times_weight(self, dlogits: Tensor, out: Tensor) -> None:
        """out [n, H] = dlogits @ weight."""
        weight = self.weight
        if weight.dtype == dlogits.dtype:
            out.copy_(dlogits @ weight)
        elif _wide(weight, dlogits.dtype) or _in_bfloat16(weight):
            out.copy_(self._rounded(dlogits) @ weight)
        else:
            out.copy_(self.times_weight_exactly(dlogits))

    def times_weight_exactly(self, factor: Tensor) -> Tensor:
        """[n, H] = factor @ weight, in the dtype of `factor` and without rounding it."""
        total = torch.zeros((factor.shape[0], self.weight.shape[1]), dtype=factor.dtype, device=factor.device)
        for begin, part in self._slices(factor.dtype):
            total.addmm_(factor[:, begin : begin + part.shape[0]], part)
        return total

    def add_outer(self, total: Tensor, dlogits: Tensor, hidden: Tensor, first: bool) -> None:
        """total [V, H] = dlogitsᵀ @ hidden, added to what is there unless it is the first."""
        if _wide(hidden, total.dtype):
            low = self._rounded(dlogits).t()
            if first:
                torch.mm(low, hidden, out_dtype=total.dtype, out=total)
            else:
                torch.addmm(total, low, hidden, out_dtype=total.dtype, out=total)
            return
        with _as_bfloat16(_in_bfloat16(hidden, self.weight)):
            low, hidden = dlogits.to(total.dtype).t(), hidden.to(total.dtype)
            if first:
                torch.mm(low, hidden, out=total)
            else:
                total.addmm_(low, hidden)

    def _slices(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        weight = self.weight
        rows = max(1, _SLICE_BYTES // (weight.shape[1] * dtype.itemsize))
        if self._slice is None:
            self._slice = weight.new_empty((min(rows, weight.shape[0]), weight.shape[1]), dtype=dtype)
        for begin in range(0, weight.shape[0], rows):
            part = weight[begin : begin + rows]
            yield begin, self._slice[: part.shape[0]].copy_(part)

    def _rounded(self, dlogits: Tensor) -> Tensor:
        if dlogits.dtype == self.weight.dtype:
            return dlogits
        if self._low is None or self._low.shape[0] < dlogits.shape[0]:
            self._low = torch.empty(dlogits.shape, dtype=self.weight.dtype, device=dlogits.device)
        return self._low[: dlogits.shape[0]].copy_(dlogits)
