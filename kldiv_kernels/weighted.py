"""A weighted sum of several statistics whose weights are known beforehand: values and gradient from one pass."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kldiv_kernels import autograd, inputs
from kldiv_kernels.losses import token_scale
from kldiv_kernels.sources import Source


def weighted_sum_of(
    where: str,
    source: Source,
    labels: Tensor | None,
    weights: Mapping[str, float],
    *,
    mask: Tensor | None,
    normalizer: float | Tensor | None,
    temperature: float = 1.0,
    alpha: float = 0.5,
    beta: float = 0.5,
    vocab_size: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Σ over valid tokens of Σ_s weights[s] · s, divided by `normalizer`, and all s [statistics, N], without gradient.

    For arguments see `token_stats`. A token whose label is no token is to be left out by the mask.
    """
    logits = source.logits
    call = inputs.prepare(
        where, logits, source.reference, labels, stats=inputs.statistics(weights, where), temperature=temperature,
        reference_temperature=None, alpha=alpha, beta=beta, mask=mask, ignore_index=-100, vocab_size=vocab_size,
        exclude=None,
    )  # fmt: skip
    chosen = inputs.select(call, backend, where)
    scale = token_scale(where, logits, None, call.mask, normalizer, "mean", None)
    coefficients = torch.stack([weight * scale for weight in weights.values()])
    if source.known_beforehand(where, None, call, chosen):
        return source.loss(call, chosen, coefficients)
    values = source.statistics(call, chosen)
    return autograd.weighted_sum(coefficients, values), values.detach()
