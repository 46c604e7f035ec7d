"""Checks the arguments of the top-k functions and brings a teacher's log-probabilities to one form."""

from __future__ import annotations

import torch
from torch import Tensor

from kldiv_kernels import inputs

# How far a rounded log-probability, and a sum of rounded probabilities, can be from what they stand for.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
_ONCE = "which occurs before in its row"


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
    return ids


def each_once_checked(where: str, name: str, ids: Tensor, check: bool) -> None:
    if check:
        _refuse(where, name, ids, occur_before(ids) & (ids >= 0), _ONCE)


def teacher_checked(
    where: str, topk_ids: Tensor, topk_logprobs: Tensor, logits: Tensor, vocab_size: int | None, check: bool
) -> tuple[Tensor, Tensor]:
    """The teacher's tokens, each once in its row (-1 where there is none), and their log-probabilities.

    Both [*, K], int64 and float32 (float64 for float64), -inf where there is no id. An id of no mass beside the same id
    is a pad and is left out. Of an id with two log-probabilities nobody knows which is meant: an error with `check`,
    otherwise the row is NaN.
    """
    name = "topk_logprobs"
    ids = ids_checked(where, "topk_ids", topk_ids, logits, vocab_size, check)
    logprobs = _logprobs_checked(where, name, topk_logprobs, ids)
    pads, twice = _repeated(ids, logprobs)
    if check:
        _refuse(where, "topk_ids", ids, twice, _ONCE)
        rounding = _ROUNDING[topk_logprobs.dtype]
        _refuse(where, name, logprobs, ~(logprobs <= rounding), "expected at most 0")
        total = logprobs.double().exp().sum(-1)
        _refuse(where, f"the sum of exp({name})", total, total > 1 + rounding, "expected at most 1")
    return ids.masked_fill(pads, -1), logprobs.masked_fill(twice.any(-1, keepdim=True), torch.nan)


def mass_checked(where: str, logprobs: Tensor, counts: Tensor, tail: str) -> None:
    """Refuses a token that counts in a loss and whose k probabilities cannot be made to sum to 1."""
    total = logprobs.exp().sum(-1)
    empty = counts & (logprobs == -torch.inf).all(-1)
    expected = f"expected more than 0 with tail={tail!r}, unless the token is masked"
    _refuse(where, "the sum of exp(topk_logprobs)", total, empty, expected)


def _logprobs_checked(where: str, name: str, logprobs: Tensor, ids: Tensor) -> Tensor:
    """[*, K] in float32 (float64 for float64), -inf where there is no id."""
    if not isinstance(logprobs, Tensor):
        raise TypeError(f"{where}: {name} is {type(logprobs).__name__}; expected a torch.Tensor")
    if logprobs.dtype not in _ROUNDING:
        raise TypeError(f"{where}: {name} has dtype {logprobs.dtype}; expected float32, bfloat16 or float16")
    if logprobs.device != ids.device:
        raise ValueError(f"{where}: {name} is on {logprobs.device}; expected {ids.device} like logits")
    if logprobs.shape != ids.shape:
        raise ValueError(f"{where}: {name} has shape {list(logprobs.shape)}; expected {list(ids.shape)} like topk_ids")
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    return torch.where(ids >= 0, logprobs.detach().to(dtype), -torch.inf)


def occur_before(ids: Tensor) -> Tensor:
    """[*, K] bool: those that are in their row before."""
    ordered, order = ids.sort(dim=-1, stable=True)
    return _back(_as_the_one_before(ordered), order)


def _repeated(ids: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """[*, K] bool each: ids that have no mass and are there once more, ids with mass that occur before."""
    # Of equal ids, those without mass last.
    keys, order = (2 * ids + (logprobs == -torch.inf)).sort(dim=-1, stable=True)
    again = _as_the_one_before(keys.div(2, rounding_mode="floor")) & (keys >= 0)
    massless = keys % 2 == 1
    return _back(again & massless, order), _back(again & ~massless, order)


def _as_the_one_before(ordered: Tensor) -> Tensor:
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    return again


def _back(values: Tensor, order: Tensor) -> Tensor:
    return torch.zeros_like(values).scatter_(-1, order, values)


def tail_floor_checked(where: str, floor: float | None, tail: str, tail_logprob: Tensor | None) -> None:
    if floor is None:
        return
    if tail != "bucket":
        raise ValueError(f"{where}: tail_floor is given, but tail is {tail!r}; expected 'bucket'")
    if tail_logprob is not None:
        raise ValueError(f"{where}: tail_floor and tail_logprob are both given; expected one of them")
    if isinstance(floor, bool) or not isinstance(floor, (int, float)):
        raise TypeError(f"{where}: tail_floor is {type(floor).__name__}; expected a float")
    if not 0 <= floor < 1:
        raise ValueError(f"{where}: tail_floor is {floor}; expected at least 0 and below 1")


def tail_of(
    where: str, logprobs: Tensor, ids: Tensor, columns: int, *, given: torch.dtype, floor: float | None, check: bool
) -> Tensor:
    """log(1 − Σ p) [*] of log-probabilities [*, K] that were `given` in a dtype; float32 or float64.

    What is left of 1 is known to their rounding only, and is at least that (`floor` says otherwise):

        max(k·ε, ½ε'·Σ p |log p|)    ε of the arithmetic that they come from, ε' of the dtype

    the bounds of what rounding each p, and each log p, can make of Σ p. The second is next to 0 in a row whose mass is
    on one token: its log-probability is next to 0, and rounded as finely.

    -inf where the ids are the whole vocabulary, and what is left is rounding, of an outcome that the student does not
    have. Where it is more, that outcome has it: an error with `check`, since nobody means that.
    """
    mass = torch.where(ids >= 0, logprobs.double(), -torch.inf).exp()
    left, count = 1 - mass.sum(-1), (ids >= 0).sum(-1)
    whole, rounding = count >= columns, _ROUNDING[given]
    if check:
        wrong = whole & (left > rounding)
        _refuse(where, "the sum of exp(topk_logprobs)", 1 - left, wrong, "expected 1 where topk_ids has every token")
    if floor is None:
        arithmetic = torch.finfo(torch.promote_types(given, torch.float32)).eps
        least = torch.maximum(count * arithmetic, torch.finfo(given).eps / 2 * torch.special.entr(mass).sum(-1))
    else:
        least = torch.full_like(left, floor)
    rest = torch.maximum(left, least).log().to(torch.promote_types(logprobs.dtype, torch.float32))
    return rest.masked_fill(whole & (left <= rounding), -torch.inf)


def looks_at(values: Tensor, check: bool | None) -> bool:
    """Whether values are checked: as those of labels are, unless told otherwise."""
    return inputs.looks_at(values) if check is None else check and inputs.may_look_at(values)


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
