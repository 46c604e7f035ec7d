"""Preferences between two answers to a prompt, from their logits: DPO with the divergence of each token beside it.

Logits are [2B, T, V]: B preferred answers, then the B others in the same order, as TRL concatenates them. ℓ, ℓ_ref:
log-probabilities of a token under the policy and the reference; Δ = ℓ − ℓ_ref; D = KL(p‖q) of a token, p the
reference's softmax and q the policy's; w and l: the preferred and the other answer. Sums run over an answer's tokens. A
pair without a token in either answer does not count. Scalars, in nats.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kldiv_kernels.choices import Backend
from kldiv_kernels.recipes.checks import of_tokens_checked
from kldiv_kernels.recipes.lists import pair_mean, pair_statistics, pairs_checked, preference_loss
from kldiv_kernels.recipes.recipe import Recipe
from kldiv_kernels.recipes.reductions import batch_mean, masked, sequence_sum, times, valid_tokens, widened
from kldiv_kernels.stats import token_stats

PAPERS = (
    Recipe(
        5, "SparsePO", "SparsePO: Controlling Preference Alignment of LLMs via Sparse Token Masks", 2024,
        ("sparsepo_loss", "mapo_weights"), "R1", "code", link="github.com/huawei-noah/HEBO",
        differs="As run; a docstring of the code names the other direction of the KL. Where one mask serves both terms "
        "the code halves its penalty. kk.recipes.SparseMask is the trained mask.",
    ),
    Recipe(
        59, "RRPO",
        "Self-alignment of Large Video Language Models with Refined Regularized Preference Optimization", 2026,
        ("rrpo_loss",), "R1", "code", link="github.com/pritamqu/RRPO",
    ),
    Recipe(
        70, "HyPO", "The Importance of Online Data: Understanding Preference Fine-tuning via Coverage", 2024,
        ("hypo_loss",), "R1", "derived",
        differs="The algorithm was not read again: recalled. The coefficient's order is that reported for TL;DR, not "
        "verified. The KL's exact form token by token, kk.reverse_kl over the online answers, leaves out what a token "
        "does to those behind it. Another paper's method of this name is not this one.",
    ),
    Recipe(
        92, "TDPO", "Token-level Direct Preference Optimization", 2024, ("tdpo_loss",), "R1", "code",
        link="github.com/Vance0124/Token-level-Direct-Preference-Optimization",
        differs="The code's README names version 2 as the default, its configuration ships version 1.",
    ),
)  # fmt: skip


def tdpo_loss(
    logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    *,
    version: Literal[1, 2] = 2,
    alpha: float | None = None,
    beta: float = 0.1,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""−log σ(β·z), z = ΣΔ_w − ΣΔ_l − α(ΣD_l − sg[ΣD_w]); paper 92 (TDPO), its second version.

    Version 1: z = ΣΔ_w − ΣΔ_l − (ΣD_l − ΣD_w), with the gradients of both divergences.

    Args:
        logits, reference_logits: [2B, T, V]. labels: [2B, T], `ignore_index` outside the answers; position t predicts
            the label at t. version: 2 or 1. alpha: of version 2; 0.5. 0 is DPO. beta: β.
        mask, …, backend: see `kk.token_stats`.

    Returns: a scalar, the mean over pairs.

    >>> import torch, kldiv_kernels as kk
    >>> s, t, b = ([2.0, 0.5, -1.0, 0.0], [1.0, 1.5, -0.5, 0.0], [0.5, 0.0, 0.0, -0.5])
    >>> out = kk.recipes.tdpo_loss(torch.tensor([[s], [b]]), torch.tensor([[t], [t]]), torch.tensor([[1], [0]]))
    >>> round(out.item(), 4)
    0.7602
    """
    if version not in (1, 2):
        raise ValueError(f"tdpo_loss: version is {version!r}; expected 1 or 2")
    if version == 1 and alpha is not None:
        raise ValueError(f"tdpo_loss: alpha is {alpha}; version 1 has none, expected None")
    names = ("logprob", "reference_logprob")
    # 0 times a divergence that is infinite would be NaN.
    stats, valid = pair_statistics(
        logits, reference_logits, labels, names if alpha == 0 else (*names, "forward_kl"), mask=mask,
        temperature=temperature, ignore_index=ignore_index, vocab_size=vocab_size, backend=backend,
    )  # fmt: skip
    chosen, rejected = sequence_sum(stats.logprob - stats.reference_logprob, valid).chunk(2)
    if alpha == 0:
        return pair_mean(preference_loss(chosen - rejected, beta=beta), valid)
    of_chosen, of_rejected = sequence_sum(stats.forward_kl, valid).chunk(2)
    if version == 1:
        margin = chosen - rejected - (of_rejected - of_chosen)
    else:
        margin = chosen - rejected - (0.5 if alpha is None else alpha) * (of_rejected - of_chosen.detach())
    return pair_mean(preference_loss(margin, beta=beta), valid)


