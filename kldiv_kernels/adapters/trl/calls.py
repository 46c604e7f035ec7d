"""Which calls of TRL's functions this library serves; the others go to TRL's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kldiv_kernels.choices import Backend

_SERVED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def bound(original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `original`, by name, with its defaults."""
    call = _signature(original).bind(*args, **kwargs)
    call.apply_defaults()
    return dict(call.arguments)


@lru_cache(maxsize=64)
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def is_served(*logits: Tensor) -> bool:
    """Whether these are rows that the kernels read where they are, all of one shape and device."""
    first = logits[0]
    return all(
        x.dtype in _SERVED
        and x.dim() > 0
        and x.numel() > 0
        and x.stride(-1) == 1
        and x.shape == first.shape
        and x.device == first.device
        for x in logits
    )


def backend_for(backend: Backend, logits: Tensor) -> Backend:
    """float64, which the compiled kernels do not have, goes to the backend that has it."""
    return "reference" if logits.dtype == torch.float64 else backend


def dtype_of(*logits: Tensor) -> torch.dtype:
    """The dtype in which TRL's formulas end, written in PyTorch."""
    dtype = logits[0].dtype
    for x in logits[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype
