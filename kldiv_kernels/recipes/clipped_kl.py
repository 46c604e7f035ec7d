"""KL divergences whose terms over the vocabulary are clipped, as statistics of the registry.

`clipped_forward_kl` and `clipped_reverse_kl` are registered when they are first needed, not by an import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from kldiv_kernels.registry import STATISTICS, register_statistic
from kldiv_kernels.stats import token_stats
from kldiv_kernels.tracing import constant


def clipped_divergence_rows(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    kind: Literal["forward_kl", "reverse_kl"],
    clip: float = 0.05,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    r"""Σ_v min(e_v, clip) per token, e_v = p_v(log p_v − log q_v), or q_v(log q_v − log p_v) for "reverse_kl"; [*].

    The KL of paper 29 (TRACE) with its entries clipped from above, which is derived: it may be below 0, and p = q is
    not its optimum. A clipped entry has no gradient, and neither has the teacher.

    It registers the statistic `clipped_forward_kl` or `clipped_reverse_kl`, once, when it is first called. No kernel
    has them: they are plain PyTorch on the rows that the mask has, on any device.

    Args: logits, teacher_logits: [*, V]. clip: above 0. mask, temperature, vocab_size: see `kk.token_stats`.

    >>> import torch, kldiv_kernels as kk
    >>> s, t = torch.tensor([[2.0, 0.5, -1.0, 0.0]]), torch.tensor([[1.0, 1.5, -0.5, 0.0]])
    >>> kk.recipes.clipped_divergence_rows(s, t, kind="forward_kl")
    tensor([-0.1423])
    """
    if kind not in ("forward_kl", "reverse_kl"):
        raise ValueError(f"clipped_divergence_rows: kind is {kind!r}; expected forward_kl or reverse_kl")
    if not clip > 0:
        raise ValueError(f"clipped_divergence_rows: clip is {clip}; expected a number above 0")
    name = _registered(kind)
    return token_stats(
        logits, teacher_logits.detach(), stats=(name,), alpha=clip, mask=mask, temperature=temperature,
        vocab_size=vocab_size, backend="reference",
    )[name]  # fmt: skip


def _term(log_weight: Tensor, log_other: Tensor) -> Tensor:
    """w·(log w − log other); 0 for a column without mass, where the difference may be that of two infinite logs."""
    weight = log_weight.exp()
    return weight * torch.where(weight > 0, log_weight - log_other, 0.0)


def _forward_value(logp: Tensor, logq: Tensor, alpha: Tensor) -> Tensor:
    return _term(logp, logq).minimum(alpha)


def _forward_grad_logq(logp: Tensor, logq: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(_term(logp, logq) <= alpha, -logp.exp(), 0.0)


def _forward_grad_logp(logp: Tensor, logq: Tensor, alpha: Tensor) -> Tensor:
    term = _term(logp, logq)
    return torch.where(term <= alpha, term + logp.exp(), 0.0)


def _swapped(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def of_the_other(logp: Tensor, logq: Tensor, alpha: Tensor) -> Tensor:
        return function(logq, logp, alpha)

    return of_the_other


@constant
def _registered(kind: str) -> str:
    """The name of the statistic, which is registered unless it already is."""
    name = f"clipped_{kind}"
    if name not in STATISTICS:
        value, by_weight, by_other = _forward_value, _forward_grad_logp, _forward_grad_logq
        if kind == "forward_kl":
            register_statistic(
                name, value=value, grad_logq=by_other, grad_logp=by_weight, formula="Σ min(p (log p − log q), α)"
            )
        else:
            register_statistic(
                name, value=_swapped(value), grad_logq=_swapped(by_weight), grad_logp=_swapped(by_other),
                formula="Σ min(q (log q − log p), α)",
            )  # fmt: skip
    return name
