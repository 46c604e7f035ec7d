"""What two models, or a model and a step, do to the predictions: measures, without gradient.

q and p: the softmaxes of `logits` and of the other logits. In nats, where nothing else is said.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kldiv_kernels import inputs
from kldiv_kernels.choices import Backend, Tail
from kldiv_kernels.losses import divergence_loss
from kldiv_kernels.recipes.checks import alike_checked, of_tokens_checked
from kldiv_kernels.recipes.recipe import Recipe
from kldiv_kernels.recipes.reductions import segment_mean, valid_rows, widened
from kldiv_kernels.stats import token_stats
from kldiv_kernels.top_k import topk_divergence_loss

PAPERS = (
    Recipe(
        6, "Drift", "Drift No More? Context Equilibria in Multi-Turn LLM Interactions", 2025,
        ("turn_divergence", "topk_turn_divergence"), "f", "restated",
        differs="Seen in summaries. What the paper does with the mass outside of an API's top k was not seen: tail has "
        "no default.",
    ),
    Recipe(
        9, "RepE reasoning",
        "Improving Reasoning Performance in Large Language Models via Representation Engineering", 2025,
        ("intervention_divergence",), "f", "code", link="github.com/bertramhojer/repana",
        differs="The code adds 1e-8 inside of the logarithms, which takes 0.002 bits from the entropy of 151,936 equal "
        "tokens; here both are exact.",
    ),
    Recipe(
        45, "Ghosts of Softmax",
        "Ghosts of Softmax: Complex Singularities That Limit Safe Step Sizes in Cross-Entropy", 2026,
        ("logit_range_and_variance", "step_radius"), "torch", "code", link="github.com/piyush314/ghosts-of-softmax",
        differs="The abstract has lost the sign of the root. The controller that keeps a step within the radius is the "
        "caller's: the least radius of a batch, or that of its mean range.",
    ),
)  # fmt: skip


@torch.no_grad()
def turn_divergence(
    logits: Tensor,
    reference_logits: Tensor,
    turns: Tensor,
    count: int,
    *,
    kind: Literal["reverse_kl", "forward_kl", "js"] = "reverse_kl",
    mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    r"""The mean KL(q‖p) over the tokens of each turn of a conversation, [B, count]; paper 6 (Drift No More?).

    q: the model. p: a reference that keeps to the goal, after the same text. 0 for a turn without tokens.

    Args:
        logits, reference_logits: [B, T, V]. turns: [B, T] integers, the token's turn, −1 where it has none.
        count: the number of turns. kind: of the divergence. mask: [B, T]. options: of `kk.divergence_loss`.

    >>> import torch, kldiv_kernels as kk
    >>> s, t = torch.tensor([[[2.0, 0.5, -1.0, 0.0]]]), torch.tensor([[[1.0, 1.5, -0.5, 0.0]]])
    >>> kk.recipes.turn_divergence(s, t, torch.tensor([[1]]), 2)
    tensor([[0.0000, 0.3671]])
    """
    counted = _turns_checked("turn_divergence", logits, turns, mask, count)
    values = divergence_loss(logits, reference_logits, kind, mask=counted >= 0, reduction="none", **options)
    return segment_mean(values, counted, count)


@torch.no_grad()
def topk_turn_divergence(
    logits: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    turns: Tensor,
    count: int,
    *,
    tail: Tail,
    kind: Literal["reverse_kl", "forward_kl", "js"] = "reverse_kl",
    mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    r"""`turn_divergence` where the reference is known by its k largest log-probabilities a token, as APIs give them.

    Args:
        logits: [B, T, V]. topk_ids, topk_logprobs: [B, T, k]. turns, count, kind, mask: see `turn_divergence`.
        tail: "bucket" makes one outcome of all other tokens, "renormalize" leaves them out of both models. Which of
            them the paper has was not seen.
        options: of `kk.topk_divergence_loss`.

    >>> import torch, kldiv_kernels as kk
    >>> s, ids = torch.tensor([[[2.0, 0.5, -1.0, 0.0]]]), torch.tensor([[[1]]])
    >>> kk.recipes.topk_turn_divergence(s, ids, torch.tensor([[[0.5]]]).log(), torch.tensor([[0]]), 1, tail="bucket")
    tensor([[0.2561]])
    """
    counted = _turns_checked("topk_turn_divergence", logits, turns, mask, count)
    if topk_ids.dim() != 3 or topk_ids.shape[:2] != turns.shape or topk_logprobs.shape != topk_ids.shape:
        raise ValueError(
            f"topk_turn_divergence: topk_ids has shape {list(topk_ids.shape)} and topk_logprobs "
            f"{list(topk_logprobs.shape)}; expected [B, T, k] with turns {list(turns.shape)}"
        )
    valid, k = counted >= 0, topk_ids.shape[-1]
    # A masked token's ids and log-probabilities may be anything.
    ids = torch.where(valid[..., None], topk_ids, torch.arange(k, device=topk_ids.device))
    logprobs = torch.where(valid[..., None], topk_logprobs, -math.log(k + 1))
    values = topk_divergence_loss(logits, ids, logprobs, kind, tail=tail, mask=valid, reduction="none", **options)
    return segment_mean(values, counted, count)


class InterventionDivergence(NamedTuple):
    """KL(p‖q) in nats and H(q) in bits of each token, [*]."""

    forward_kl: Tensor
    entropy_bits: Tensor


@torch.no_grad()
def intervention_divergence(
    logits: Tensor,
    original_logits: Tensor,
    *,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> InterventionDivergence:
    r"""KL(p‖q) in nats and H(q) in bits: what an intervention does to a model's predictions; paper 9, of one read.

    Args: logits: [*, V], of the model with the intervention, q. original_logits: without it, p. The paper takes the
    first generated token of each prompt. mask, vocab_size, backend: see `kk.token_stats`.

    >>> import torch, kldiv_kernels as kk
    >>> s, t = torch.tensor([[2.0, 0.5, -1.0, 0.0]]), torch.tensor([[1.0, 1.5, -0.5, 0.0]])
    >>> [round(x.item(), 4) for x in kk.recipes.intervention_divergence(s, t)]
    [0.4015, 1.2671]
    """
    stats = token_stats(
        logits, original_logits, stats=("forward_kl", "entropy"), mask=mask, vocab_size=vocab_size, backend=backend
    )
    return InterventionDivergence(stats.forward_kl, stats.entropy / math.log(2))


class RangeAndVariance(NamedTuple):
    """Δ = max − min of a tangent over the classes, and its variance under q; [*]."""

    range: Tensor
    variance: Tensor


@torch.no_grad()
def logit_range_and_variance(logits: Tensor, tangent: Tensor) -> RangeAndVariance:
    r"""Δ = max a − min a, and Var_q(a), of a tangent a of the logits; paper 45 (Ghosts of Softmax).

    After a step τ along it, |KL(q_0‖q_τ) − ½τ²·Var_q(a)| ≤ |τ|³Δ³/(36√3).

    Args: logits, tangent: [*, V], a = J·v by `torch.func.jvp` for an update v of the weights. Columns of −inf (−1e30 or
    below) in the logits do not count.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.logit_range_and_variance(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]))
    RangeAndVariance(range=tensor([2.]), variance=tensor([1.]))
    """
    alike_checked("logit_range_and_variance", logits, tangent=tangent)
    rows, a = widened(logits), widened(tangent)
    there = rows > -1e30
    lowest, highest = (torch.where(there, a, end) for end in (torch.inf, -torch.inf))
    a = torch.where(there, a, 0.0)
    q = torch.where(there, rows, -torch.inf).softmax(-1)
    mean = (q * a).sum(-1, keepdim=True)
    return RangeAndVariance(highest.amax(-1) - lowest.amin(-1), (q * (a - mean).square()).sum(-1))


def step_radius(logit_range: Tensor, gap: Tensor | None = None) -> Tensor:
    r"""π/Δ, or √(δ² + π²)/Δ: how far a step may go before the series of the cross-entropy diverges; paper 45; [*].

    Args: logit_range: [*], Δ, of `logit_range_and_variance`; 0 has no limit, and gives inf. gap: [*], δ, the difference
    of the two logits of a binary classifier, for which the radius is exact; without it π/Δ is a lower bound.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.step_radius(torch.tensor([2.0]), torch.tensor([1.3]))
    tensor([1.7000])
    """
    if gap is None:
        return math.pi / logit_range
    of_tokens_checked(logit_range, gap=gap)
    return (gap.square() + math.pi**2).sqrt() / logit_range


def _turns_checked(where: str, logits: Tensor, turns: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """The turn of each token, −1 where it does not count. ValueError for shapes and turns that do not fit."""
    if logits.dim() != 3 or turns.shape != logits.shape[:2]:
        raise ValueError(
            f"{where}: turns has shape {list(turns.shape)} with logits {list(logits.shape)}; expected [B, T] with "
            "[B, T, V]"
        )
    if count < 1:
        raise ValueError(f"{where}: count is {count}; expected 1 or more")
    counted = torch.where(valid_rows(logits, None, mask), turns, -1)
    if inputs.looks_at(counted) and bool((counted >= count).any()):
        raise ValueError(
            f"{where}: turns has {int(counted.max())}; expected 0 to {count - 1} with count = {count}, or -1 for none"
        )
    return counted
