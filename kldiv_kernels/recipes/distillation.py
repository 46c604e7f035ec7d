"""A teacher's distribution over the vocabulary, with a weight or a mixture of directions, on texts that are given.

q = softmax(logits/τ) is the student, p = softmax(teacher_logits/τ) the teacher; KL(p‖q) is the forward KL, KL(q‖p) the
reverse one. Where a token's weight is known beforehand, value and gradient come out of one read of the logits.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kldiv_kernels.choices import Backend
from kldiv_kernels.losses import divergence_loss, forward_kl
from kldiv_kernels.policy import aggregate
from kldiv_kernels.recipes.checks import of_tokens_checked
from kldiv_kernels.recipes.recipe import Recipe
from kldiv_kernels.recipes.reductions import masked, sequence_mean, times, valid_rows, valid_tokens, widened
from kldiv_kernels.recipes.selection import first_tokens
from kldiv_kernels.stats import entropy, token_stats

PAPERS = (
    Recipe(
        7, "GeRe", "GeRe: Towards Efficient Anti-Forgetting in Continual Learning of LLM via General Samples Replay",
        2025, ("gere_kd_loss", "activation_threshold_loss"), "R0", "code", link="github.com/Qznan/GeRe",
        differs="The threshold loss reads hidden states, no logits. Its weight beside the cross-entropy is 1, 100, or "
        "their quotient without gradient; that sum is the caller's.",
    ),
    Recipe(
        10, "EdgeRazor",
        "EdgeRazor: A Lightweight Framework for Large Language Models via Mixed-Precision Quantization-Aware "
        "Distillation",
        2023, ("entropy_aware_kl",), "R1", "code", link="github.com/zhangsq-nju/EdgeRazor",
        differs="k and the temperature are 5 and 2 in the code's class, 16 and 1 in its published configurations, as "
        "here. The code bounds probabilities at 1e-8 before their logarithm, and does not shift labels; here they are "
        "exact, and labels stand at the rows that predict them.",
    ),
    Recipe(
        12, "BD-KD", "BD-KD: Balancing the Divergences for Online Knowledge Distillation", 2022,
        ("bidirectional_kl",), "R1", "restated", link="arXiv 2212.12965",
        differs="Seen in a summary only. How large the weights are was not seen, so they have no default; that both "
        "entropies are at the temperature of the divergences, and its square as a factor, is derived.",
    ),
    Recipe(
        35, "PACED", "PACED: Distillation at the Frontier of Student Competence", 2026, ("paced_loss",), "R0", "paper",
        link="github.com/HJSang/OPSD_OnPolicyDistillation",
        differs="The code has the divergences without the weights. Whether these are renormalised over the batch was "
        "not seen; here they are not.",
    ),
    Recipe(
        36, "Memorization in KD", "Memorization Dynamics in Knowledge Distillation for Language Models", 2026,
        ("kd_loss", "memorization_metrics"), "R0", "restated", link="arXiv 2601.15394",
        differs="Which way the KL of the metrics points was not seen; it is KL(p‖q) here. The metrics are one read "
        "without gradient.",
    ),
)  # fmt: skip


def gere_kd_loss(logits: Tensor, teacher_logits: Tensor, *, temperature: float = 2.0, **options: Any) -> Tensor:
    r"""The mean of KL(p‖q) at τ = 2 over all tokens, not multiplied by τ²: paper 7 (GeRe), its distillation.

    A quarter of `kd_loss`. The teacher is the model before training, on replayed texts.

    Args: logits, teacher_logits: [*, V]; the teacher gets no gradient. options: of `kk.divergence_loss`, such as a
    mask, which the code has not.

    >>> import torch, kldiv_kernels as kk
    >>> s, t = torch.tensor([[2.0, 0.5, -1.0, 0.0]]), torch.tensor([[1.0, 1.5, -0.5, 0.0]])
    >>> round(kk.recipes.gere_kd_loss(s, t).item(), 4)
    0.0889
    """
    return forward_kl(logits, teacher_logits.detach(), temperature=temperature, **options)


def activation_threshold_loss(
    hidden: Tensor, base_hidden: Tensor, lower: Tensor, upper: Tensor, *, mask: Tensor | None = None
) -> Tensor:
    r"""How far hidden units have left the side of two thresholds that the base model's are on; paper 7 (GeRe).

    A unit at most `lower` in the base model is to stay there, one at least `upper` too, one between them between them:
    relu(h − lower), relu(upper − h), or relu(h − upper) + relu(lower − h); the mean over those that are not 0.

    Args: hidden, base_hidden: [*, D]; the base model's get no gradient. lower, upper: [D], μ − σ and μ + σ of the base
    model's units over the replayed texts. mask: [*].

    Returns: a scalar; 0 for equal states.

    >>> import torch, kldiv_kernels as kk
    >>> h, base, edge = torch.tensor([[0.5, 3.0, 0.0]]), torch.tensor([[-2.0, 0.0, 0.5]]), torch.ones(3)
    >>> kk.recipes.activation_threshold_loss(h, base, -edge, edge).item()
    1.75
    """
    of_tokens_checked(hidden, base_hidden=base_hidden)
    of_tokens_checked(hidden[..., 0], mask=mask)
    kept = None if mask is None else mask[..., None]
    h = masked(widened(hidden), kept)
    base, lower, upper = base_hidden.detach(), lower.detach(), upper.detach()
    ceiling = torch.where(base <= lower, lower, torch.where(base >= upper, torch.inf, upper))
    floor = torch.where(base >= upper, upper, torch.where(base <= lower, -torch.inf, lower))
    outside = masked((h - ceiling).relu() + (floor - h).relu(), kept)
    return outside.sum() / (outside != 0).sum().clamp_min(1)


def entropy_aware_kl(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    confidence_k: int = 16,
    temperature: float = 1.0,
    gamma: float | Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""τ²[γ·KL(q‖p) + (1 − γ)·KL(p‖q)], γ = 1 − mean H(p)/log k within 0 and 1; paper 10 (EdgeRazor).

    A teacher that is sure makes it the reverse KL, one that is not the forward KL. γ is one number a batch, of the
    teacher at temperature 1, without gradient. Both means are over the tokens of a sequence, then over sequences.

    Args:
        logits, teacher_logits: [B, T, V]. labels: [B, T]; tokens whose label is `ignore_index` are left out.
        confidence_k: k ≥ 2. gamma: γ itself, a number or a scalar tensor; the mean of the teacher's probabilities of
            the labels makes it CAKLD.
        temperature: τ, a number. mask, vocab_size, backend: see `kk.token_stats`.

    Returns: a scalar. One read, and one for the gradient; with a temperature and without gamma one more of the teacher.

    >>> import torch, kldiv_kernels as kk
    >>> s, t = torch.tensor([[[2.0, 0.5, -1.0, 0.0]]]), torch.tensor([[[1.0, 1.5, -0.5, 0.0]]])
    >>> round(kk.recipes.entropy_aware_kl(s, t, confidence_k=4).item(), 4)
    0.3954
    """
    if confidence_k < 2:
        raise ValueError(f"entropy_aware_kl: confidence_k is {confidence_k}; expected 2 or more")
    teacher, valid = teacher_logits.detach(), valid_rows(logits, labels, mask, ignore_index)
    shared: dict[str, Any] = {"mask": valid, "vocab_size": vocab_size, "backend": backend}
    own = gamma is None and temperature == 1
    names = ("forward_kl", "reverse_kl") + (("reference_entropy",) if own else ())
    stats = token_stats(logits, teacher, stats=names, temperature=temperature, **shared)
    if gamma is None:
        of_teacher = stats.reference_entropy.detach() if own else entropy(teacher, **shared)
        mean_entropy = aggregate(of_teacher, valid, "seq-mean-token-mean", None, True)
        gamma = (1 - mean_entropy / math.log(confidence_k)).clamp(0, 1)
    share = gamma.detach() if isinstance(gamma, Tensor) else stats.forward_kl.new_full((), gamma)
    mixed = times(share, stats.reverse_kl) + times(1 - share, stats.forward_kl)
    return temperature**2 * aggregate(mixed, valid, "seq-mean-token-mean", None, True)


