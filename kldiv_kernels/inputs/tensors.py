"""Checks of tensors: logits, labels, masks, excluded columns, and numbers of which each token has one.

`_checked` functions raise TypeError, ValueError or IndexError naming the argument, what it was and what is allowed.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from kldiv_kernels import autograd

_BEYOND = 2**31 - 1
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def logits_checked(where: str, logits: Tensor, name: str) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{where}: {name} is {type(logits).__name__}; expected a torch.Tensor")
    if logits.dtype not in _DTYPES:
        raise TypeError(f"{where}: {name} has dtype {logits.dtype}; expected float32, bfloat16, float16 or float64")
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{where}: {name} has shape {_shape(logits)}; expected [*, vocabulary] with vocabulary >= 1")
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(
            f"{where}: {name} has stride {logits.stride(-1)} in the vocabulary dimension; expected 1 "
            f"(a transposed view needs .contiguous())"
        )
    autograd.no_tangent(where, name, logits)


def shared_columns(where: str, logits: Tensor, reference: Tensor | None, vocab_size: int | None) -> int:
    """The number of columns that are no padding, in both."""
    columns = logits.shape[-1] if vocab_size is None else vocab_size
    if not isinstance(columns, (int, torch.SymInt)) or not 1 <= columns <= logits.shape[-1]:
        raise ValueError(f"{where}: vocab_size is {vocab_size}; expected 1 to {logits.shape[-1]}, the width of logits")
    if reference is None:
        return columns
    logits_checked(where, reference, "reference_logits")
    _same_device(where, "reference_logits", reference, logits)
    expected = [*logits.shape[:-1], logits.shape[-1]]
    if reference.shape[:-1] != logits.shape[:-1]:
        raise ValueError(f"{where}: reference_logits has shape {_shape(reference)}; expected {expected} like logits")
    if vocab_size is None and reference.shape[-1] != logits.shape[-1]:
        raise ValueError(
            f"{where}: reference_logits has shape {_shape(reference)}; expected {expected} like logits "
            f"(pass vocab_size= to ignore padding columns)"
        )
    if columns > reference.shape[-1]:
        raise ValueError(
            f"{where}: vocab_size is {columns}; expected at most {reference.shape[-1]}, the width of reference_logits"
        )
    return columns


def mask_checked(where: str, mask: Tensor | None, logits: Tensor, leading: torch.Size) -> Tensor | None:
    if mask is None:
        return None
    _per_token(where, "mask", mask, logits, leading)
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"{where}: mask has dtype {mask.dtype}; expected bool or integers (0 leaves a token out)")
    return (mask != 0).reshape(-1)


def valid_tokens(call_mask: Tensor | None, labels: Tensor | None, ignore_index: int) -> Tensor | None:
    """The mask of a loss: labels equal to `ignore_index` leave their tokens out too."""
    if labels is None:
        return call_mask
    kept = (labels != ignore_index).reshape(-1)
    return kept if call_mask is None else kept & call_mask


def label_mask_checked(where: str, labels: Tensor | None, logits: Tensor) -> None:
    if labels is not None:
        integers_checked(where, "labels", labels)
        _per_token(where, "labels", labels, logits, logits.shape[:-1])


def weight_checked(where: str, weight: Tensor | None, logits: Tensor) -> None:
    if weight is not None:
        _per_token(where, "weight", weight, logits, logits.shape[:-1])


def normalizer_checked(where: str, normalizer: float | Tensor | None) -> None:
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(
                f"{where}: normalizer has shape {list(normalizer.shape)}; expected a number or one element"
            )
    elif normalizer is not None and not normalizer > 0:
        raise ValueError(f"{where}: normalizer is {normalizer}; expected a number above 0")


def per_token_checked(where: str, name: str, tensor: Tensor | None, logits: Tensor, *, integers: bool = False) -> None:
    """One number a token under any name."""
    if tensor is not None:
        if integers:
            integers_checked(where, name, tensor)
        _per_token(where, name, tensor, logits, logits.shape[:-1])


def labels_checked(
    where: str, labels: Tensor | None, logits: Tensor, leading: torch.Size, columns: int, ignore_index: int
) -> Tensor | None:
    """[N, K] int64 with -1 where the label is ignored."""
    if labels is None:
        return None
    integers_checked(where, "labels", labels)
    _same_device(where, "labels", labels, logits)
    if labels.shape != leading and labels.shape[:-1] != leading:
        raise ValueError(
            f"{where}: labels has shape {_shape(labels)}; expected {list(leading)}, or {[*leading, 'K']} for K a token"
        )
    per_row = 1 if labels.shape == leading else labels.shape[-1]
    if per_row > columns:
        raise ValueError(f"{where}: labels has K = {per_row} a token; expected at most {columns}, the vocabulary size")
    table = labels.reshape(-1, per_row).to(torch.int64)
    ignored = table == ignore_index
    range_checked(where, "labels", table, ignored, 0, columns, labels.shape, f"or ignore_index = {ignore_index}")
    # What is no column, and fits into an int32, as Triton's kernels read labels: NaN where values were not looked at.
    table = torch.where(table < 0, _BEYOND, table.clamp_max(_BEYOND))
    return torch.where(ignored, -1, table).contiguous()


def exclude_checked(
    where: str, exclude: Tensor | None, logits: Tensor, leading: torch.Size, columns: int
) -> Tensor | None:
    if exclude is None:
        return None
    integers_checked(where, "exclude", exclude)
    _per_token(where, "exclude", exclude, logits, leading)
    table = exclude.reshape(-1).to(torch.int64)
    range_checked(where, "exclude", table, table == -1, 0, columns, exclude.shape, "or -1 for none")
    return table


def may_look_at(tensor: Tensor) -> bool:
    """Whether values may decide what happens: not where a call is traced, transformed by torch.func or captured in a
    CUDA graph, and of no tensor that has none."""
    if torch.compiler.is_compiling() or autograd.transformed():
        return False
    if isinstance(tensor, FakeTensor) or tensor.device.type == "meta" or get_proxy_mode() is not None:
        return False
    return tensor.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def looks_at(tensor: Tensor) -> bool:
    """Whether values are checked when nobody says: on the CPU, where that waits for nothing.

    KLDIV_CHECK_VALUES=1 says so for every device.
    """
    return may_look_at(tensor) and (_on_host(tensor) or os.environ.get("KLDIV_CHECK_VALUES", "0") not in ("", "0"))


def _on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def range_checked(
    where: str, name: str, table: Tensor, allowed: Tensor, low: int, high: int | None, shape: torch.Size, also: str
) -> None:
    """IndexError for a value below `low`, or of `high` and above, that is not `allowed`, where values are looked at."""
    if not looks_at(table):
        return
    wrong = ~allowed & (table < low if high is None else (table < low) | (table >= high))
    if bool(wrong.any()):
        first = int(wrong.reshape(-1).nonzero()[0, 0])
        position = [int(i) for i in torch.unravel_index(torch.tensor(first), shape)] if shape else []
        expected = f"{low} or more," if high is None else f"{low} to {high - 1}"
        raise IndexError(
            f"{where}: {name}{position or ''} is {int(table.reshape(-1)[first])}; expected {expected} {also}"
        )


def _per_token(where: str, name: str, tensor: Tensor, logits: Tensor, leading: torch.Size) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where}: {name} is {type(tensor).__name__}; expected a torch.Tensor")
    _same_device(where, name, tensor, logits)
    if tensor.shape != leading:
        raise ValueError(f"{where}: {name} has shape {_shape(tensor)}; expected {list(leading)}, one value a token")


def integers_checked(where: str, name: str, tensor: Tensor) -> None:
    """Column numbers under any name."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where}: {name} is {type(tensor).__name__}; expected a torch.Tensor")
    # An unsigned one has no -100: that would be its 156.
    if tensor.is_floating_point() or tensor.is_complex() or not tensor.dtype.is_signed:
        raise TypeError(f"{where}: {name} has dtype {tensor.dtype}; expected int64 or int32")


def _same_device(where: str, name: str, tensor: Tensor, logits: Tensor) -> None:
    if tensor.device != logits.device:
        raise ValueError(f"{where}: {name} is on {tensor.device}; expected {logits.device} like logits")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
