"""How a row is cut into slices and blocks."""

from __future__ import annotations

from dataclasses import dataclass

import triton

# The slices of a row are merged by a warp.
_MOST_SLICES = 32


@dataclass(frozen=True)
class Tile:
    """A block is `lanes` x `columns` neighbouring columns, a slice of a row is `blocks` of them.

    On a GPU: 16 bytes a thread and access, one such access a thread, tensor and block, three blocks under way at a
    time; slices of 16 blocks, 16,384 bf16 columns, so that a single row of 152k gives 10 programs work. Programs of
    4 warps, because most kernels need up to 128 registers a thread: a processor then holds 4 programs or more.
    """

    lanes: int
    blocks: int
    warps: int


GPU_TILE = Tile(lanes=128, blocks=16, warps=4)


def interpreter_tile(vocab: int, columns: int) -> Tile:
    """Several blocks and slices a row at any size, and few of them: the interpreter is slow by the operation."""
    return Tile(lanes=max(2, triton.next_power_of_2(vocab // (4 * columns))), blocks=2, warps=1)


@dataclass(frozen=True)
class Shape:
    """How a row is cut: a function of its length and dtype alone, so that its bits do not depend on the batch."""

    lanes: int
    columns: int
    slice_columns: int
    slices: int
    padded_slices: int
    warps: int

    @property
    def mark_words(self) -> int:
        """32-bit words of a row's marks (labels.py): each lane's bits start a new one."""
        return self.slices * self.lanes * -(-self.slice_columns // (32 * self.lanes))

    @staticmethod
    def of(vocab: int, element_bytes: int, interpreted: bool) -> Shape:
        columns = 16 // element_bytes
        tile = interpreter_tile(vocab, columns) if interpreted else GPU_TILE
        slice_columns = tile.lanes * columns * tile.blocks
        while triton.cdiv(vocab, slice_columns) > _MOST_SLICES:
            slice_columns *= 2
        slices = triton.cdiv(vocab, slice_columns)
        return Shape(tile.lanes, columns, slice_columns, slices, padded(slices), tile.warps)


def padded(parts: int) -> int:
    """Lanes that take so many."""
    return max(2, int(triton.next_power_of_2(parts)))