def sparsepo_loss(
    logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    ratio_weights: Tensor,
    kl_weights: Tensor,
    *,
    beta: float = 0.1,
    ratio_l1: float = 1e-3,
    kl_l1: float = 1e-3,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""−log σ(β(u − d)) + λ_u·Σ|m^u| + λ_d·Σ|m^d|: DPO of weighted tokens, and of weighted KLs; paper 5 (SparsePO).

    u = Σm^u Δ_w − Σm^u Δ_l and d = Σm^d D_l − Σm^d D_w, with all gradients but the reference's. Weights of 1
    are version 1 of `tdpo_loss`; 1 and, of the KL, 0 are DPO.

    Args:
        logits, reference_logits: [2B, T, V]. labels: [2B, T], see `tdpo_loss`.
        ratio_weights, kl_weights: [2B, T], m^u and m^d, trained where they have a gradient: `SparseMask`,
            `mapo_weights`. beta: β; 0.1, and 0.8 on two of the paper's tasks.
        ratio_l1, kl_l1: λ of the sums of |m| over a pair's tokens. mask, …, backend: see `kk.token_stats`.

    Returns: a scalar, the mean over pairs.

    >>> import torch, kldiv_kernels as kk
    >>> s, t, b = ([2.0, 0.5, -1.0, 0.0], [1.0, 1.5, -0.5, 0.0], [0.5, 0.0, 0.0, -0.5])
    >>> out = kk.recipes.sparsepo_loss(
    ...     torch.tensor([[s], [b]]), torch.tensor([[t], [t]]), torch.tensor([[1], [0]]), torch.full((2, 1), 0.5),
    ...     torch.full((2, 1), 0.25), ratio_l1=0.0, kl_l1=0.0)
    >>> round(out.item(), 4)
    0.7262
    """
    of_tokens_checked(labels, ratio_weights=ratio_weights, kl_weights=kl_weights)
    stats, valid = pair_statistics(
        logits, reference_logits, labels, ("logprob", "reference_logprob", "forward_kl"), mask=mask,
        temperature=temperature, ignore_index=ignore_index, vocab_size=vocab_size, backend=backend,
    )  # fmt: skip
    of_ratio, of_kl = masked(ratio_weights, valid), masked(kl_weights, valid)
    each = times(of_ratio, stats.logprob - stats.reference_logprob) + times(of_kl, stats.forward_kl)
    chosen, rejected = sequence_sum(each, valid).chunk(2)
    loss = preference_loss(chosen - rejected, beta=beta)
    sizes = sequence_sum(ratio_l1 * of_ratio.abs() + kl_l1 * of_kl.abs(), valid)
    return pair_mean(loss + sum(sizes.chunk(2)), valid)


@torch.no_grad()
def mapo_weights(activations: Tensor, mask: Tensor) -> Tensor:
    r"""(a − min a)/(max a − min a) over each sequence's tokens, [B, T]: fixed weights of `sparsepo_loss`.

    Source: paper 5 (SparsePO, its MAPO). Where all of a sequence are equal its weights are 1 (derived).

    Args: activations: [B, T], means of the reference's activations at a token. mask: [B, T] bool.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.mapo_weights(torch.tensor([[1.0, 5.0, 2.0]]), torch.tensor([[True, True, True]]))
    tensor([[0.0000, 1.0000, 0.2500]])
    """
    of_tokens_checked(activations, mask=mask)
    valid = mask != 0
    if activations.numel() == 0:
        return torch.zeros_like(activations)
    low = torch.where(valid, activations, torch.inf).amin(-1, keepdim=True)
    high = torch.where(valid, activations, -torch.inf).amax(-1, keepdim=True)
    apart = high - low
    return masked(torch.where(apart > 0, (activations - low) / apart, 1.0), valid)


def rrpo_loss(
    logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    phrases: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 0.01,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""−log σ(β·(ΣΔ_w − ΣΔ_l)) over phrases that differ + α·ΣD over the preferred answer; paper 59 (RRPO), its code.

    Args:
        logits, reference_logits: [2B, T, V]. labels: [2B, T], see `tdpo_loss`.
        phrases: [2B, T] integers, the number of the differing phrase that a token is in, from 1; 0 is in none. Other
            rows of the rejected answers than those of phrases are not read.
        beta, alpha: 0.1 and 0.01 for LLaVA-Video; 0.5 and 0.05, 0.9 and 0.01 for two others.
        mask, …, backend: see `kk.token_stats`.

    Returns: a scalar, the mean over pairs.

    >>> import torch, kldiv_kernels as kk
    >>> s, t, b = ([2.0, 0.5, -1.0, 0.0], [1.0, 1.5, -0.5, 0.0], [0.5, 0.0, 0.0, -0.5])
    >>> out = kk.recipes.rrpo_loss(
    ...     torch.tensor([[s], [b]]), torch.tensor([[t], [t]]), torch.tensor([[1], [0]]), torch.tensor([[1], [1]]),
    ...     alpha=1.0)
    >>> round(out.item(), 4)
    1.1668
    """
    of_tokens_checked(labels, phrases=phrases)
    pairs_checked(logits)
    valid = valid_tokens(labels, mask, ignore_index)
    (answer, _), (differing, differing_rejected) = valid.chunk(2), (valid & (phrases > 0)).chunk(2)
    (own, other), (reference, other_reference) = logits.chunk(2), reference_logits.detach().chunk(2)
    ids, other_ids = torch.where(valid, labels, 0).chunk(2)
    names = ("logprob", "reference_logprob")
    shared: dict[str, Any] = {"temperature": temperature, "vocab_size": vocab_size, "backend": backend}
    # 0 times a divergence that is infinite would be NaN.
    of_chosen = names if alpha == 0 else (*names, "forward_kl")
    chosen = token_stats(own, reference, ids, stats=of_chosen, mask=answer, **shared)
    rejected = token_stats(other, other_reference, other_ids, stats=names, mask=differing_rejected, **shared)
    margin = sequence_sum(chosen.logprob - chosen.reference_logprob, differing)
    margin = margin - sequence_sum(rejected.logprob - rejected.reference_logprob, differing_rejected)
    loss = preference_loss(margin, beta=beta)
    return pair_mean(loss if alpha == 0 else loss + alpha * sequence_sum(chosen.forward_kl, answer), valid)


def hypo_loss(
    logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    online_logprobs: Tensor,
    online_reference_logprobs: Tensor,
    *,
    beta: float = 0.1,
    kl_coef: float = 1e-4,
    online_mask: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""DPO of the pairs + λ·mean(sg[Σ ℓ − ℓ_ref]·Σ ℓ) over answers that the policy wrote; paper 70 (HyPO), derived.

    The second mean is not KL(q‖p), but its gradient's mean is that of the answers' KL(q‖p).

    Args:
        logits, reference_logits: [2B, T, V], of pairs that were there before. labels: [2B, T], see `tdpo_loss`.
        online_logprobs, online_reference_logprobs: [S, U], ℓ with its gradient and ℓ_ref of the policy's own answers,
            from `kk.selective_log_softmax`. online_mask: [S, U] bool, their tokens; default all.
        beta: β. kl_coef: λ; 1e-4 is the order reported for TL;DR, not verified. mask, …, backend: see
            `kk.token_stats`.

    Returns: a scalar.

    >>> import torch, kldiv_kernels as kk
    >>> same, online = torch.zeros(2, 1, 4), torch.tensor([[-1.0, -2.0]])
    >>> out = kk.recipes.hypo_loss(same, same, torch.tensor([[1], [0]]), online, online - 0.5, kl_coef=0.1)
    >>> round(out.item(), 4)
    0.3931
    """
    of_tokens_checked(online_logprobs, online_reference_logprobs=online_reference_logprobs, online_mask=online_mask)
    stats, valid = pair_statistics(
        logits, reference_logits, labels, ("logprob", "reference_logprob"), mask=mask, temperature=temperature,
        ignore_index=ignore_index, vocab_size=vocab_size, backend=backend,
    )  # fmt: skip
    chosen, rejected = sequence_sum(stats.logprob - stats.reference_logprob, valid).chunk(2)
    offline = pair_mean(preference_loss(chosen - rejected, beta=beta), valid)
    apart = sequence_sum((widened(online_logprobs) - online_reference_logprobs).detach(), online_mask)
    surrogates = sequence_sum(online_logprobs, online_mask) * apart
    some = None if online_mask is None else (online_mask != 0).any(-1)
    return offline + kl_coef * batch_mean(surrogates, some)
