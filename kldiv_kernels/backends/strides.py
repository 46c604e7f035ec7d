"""How the rows of a strided tensor are walked."""

from __future__ import annotations

from torch import Tensor


def joined(tensor: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the leading dimensions, neighbours that one stride joins taken as one."""
    dims: list[tuple[int, int]] = []
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    return dims


def leading(tensor: Tensor) -> tuple[int, int, int] | None:
    """(inner, outer stride, inner stride) of the leading dimensions seen as [*, inner], or None if there are more."""
    dims = joined(tensor)
    if len(dims) > 2:
        return None
    if len(dims) == 2:
        return dims[1][0], dims[0][1], dims[1][1]
    return (dims[0][0], 0, dims[0][1]) if dims else (1, 0, 0)
