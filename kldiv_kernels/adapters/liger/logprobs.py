"""Liger's `fused_selective_log_softmax`: log-probabilities of completions, without gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from kldiv_kernels import inputs
from kldiv_kernels.stats import selective_log_softmax


@torch.no_grad()
def fused_selective_log_softmax(
    logits: Tensor, input_ids: Tensor, temperature: float = 0.9, mask: Tensor | None = None
) -> Tensor:
    """log softmax(logits / temperature) at the last L of the ids: old and reference log-probabilities. No gradient.

    Args:
        logits: [B, L + 1, V] raw; the last position is not read.
        input_ids: [B, L or more] integers, a prompt before the completion; the last L are looked up.
        temperature: default 0.9.
        mask: [B, L or more], 0 for tokens that are 0 in the result and not looked at.

    Returns:
        [B, L] float32 (float64 for float64 logits), in nats.

    Raises:
        TypeError, ValueError, IndexError: naming the argument, what it was and what is allowed.

    >>> logits, ids = torch.zeros(1, 3, 4), torch.tensor([[0, 0, 1, 2]])  # a prompt of two tokens
    >>> fused_selective_log_softmax(logits, ids, mask=torch.tensor([[1, 0]])).exp()
    tensor([[0.2500, 1.0000]])
    """
    where = "fused_selective_log_softmax"
    inputs.logits_checked(where, logits, "logits")
    if logits.dim() != 3 or logits.shape[1] < 1:
        raise ValueError(f"{where}: logits has shape {list(logits.shape)}; expected [B, L + 1, V]")
    predicting = logits[:, :-1]
    ids = _completion(where, "input_ids", input_ids, predicting, integers=True)
    valid = None if mask is None else _completion(where, "mask", mask, predicting, integers=False) != 0
    if valid is not None:
        ids = torch.where(valid, ids, 0)
    try:
        return selective_log_softmax(predicting, ids, temperature=temperature, mask=valid)
    except (IndexError, ValueError, TypeError) as error:
        message = str(error).replace("token_stats: labels", f"{where}: input_ids[:, -L:]")
        raise type(error)(message.replace("token_stats:", f"{where}:")) from None


def _completion(where: str, name: str, given: Tensor, predicting: Tensor, *, integers: bool) -> Tensor:
    """The last L columns of [B, L or more]."""
    batch, length = predicting.shape[:2]
    if not isinstance(given, Tensor):
        raise TypeError(f"{where}: {name} is {type(given).__name__}; expected a torch.Tensor")
    if given.dim() != 2 or given.shape[0] != batch or given.shape[1] < length:
        raise ValueError(
            f"{where}: {name} has shape {list(given.shape)}; expected [{batch}, {length} or more], the completion last"
        )
    last = given[:, given.shape[1] - length :]
    inputs.per_token_checked(where, name, last, predicting, integers=integers)
    return last
