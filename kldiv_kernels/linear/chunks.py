"""Chunks of rows: how many, and which the mask leaves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# What the logits of a chunk may take. A GPU needs thousands of rows to multiply at its speed, and the gradient of the
# weight is read and written once a chunk; a CPU reaches its speed with hundreds.
_GPU_BYTES, _GPU_LEAST, _GPU_MOST = 3 << 30, 2048, 4096
_CPU_BYTES, _CPU_LEAST, _CPU_MOST = 768 << 20, 128, 1024


@dataclass(frozen=True)
class ChunkShape:
    """`count` chunks of up to `rows` rows, whose buffers take `bytes`."""

    rows: int
    count: int
    bytes: int


def chunk_shape(
    rows: int,
    columns: int,
    factors: Sequence[torch.dtype],
    logits: torch.dtype,
    device: str,
    given: int | None = None,
    softcaps: int = 0,
) -> ChunkShape:
    """The chunks of so many rows: `factors` are the dtypes of the sides whose logits are made, `softcaps` says how many
    of them have one, `given` is what the caller wants."""
    # Logits, and where factors are narrower their gradient rounded to those; with a softcap that gradient by itself.
    rounded = sum(dtype.itemsize for dtype in factors if dtype != logits)
    bytes_per_logit = logits.itemsize * max(1, len(factors) + softcaps) + rounded
    size = given or _rows_per_chunk(rows, columns, bytes_per_logit, device)
    size = max(1, min(size, rows))
    return ChunkShape(size, -(-rows // size), size * columns * bytes_per_logit)


def _rows_per_chunk(rows: int, columns: int, bytes_per_logit: int, device: str) -> int:
    budget, least, most = (
        (_CPU_BYTES, _CPU_LEAST, _CPU_MOST) if device == "cpu" else (_GPU_BYTES, _GPU_LEAST, _GPU_MOST)
    )
    fits = budget // (columns * bytes_per_logit) // 128 * 128
    largest = min(max(fits, least), most)
    # Chunks of one size: a short one at the end would multiply slowly.
    chunks = max(1, -(-rows // largest))
    return max(1, min(largest, -(-rows // chunks)))


# Rows of a tensor: neighbours, or those of an index.
Rows = slice | Tensor


def kept_rows(mask: Tensor | None) -> Tensor | None:
    """The numbers of the rows that are computed; None: all of them.

    Counting them waits for the device. While a CUDA graph is captured nothing may wait, and all are computed: what the
    mask leaves out is then left out by the kernels.
    """
    if mask is None or (mask.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return None
    return mask.nonzero().reshape(-1)


def chunks(count: int, size: int, index: Tensor | None) -> Iterator[Rows]:
    for begin in range(0, count, size):
        rows = slice(begin, min(count, begin + size))
        yield rows if index is None else index[rows]


def take(tensor: Tensor, rows: Rows) -> Tensor:
    """Rows of [N, ...]."""
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


def take_columns(table: Tensor, rows: Rows) -> Tensor:
    """Columns of [rows, N], contiguous."""
    return (table[:, rows] if isinstance(rows, slice) else table.index_select(1, rows)).contiguous()


def take_logits(logits: Tensor, rows: Rows) -> Tensor:
    """Rows of [*, V] by their flat number, a view where the strides allow one."""
    if logits.dim() == 2:
        return take(logits, rows)
    try:
        return take(logits.view(-1, logits.shape[-1]), rows)
    except RuntimeError:  # leading strides that no single one joins
        leading = logits.shape[:-1]
        numbers = torch.arange(leading.numel(), device=logits.device)[rows] if isinstance(rows, slice) else rows
        return logits[torch.unravel_index(numbers, leading)]
