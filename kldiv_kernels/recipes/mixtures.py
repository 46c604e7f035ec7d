"""Combinations of logits and of weights, the mean of a batch's softmaxes, and Gaussians."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kldiv_kernels.recipes.reductions import tempered_softmax, widened


@torch.no_grad()
def mix_logits(*terms: tuple[float | Tensor, Tensor]) -> Tensor:
    """Σ w·logits of (w, logits) pairs, in float32 (float64 for float64 logits), without gradient.

    Its softmax is the product of the softmaxes, each to the power w, over its sum.

    Args: each w a number or [*], each logits [*, V]. Where w is 0 the logits are not looked at. A column of −inf is
    −inf in the result, also beside a negative w: what one model leaves out stays out.

    Raises ValueError without a term.

    >>> mix_logits((-0.5, torch.tensor([1.0, -torch.inf])), (1.5, torch.tensor([2.0, 0.0])))
    tensor([2.5000,   -inf])
    """
    if not terms:
        raise ValueError("mix_logits: there is no term; expected one or more pairs (weight, logits)")
    parts = []
    for weight, logits in terms:
        x = widened(logits)
        w = weight[..., None].to(x.dtype) if isinstance(weight, Tensor) else x.new_full((), weight)
        # −inf times a negative weight would be +inf.
        parts.append(torch.where(w == 0, 0.0, torch.where(x == -torch.inf, x, w * x)))
    total = parts[0]
    for part in parts[1:]:
        total = torch.where((total == -torch.inf) | (part == -torch.inf), -torch.inf, total + part)
    return total


def batch_marginal(logits: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """The mean of softmax(logits/temperature) over all rows that the mask has, [V], with gradient; 0 without one.

    Makes tensors of [N, V] in PyTorch: for classifiers.

    Args: logits: [*, V] with one or more leading dimensions. mask: [*].

    >>> batch_marginal(torch.tensor([[0.0, 0.0], [9.0, 0.0]]), torch.tensor([True, False]))
    tensor([0.5000, 0.5000])
    """
    rows = widened(logits).flatten(end_dim=-2)
    kept = torch.ones_like(rows[:, :1], dtype=torch.bool) if mask is None else (mask != 0).reshape(-1, 1)
    probabilities = tempered_softmax(torch.where(kept, rows, 0.0), temperature)
    return torch.where(kept, probabilities, 0.0).sum(0) / kept.sum().clamp_min(1)


def gaussian_kl(
    mean: Tensor, log_variance: Tensor, other_mean: Tensor | None = None, other_log_variance: Tensor | None = None
) -> Tensor:
    """KL(N(μ, σ²) ‖ N(μ', σ'²)) of diagonal Gaussians, summed over the last dimension, in nats, with all gradients.

    Σ ½[(μ − μ')²/σ'² + σ²/σ'² − 1 − log σ²/σ'²].

    Args: each [*, D], or of a shape that broadcasts to it; the variances as logarithms. The other Gaussian is the
    standard one, mean 0 and variance 1, where nothing else is given.

    Returns [*].

    >>> gaussian_kl(torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2))
    tensor([2.])
    """
    apart = mean if other_mean is None else mean - other_mean
    log_ratio = log_variance if other_log_variance is None else log_variance - other_log_variance
    square = apart.square() if other_log_variance is None else apart.square() * (-other_log_variance).exp()
    # Not e^x − 1 − x, which has no digits left where the variances are close.
    return 0.5 * (square + torch.expm1(log_ratio) - log_ratio).sum(-1)


@torch.no_grad()
def average_weights(
    models: Sequence[nn.Module | Mapping[str, Tensor]], weights: Sequence[float] = (0.5, 0.5)
) -> dict[str, Tensor]:
    """Σ w·θ of models of one architecture, as a state dict: a reference between fine-tuned models; paper 18 (SALSA).

    Args: models: modules or their state dicts. weights: one each, with the sum 1; the middle of two is the paper's.

    Returns new tensors, in the dtypes of the first model, summed in float32 at least; what is no floating point, such
    as a counter, is the first model's. Raises ValueError for models of other tensors, and for other weights.

    >>> average_weights([{"w": torch.tensor([0.0])}, {"w": torch.tensor([1.0])}], (0.25, 0.75))
    {'w': tensor([0.7500])}
    """
    states = [model.state_dict() if isinstance(model, nn.Module) else model for model in models]
    if len(states) != len(weights) or not states or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(
            f"average_weights: weights is {list(weights)} for {len(states)} models; expected one each, with the sum 1"
        )
    for number, state in enumerate(states[1:], 1):
        if {name: x.shape for name, x in state.items()} != {name: x.shape for name, x in states[0].items()}:
            raise ValueError(f"average_weights: model {number} has other tensors than model 0; expected the same")
    out = {}
    for name, first in states[0].items():
        if not first.is_floating_point():
            out[name] = first.clone()
            continue
        total = torch.zeros_like(widened(first))
        for weight, state in zip(weights, states, strict=True):
            total += weight * state[name].to(total)
        out[name] = total.to(first.dtype)
    return out
