"""Checks the arguments of the top-k functions and brings a teacher's log-probabilities to one form."""

from __future__ import annotations

import torch
from torch import Tensor

from kldiv_kernels import inputs

# How far a rounded log-probability, and a sum of rounded probabilities, can be above what they stand for.
_ABOVE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


def ids_checked(where: str, name: str, ids: Tensor, logits: Tensor, vocab_size: int | None, check: bool) -> Tensor:
    """[*, K] int64, -1 where there is none. With `check` the values are looked at, which waits for the device."""
    leading, columns = logits.shape[:-1], inputs.shared_columns(where, logits, None, vocab_size)
    if not isinstance(ids, Tensor):
        raise TypeError(f"{where}: {name} is {type(ids).__name__}; expected a torch.Tensor")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{where}: {name} has dtype {ids.dtype}; expected int64 or int32")
    if ids.device != logits.device:
        raise ValueError(f"{where}: {name} is on {ids.device}; expected {logits.device} like logits")
    if ids.shape[:-1] != leading or ids.dim() != logits.dim() or ids.shape[-1] < 1:
        raise ValueError(f"{where}: {name} has shape {list(ids.shape)}; expected {[*leading, 'K']} with K >= 1")
    if ids.shape[-1] > columns:
        raise ValueError(f"{where}: {name} has K = {ids.shape[-1]}; expected at most {columns}, the vocabulary size")
    ids = ids.to(torch.int64)
    if check:
        _refuse(where, name, ids, (ids < -1) | (ids >= columns), f"expected 0 to {columns - 1}, or -1 for none")
        _refuse(where, name, ids, occur_before(ids) & (ids >= 0), "which occurs before in its row")
    return ids


def logprobs_checked(where: str, name: str, logprobs: Tensor, ids: Tensor, check: bool) -> Tensor:
    """[*, K] in float32 (float64 for float64), -inf where there is no id."""
    if not isinstance(logprobs, Tensor):
        raise TypeError(f"{where}: {name} is {type(logprobs).__name__}; expected a torch.Tensor")
    if logprobs.dtype not in _ABOVE:
        raise TypeError(f"{where}: {name} has dtype {logprobs.dtype}; expected float32, bfloat16 or float16")
    if logprobs.device != ids.device:
        raise ValueError(f"{where}: {name} is on {logprobs.device}; expected {ids.device} like logits")
    if logprobs.shape != ids.shape:
        raise ValueError(f"{where}: {name} has shape {list(logprobs.shape)}; expected {list(ids.shape)} like topk_ids")
    above = _ABOVE[logprobs.dtype]
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    logprobs = torch.where(ids >= 0, logprobs.detach().to(dtype), -torch.inf)
    if check:
        _refuse(where, name, logprobs, ~(logprobs <= above), "expected at most 0")
        total = logprobs.double().exp().sum(-1)
        _refuse(where, f"the sum of exp({name})", total, total > 1 + above, "expected at most 1")
    return logprobs


def occur_before(ids: Tensor) -> Tensor:
    """[*, K] bool: those that are in their row before."""
    ordered, order = ids.sort(dim=-1, stable=True)
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    return torch.zeros_like(again).scatter_(-1, order, again)


def tail_of(logprobs: Tensor, ids: Tensor, columns: int) -> Tensor:
    """log(1 − Σ exp(logprobs)) [*], float32 or float64, -inf where nothing is left.

    Of a whole vocabulary 1 − Σ is rounding, on an outcome that the student does not have.
    """
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    captured = torch.where(ids >= 0, logprobs.double(), -torch.inf).exp().sum(-1)
    rest = torch.log1p(-captured.clamp(max=1)).to(dtype)
    return rest.masked_fill((ids >= 0).sum(-1) >= columns, -torch.inf)


def looks_at(values: Tensor, check: bool | None) -> bool:
    """Whether values are checked: unless told otherwise on the CPU, where that waits for nothing."""
    if not inputs.may_look_at(values):
        return False
    return values.device.type == "cpu" if check is None else check


def masked(mask: Tensor | None, labels: Tensor | None, ignore_index: int, logits: Tensor, where: str) -> Tensor | None:
    """[*] bool: the tokens of a loss."""
    leading = logits.shape[:-1]
    inputs.label_mask_checked(where, labels, logits)
    flat = inputs.valid_tokens(inputs.mask_checked(where, mask, logits, leading), labels, ignore_index)
    return None if flat is None else flat.reshape(leading)


def _refuse(where: str, name: str, values: Tensor, wrong: Tensor, expected: str) -> None:
    if bool(wrong.any()):
        first = wrong.nonzero()[0].tolist()
        value = values[tuple(first)].item()
        raise ValueError(f"{where}: {name}{first} is {value:g}; {expected}")
