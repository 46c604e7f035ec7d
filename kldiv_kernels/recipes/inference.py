"""Logits of two models, or of one with and without context, combined at decoding. Nothing here has a gradient.

H: the entropy, in nats. A column of −inf stays −inf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kldiv_kernels.choices import Backend
from kldiv_kernels.recipes.checks import alike_checked, of_rows_checked
from kldiv_kernels.recipes.mixtures import mix_logits
from kldiv_kernels.recipes.recipe import Recipe
from kldiv_kernels.recipes.reductions import widened
from kldiv_kernels.stats import token_stats

PAPERS = (
    Recipe(
        38, "CK-PLUG", "Parameters vs. Context: Fine-Grained Control of Knowledge Reliance in Language Models", 2025,
        ("knowledge_gain", "ck_plug_logits"), "torch", "code", link="github.com/byronBBL/CK-PLUG",
        differs="The code leaves tokens out before it takes entropies, has the condition H_para < 2·H_ctx in place of "
        "a gain below the threshold, and other adaptive weights: form='code'. The paper's gain is in bits.",
    ),
    Recipe(
        67, "RLG", "Inference-Time Alignment Control for Diffusion Models with Reinforcement Learning Guidance", 2026,
        ("guided_logits",), "torch", "code", link="github.com/jinluo12345/Reinforcement-learning-guidance",
        differs="The paper's are scores or velocities, which this function takes too.",
    ),
    Recipe(
        88, "Dynamic logits fusion",
        "On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion", 2024,
        ("fused_logits",), "torch", "derived",
        differs="The sum of the logits was seen in a review; objective and grid are recalled, and the code is not "
        "released. Several pairs of small models, for which the paper adds up such terms, are left out.",
    ),
)  # fmt: skip
GRID = tuple(step / 10 for step in range(21))


@torch.no_grad()
def knowledge_gain(parametric_logits: Tensor, context_logits: Tensor, *, backend: Backend = "auto") -> Tensor:
    r"""H(p_para) − H(p_ctx), [*]: how much surer a model is with retrieved text; paper 38 (CK-PLUG), of one read.

    Args: parametric_logits, context_logits: [*, V], after the question alone, and after text and question.

    >>> import torch, kldiv_kernels as kk
    >>> s, t = torch.tensor([[2.0, 0.5, -1.0, 0.0]]), torch.tensor([[1.0, 1.5, -0.5, 0.0]])
    >>> kk.recipes.knowledge_gain(s, t)
    tensor([-0.2596])
    """
    stats = token_stats(parametric_logits, context_logits, stats=("entropy", "reference_entropy"), backend=backend)
    return stats.entropy - stats.reference_entropy


@torch.no_grad()
def ck_plug_logits(
    parametric_logits: Tensor,
    context_logits: Tensor,
    *,
    alpha: float | None = None,
    threshold: float = 0.0,
    k: int = 10,
    relative: float = 0.01,
    form: Literal["paper", "code"] = "paper",
    backend: Backend = "auto",
) -> Tensor:
    r"""Logits [*, V] that lean on what the model knows where retrieved text confuses it; paper 38 (CK-PLUG).

    Where `knowledge_gain` is below the threshold: α·para + (1 − α)·(context − para), and −inf for every token that
    neither side finds plausible. Elsewhere the context's logits. α = ½ is softmax(context/2).

    Args:
        parametric_logits, context_logits: [*, V], see `knowledge_gain`.
        alpha: None is H_ctx/(H_para + H_ctx) of each token. threshold: in nats; the paper's, in bits, are 0, or −1 to
            −3 by model.
        k, relative: a side finds plausible its k likeliest tokens and those with `relative` of the likeliest's
            probability. relative=0 leaves none out.
        form: "code" leaves tokens out first, so that entropies are those of the rest, asks for H_para < 2·H_ctx (no
            threshold), and weighs by 2H_ctx and 2H_para, over H_ctx + n·H_para, n = 1 + |H_ctx − H_para|/(H_ctx +
            H_para), where alpha is None.
        backend: see `kk.token_stats`.

    Returns: logits in float32. Raises ValueError for a threshold with form="code".

    >>> import torch, kldiv_kernels as kk
    >>> s, t = torch.tensor([[2.0, 0.5, -1.0, 0.0]]), torch.tensor([[1.0, 1.5, -0.5, 0.0]])
    >>> kk.recipes.ck_plug_logits(s, t).log_softmax(-1)
    tensor([[-1.0573, -1.0326, -2.0970, -1.7504]])
    """
    if form not in ("paper", "code"):
        raise ValueError(f"ck_plug_logits: form is {form!r}; expected paper or code")
    if form == "code" and threshold != 0:
        raise ValueError(f"ck_plug_logits: threshold is {threshold} with form='code', which has none; expected 0")
    if k < 1 or not 0 <= relative <= 1:
        raise ValueError(f"ck_plug_logits: k is {k} and relative is {relative}; expected 1 or more, and 0 to 1")
    alike_checked("ck_plug_logits", parametric_logits, context_logits=context_logits)
    own, context = widened(parametric_logits), widened(context_logits)
    kept = _plausible(own, k, relative) | _plausible(context, k, relative)
    seen = [torch.where(kept, x, -torch.inf) for x in (own, context)] if form == "code" else [own, context]
    stats = token_stats(*seen, stats=("entropy", "reference_entropy"), backend=backend)
    h_own, h_context = (x.to(own.dtype) for x in (stats.entropy, stats.reference_entropy))
    total = h_own + h_context
    # Two certain sides have no entropies to weigh by.
    total = torch.where(total > 0, total, 1.0)
    if alpha is not None:
        by_own, by_context = torch.full_like(total, 2 * alpha - 1), torch.full_like(total, 1 - alpha)
    elif form == "paper":
        share = h_context / total
        by_own, by_context = 2 * share - 1, 1 - share
    else:
        norm = h_context + (1 + (h_context - h_own).abs() / total) * h_own
        norm = torch.where(norm > 0, norm, 1.0)
        by_own, by_context = 2 * (h_context - h_own) / norm, 2 * h_own / norm
    conflict = h_own - h_context < threshold if form == "paper" else h_own < 2 * h_context
    mixed = torch.where(kept, mix_logits((by_own, own), (by_context, context)), -torch.inf)
    return torch.where(conflict[..., None], mixed, context)


def guided_logits(base: Tensor, tuned: Tensor, *, weight: float | Tensor) -> Tensor:
    r"""(1 − w)·base + w·tuned, [*, V]: a model after RL, or beyond it, without training; paper 67 (RLG).

    Its softmax is ∝ base^{1−w}·tuned^w. Where tuned ∝ base·e^{r/β} that is base·e^{wr/β}: w divides the coefficient of
    the KL penalty. Scores and velocities combine in the same way.

    Args: base, tuned: [*, V], logits before and after. weight: w, a number or [*]; 1 to 3 in the paper.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.guided_logits(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]), weight=2.0)
    tensor([2., 1.])
    """
    alike_checked("guided_logits", base, tuned=tuned)
    if isinstance(weight, Tensor):
        of_rows_checked("guided_logits", base, weight=weight)
    return mix_logits((1 - weight, base), (weight, tuned))


class FusedLogits(NamedTuple):
    """The weight of each token [*], and the fused logits [*, V]."""

    weight: Tensor
    logits: Tensor


@torch.no_grad()
def fused_logits(
    logits: Tensor,
    small_logits: Tensor,
    tuned_logits: Tensor,
    *,
    grid: Sequence[float] = GRID,
    backend: Backend = "auto",
) -> FusedLogits:
    r"""A large model's logits + a·(a small tuned model's − the small model's), a by token; paper 88, derived.

    Each token's a is the one in the grid that moves the large model as far as tuning moved the small one, in both KLs:
    least (KL(P‖P_a) − KL(Q‖Q̃))² + (KL(P_a‖P) − KL(Q̃‖Q))², P and P_a before and after, Q and Q̃ the small models. The
    first of equals. Where the large model is the small one, a = 1.

    Args:
        logits, small_logits, tuned_logits: [*, V], over one vocabulary. grid: 0 to 2 by 0.1. backend: see
            `kk.token_stats`, which is called once a point of the grid.

    Returns: `FusedLogits`.

    >>> import torch, kldiv_kernels as kk
    >>> s, t = torch.tensor([[2.0, 0.5, -1.0, 0.0]]), torch.tensor([[1.0, 1.5, -0.5, 0.0]])
    >>> kk.recipes.fused_logits(torch.tensor([[0.5, 0.0, 0.0, -0.5]]), s, t).weight
    tensor([1.2000])
    """
    if len(grid) == 0:
        raise ValueError("fused_logits: grid is empty; expected one weight or more")
    alike_checked("fused_logits", logits, small_logits=small_logits, tuned_logits=tuned_logits)
    names = ("forward_kl", "reverse_kl")
    wanted = token_stats(tuned_logits, small_logits, stats=names, backend=backend)
    best = torch.full(logits.shape[:-1], torch.inf, dtype=wanted.forward_kl.dtype, device=logits.device)
    weight = torch.zeros_like(best)
    for a in grid:
        moved = token_stats(_fused(a, logits, small_logits, tuned_logits), logits, stats=names, backend=backend)
        forward, reverse = (moved[name] - wanted[name] for name in names)
        error = forward.square() + reverse.square()
        weight = torch.where(error < best, a, weight)
        best = torch.minimum(error, best)
    return FusedLogits(weight, _fused(weight, logits, small_logits, tuned_logits))


def _fused(a: float | Tensor, logits: Tensor, small: Tensor, tuned: Tensor) -> Tensor:
    # The small models first: where they are equal nothing is added, to the last bit.
    return mix_logits((a, tuned), (-a, small), (1.0, logits))


def _plausible(logits: Tensor, k: int, relative: float) -> Tensor:
    """Bool [*, V]: among the k largest, or with at least `relative` of the largest's probability."""
    largest = logits.topk(min(k, logits.shape[-1]), dim=-1).values
    bound = largest[..., :1] + (math.log(relative) if relative > 0 else -math.inf)
    return logits >= torch.minimum(largest[..., -1:], bound)