def bidirectional_kl(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    forward_weights: tuple[float, float],
    reverse_weights: tuple[float, float],
    temperature: float = 1.0,
    temperature_squared: bool = True,
    reduction: Literal["mean", "sum", "none"] = "mean",
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""ν·KL(p‖q) + δ·KL(q‖p), with weights that depend on which of the two is surer; paper 12 (BD-KD).

    ν and δ are the first of their pairs where H(p) > H(q), the second elsewhere. A student surer than its teacher is to
    have the forward KL weigh more. The student's loss adds the labels' cross-entropy; the teacher, which is trained
    too, has this with the roles of the logits exchanged. Source: a summary; the pairs' values were not seen.

    Args:
        logits, teacher_logits: [*, V]; both get gradients where they require them.
        forward_weights, reverse_weights: the pairs of ν and of δ. temperature: a number, of both softmaxes and their
            entropies; the divergences are multiplied by its square unless temperature_squared is False.
        reduction: "mean" over the mask's tokens, or over `normalizer`; "sum"; "none": [*]. mask: [*].

    >>> import torch, kldiv_kernels as kk
    >>> s, t = torch.tensor([[2.0, 0.5, -1.0, 0.0]]), torch.tensor([[1.0, 1.5, -0.5, 0.0]])
    >>> round(kk.recipes.bidirectional_kl(s, t, forward_weights=(1, 0), reverse_weights=(0, 1)).item(), 4)
    0.4015
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"bidirectional_kl: reduction is {reduction!r}; expected mean, sum or none")
    stats = token_stats(
        logits, teacher_logits, stats=("forward_kl", "reverse_kl", "entropy", "reference_entropy"),
        temperature=temperature, mask=mask, vocab_size=vocab_size, backend=backend,
    )  # fmt: skip
    surer = stats.reference_entropy > stats.entropy
    one = torch.ones_like(stats.forward_kl)
    nu, delta = (torch.where(surer, x * one, y * one) for x, y in (forward_weights, reverse_weights))
    values = times(nu, stats.forward_kl) + times(delta, stats.reverse_kl)
    values = values * temperature**2 if temperature_squared else values
    if reduction == "none":
        return values
    how = "token-mean" if reduction == "mean" else "token-sum"
    return aggregate(values, valid_rows(logits, None, mask), how, normalizer if reduction == "mean" else None, True)


