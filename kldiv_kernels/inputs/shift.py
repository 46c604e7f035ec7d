"""What is given for tokens, moved to the rows of logits that predict them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def shifted(
    where: str,
    shift: bool,
    logits: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    **others: Any,
) -> tuple[Tensor | None, ...]:
    """(labels, mask, others...) of logits [..., tokens, V]: row t gets those of token t + 1, the last row is masked.

    `others` are (tensor, what stands for none) by name. Without `shift` all are returned as they are.
    """
    if not isinstance(shift, bool):
        raise TypeError(f"{where}: shift is {shift!r}; expected True or False")
    if not shift:
        return (labels, mask, *(tensor for tensor, _ in others.values()))
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{where}: shift is True, but logits has shape {found}; expected [..., tokens, vocab]")
    leading = logits.shape[:-1]
    if mask is None:
        mask = torch.ones(leading, dtype=torch.bool, device=logits.device)
    given = {"labels": (labels, ignore_index), "mask": (mask, 0), **others}
    return tuple(_moved(where, name, tensor, fill, leading) for name, (tensor, fill) in given.items())


def _moved(where: str, name: str, tensor: Tensor | None, fill: int, leading: torch.Size) -> Tensor | None:
    if tensor is None:
        return None
    # Labels may be K a token, [..., tokens, K].
    if not isinstance(tensor, Tensor) or (tensor.shape != leading and tensor.shape[:-1] != leading):
        found = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{where}: {name} has shape {found}; expected {list(leading)}, one a token, before the shift")
    dim = len(leading) - 1
    last = torch.full_like(tensor.narrow(dim, 0, min(1, tensor.shape[dim])), fill)
    return torch.cat([tensor.narrow(dim, 1, max(0, tensor.shape[dim] - 1)), last], dim)
