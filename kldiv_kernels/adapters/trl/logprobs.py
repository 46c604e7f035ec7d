"""TRL's `selective_log_softmax`, `entropy_from_logits` and both at once, from one read of each row.

Exact with logits at −inf, where TRL's entropy is NaN. The dtype is TRL's: float32 where it would run its Triton kernel,
otherwise that of the logits, to which the float32 result is rounded once (TRL computes in it). No double backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kldiv_kernels.adapters.trl.calls import backend_for, bound, is_served
from kldiv_kernels.choices import Backend
from kldiv_kernels.stats import entropy, token_stats

# What TRL's Triton kernel serves, and returns in float32.
_KERNEL_DEVICES = ("cuda", "xpu")


def selective_log_softmax(original: Callable[..., Tensor], backend: Backend) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Tensor:
        call = bound(original, args, kwargs)
        logits, index, mask = call["logits"], call["index"], call["row_mask"]
        if not (is_served(logits) and _is_index(index, logits) and _is_row_mask(mask, logits) and _is_positive(call)):
            return original(*args, **kwargs)
        logprob = token_stats(
            logits, labels=index, stats=("logprob",), temperature=call["temperature"],
            mask=None if mask is None else mask != 0, backend=backend_for(backend, logits),
        ).logprob  # fmt: skip
        return _as_trl(logprob, logits, one_a_row=index.shape == logits.shape[:-1])

    return replaced


def entropy_from_logits(original: Callable[..., Tensor], backend: Backend) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Tensor:
        logits = bound(original, args, kwargs)["logits"]
        if not is_served(logits):
            return original(*args, **kwargs)
        return _as_trl(entropy(logits, backend=backend_for(backend, logits)), logits)

    return replaced


def selective_log_softmax_and_entropy(
    original: Callable[..., tuple[Tensor, Tensor]], backend: Backend
) -> Callable[..., tuple[Tensor, Tensor]]:
    @functools.wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        call = bound(original, args, kwargs)
        logits, index, mask = call["logits"], call["index"], call["row_mask"]
        one_a_row = index.shape == logits.shape[:-1]
        if not (is_served(logits) and one_a_row and _is_row_mask(mask, logits) and _is_positive(call)):
            return original(*args, **kwargs)
        stats = token_stats(
            logits, labels=index, temperature=call["temperature"], mask=None if mask is None else mask != 0,
            backend=backend_for(backend, logits),
        )  # fmt: skip
        entropies = stats.entropy if call["entropy_requires_grad"] else stats.entropy.detach()
        return _as_trl(stats.logprob, logits), _as_trl(entropies, logits)

    return replaced


def _is_positive(call: dict[str, Any]) -> bool:
    """TRL's own error is for a temperature that is not."""
    return bool(call["temperature"] > 0)


def _is_index(index: Tensor, logits: Tensor) -> bool:
    return index.shape == logits.shape[:-1] or (index.dim() == logits.dim() and index.shape[:-1] == logits.shape[:-1])


def _is_row_mask(mask: Tensor | None, logits: Tensor) -> bool:
    return mask is None or mask.shape == logits.shape[:-1]


def _as_trl(values: Tensor, logits: Tensor, one_a_row: bool = True) -> Tensor:
    in_float32 = (
        logits.device.type in _KERNEL_DEVICES and logits.dtype != torch.float64 and logits.dim() <= 3 and one_a_row
    )
    return values if in_float32 else values.to(logits.dtype)