def paced_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    pass_rates: Tensor,
    labels: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    kind: Literal["forward_kl", "reverse_kl"] = "forward_kl",
    **options: Any,
) -> Tensor:
    r"""Mean of r^α(1 − r)^β·D over the tokens, r the student's pass rate of each problem; paper 35 (PACED).

    Problems that the student always or never solves count 0; r = α/(α + β) counts most. The weights are not
    renormalised over the batch. Source: the paper's abstract and its code for D.

    Args:
        logits, teacher_logits: [B, T, V]; the teacher gets no gradient. pass_rates: [B], between 0 and 1.
        labels: [B, T]; ignored ones are left out. alpha, beta: 0 or more.
        kind: "forward_kl" on the teacher's texts, "reverse_kl" on the student's own (then the teacher may be the
            student given more to read). options: of `kk.divergence_loss` but `weight`.

    >>> import torch, kldiv_kernels as kk
    >>> s, t = torch.tensor([[[2.0, 0.5, -1.0, 0.0]]]), torch.tensor([[[1.0, 1.5, -0.5, 0.0]]])
    >>> round(kk.recipes.paced_loss(s, t, torch.tensor([0.5])).item(), 4)
    0.1004
    """
    if kind not in ("forward_kl", "reverse_kl"):
        raise ValueError(f"paced_loss: kind is {kind!r}; expected forward_kl or reverse_kl")
    if min(alpha, beta) < 0:
        raise ValueError(f"paced_loss: alpha is {alpha} and beta is {beta}; expected 0 or more")
    if pass_rates.shape != logits.shape[:1] or logits.dim() != 3:
        raise ValueError(
            f"paced_loss: pass_rates has shape {list(pass_rates.shape)} with logits {list(logits.shape)}; expected [B] "
            "with [B, T, V]"
        )
    rate = widened(pass_rates.detach())
    weight = (rate**alpha * (1 - rate) ** beta)[:, None].expand(logits.shape[:-1])
    return divergence_loss(logits, teacher_logits.detach(), kind, weight=weight, labels=labels, **options)


def kd_loss(logits: Tensor, teacher_logits: Tensor, *, temperature: float = 2.0, **options: Any) -> Tensor:
    r"""τ²·KL(p‖q) at τ = 2, the mean over the tokens: soft distillation in paper 36 (Memorization in KD), eqs. 1–2.

    Args: logits, teacher_logits: [*, V]; the teacher gets no gradient. options: of `kk.divergence_loss`.

    >>> import torch, kldiv_kernels as kk
    >>> s, t = torch.tensor([[2.0, 0.5, -1.0, 0.0]]), torch.tensor([[1.0, 1.5, -0.5, 0.0]])
    >>> round(kk.recipes.kd_loss(s, t).item(), 4)
    0.3555
    """
    return forward_kl(logits, teacher_logits.detach(), temperature=temperature, temperature_squared=True, **options)


class MemorizationMetrics(NamedTuple):
    """H(q), log q_y and KL(p‖q) of each token [B, T], and [B] the mean entropy of the last tokens; nats."""

    entropy: Tensor
    logprob: Tensor
    forward_kl: Tensor
    last_entropy: Tensor


@torch.no_grad()
def memorization_metrics(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    last: int = 50,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> MemorizationMetrics:
    r"""What tells memorised texts apart: entropy, log-probability and KL of each token; paper 36 (Memorization in KD).

    The paper compares teacher and baseline: give the baseline's logits first, then the teacher's.

    Args: logits, teacher_logits: [B, T, V]. labels: [B, T]. last: of how many tokens last_entropy is the mean, the last
    that count of each sequence. mask, ignore_index, vocab_size, backend: see `kk.token_stats`.

    Returns: `MemorizationMetrics`, 0 where masked, without gradient, of one read.

    >>> import torch, kldiv_kernels as kk
    >>> s, t = torch.tensor([[[2.0, 0.5, -1.0, 0.0]]]), torch.tensor([[[1.0, 1.5, -0.5, 0.0]]])
    >>> [round(x.item(), 4) for x in kk.recipes.memorization_metrics(s, t, torch.tensor([[1]]))]
    [0.8783, -1.8423, 0.4015, 0.8783]
    """
    if last < 1:
        raise ValueError(f"memorization_metrics: last is {last}; expected 1 or more")
    valid = valid_tokens(labels, mask, ignore_index)
    stats = token_stats(
        logits, teacher_logits, torch.where(valid, labels, 0), stats=("entropy", "logprob", "forward_kl"), mask=valid,
        vocab_size=vocab_size, backend=backend,
    )  # fmt: skip
    at_end = first_tokens(valid.flip(-1), last).flip(-1)
    return MemorizationMetrics(stats.entropy, stats.logprob, stats.forward_kl, sequence_mean(stats.entropy, at_end))
