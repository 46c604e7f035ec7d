"""The label's class against the rest: its binary KL, its margin, and the direction of the features of its images.

q = softmax(logits) is the student, p = softmax(teacher_logits) the teacher, c the label. The label's class and all
others together are a distribution on two outcomes, (p_c, 1 − p_c): a top-k loss with one id. The others among
themselves, t̂ and ŝ, are what `exclude=labels` leaves. Rows are [*]; one whose label is `ignore_index` is left out.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kldiv_kernels.choices import Backend
from kldiv_kernels.losses import forward_kl
from kldiv_kernels.recipes.checks import of_tokens_checked
from kldiv_kernels.recipes.recipe import Recipe
from kldiv_kernels.recipes.reductions import masked, over_rows, valid_labels, valid_rows, widened
from kldiv_kernels.stats import token_stats
from kldiv_kernels.top_k import topk_divergence_loss, topk_token_stats

PAPERS = (
    Recipe(
        79, "KD++ / DKD++", "Improving Knowledge Distillation via Regularizing Feature Norm and Direction", 2023,
        ("kdpp_loss", "norm_direction_loss", "dkd_loss"), "R0", "code",
        link="github.com/WangYZ1608/Knowledge-Distillation-via-ND",
        differs="kd_coef and nd_coef are those of CIFAR-100, ResNet-56 to ResNet-20; other pairs have 1 to 4 and 0.5 "
        "to 2. The code multiplies kd_coef by min(1, epoch/20). dkd_loss reads the teacher once more.",
    ),
    Recipe(
        94, "Datamodel matching", "Attribute-to-Delete: Machine Unlearning via Datamodel Matching", 2024,
        ("logit_matching_loss", "target_margin", "klom"), "R1", "derived",
        differs="Neither text nor code was seen. Which way the KL of the two histograms points, and their range, are "
        "derived; the number of bins and what is added to an empty one have no default.",
    ),
)  # fmt: skip


def dkd_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""τ²[α·KL of (p_c, 1 − p_c) + β·KL(t̂‖ŝ)]: decoupled distillation, the KL term of DKD++ in paper 79 (KD++).

    All at temperature τ. KL(p‖q) is the first KL + (1 − p_c) times the second. DKD++ is this in place of the KL of
    `kdpp_loss` (kd_coef=0).

    Args: logits, teacher_logits: [*, C]; the teacher gets no gradient. labels: [*]. alpha: 0.5 to 2.5 in the paper's
    code; beta: 4 to 8. temperature: τ. reduction, mask, normalizer: see `nkd_loss`. ignore_index, vocab_size, backend:
    see `kk.token_stats`.

    >>> import torch, kldiv_kernels as kk
    >>> s, t = torch.tensor([[2.0, 0.5, -1.0, 0.0]]), torch.tensor([[1.0, 1.5, -0.5, 0.0]])
    >>> round(kk.recipes.dkd_loss(s, t, torch.tensor([1])).item(), 4)
    1.8002
    """
    target, valid = valid_labels(labels, mask, ignore_index, logits.shape[-1] if vocab_size is None else vocab_size)
    shared: dict[str, Any] = {
        "temperature": temperature, "mask": valid, "vocab_size": vocab_size, "backend": backend
    }  # fmt: skip
    over: dict[str, Any] = {"temperature_squared": True, "reduction": reduction, "normalizer": normalizer}
    teacher, ids = teacher_logits.detach(), target[..., None]
    known = topk_token_stats(teacher, ids, **shared)
    binary = topk_divergence_loss(
        logits, ids, known.topk_logprobs, tail_logprob=known.tail_logprob, **shared, **over
    )  # fmt: skip
    # 0 times an infinite divergence would be NaN.
    if beta == 0:
        return alpha * binary
    others = beta * forward_kl(logits, teacher, exclude=target, **shared, **over)
    return others if alpha == 0 else alpha * binary + others


def norm_direction_loss(
    features: Tensor,
    teacher_features: Tensor,
    class_means: Tensor,
    labels: Tensor,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    r"""1 − ⟨f, e⟩/max(‖f‖, ‖f_T‖), e the direction of the teacher's mean feature of the label's class; paper 79 (KD++).

    Asks for that direction, and for a norm of at least the teacher's.

    Args: features, teacher_features: [*, D]; the teacher's get no gradient. class_means: [C, D], of the teacher's
    features of each class. labels: [*]. reduction, mask, normalizer: see `nkd_loss`.

    >>> import torch, kldiv_kernels as kk
    >>> f, of_teacher, means = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.eye(2)
    >>> kk.recipes.norm_direction_loss(f, of_teacher, means, torch.tensor([0])).item()
    0.5
    """
    of_tokens_checked(features, teacher_features=teacher_features)
    of_tokens_checked(features[..., 0], labels=labels, mask=mask)
    if class_means.dim() != 2 or class_means.shape[-1] != features.shape[-1]:
        raise ValueError(
            f"norm_direction_loss: class_means has shape {list(class_means.shape)}; expected [classes, "
            f"{features.shape[-1]}] like the features"
        )
    target, valid = valid_labels(labels, mask, ignore_index, len(class_means))
    f, other = (masked(widened(x), valid[..., None]) for x in (features, teacher_features.detach()))
    means = torch.nn.functional.normalize(widened(class_means.detach()), dim=-1)
    longest = torch.maximum(torch.linalg.vector_norm(f, dim=-1), torch.linalg.vector_norm(other, dim=-1))
    # Two features of 0 have no direction: the whole loss, 1.
    cosine = (f * means[target.clamp_min(0)]).sum(-1) / torch.where(longest == 0, 1.0, longest)
    return over_rows("norm_direction_loss", 1 - cosine, valid, reduction, normalizer)


def kdpp_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    features: Tensor,
    teacher_features: Tensor,
    class_means: Tensor,
    *,
    kd_coef: float = 1.0,
    nd_coef: float = 2.0,
    temperature: float = 4.0,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""−log q_c + a·τ²KL(p‖q) + b·`norm_direction_loss`, the mean over the rows; paper 79 (KD++) and its code.

    Args:
        logits, teacher_logits: [*, C]; features, teacher_features: [*, D]; no teacher gets a gradient. labels: [*].
            class_means: [C, D]. kd_coef: a, in the code times min(1, epoch/20). nd_coef: b. temperature: τ, of the KL.
        mask, normalizer: see `nkd_loss`. ignore_index, vocab_size, backend: see `kk.token_stats`.

    >>> import torch, kldiv_kernels as kk
    >>> s, t = torch.tensor([[2.0, 0.5, -1.0, 0.0]]), torch.tensor([[1.0, 1.5, -0.5, 0.0]])
    >>> loss = kk.recipes.kdpp_loss(s, t, torch.tensor([1]), torch.ones(1, 2), torch.ones(1, 2), torch.ones(4, 2))
    >>> round(loss.item(), 4)
    2.1602
    """
    target, valid = valid_labels(labels, mask, ignore_index, logits.shape[-1] if vocab_size is None else vocab_size)
    shared: dict[str, Any] = {
        "mask": valid, "normalizer": normalizer, "vocab_size": vocab_size, "backend": backend
    }  # fmt: skip
    # The label as a teacher that knows one class: value and gradient in one read.
    ids = target[..., None]
    loss = topk_divergence_loss(logits, ids, torch.zeros_like(ids, dtype=torch.float32), "cross_entropy", tail="none",
                                **shared)  # fmt: skip
    if kd_coef != 0:
        loss = loss + kd_coef * forward_kl(
            logits, teacher_logits.detach(), temperature=temperature, temperature_squared=True, **shared
        )
    return loss + nd_coef * norm_direction_loss(
        features, teacher_features, class_means, labels, mask=mask, normalizer=normalizer, ignore_index=ignore_index
    )


def logit_matching_loss(
    logits: Tensor,
    target_logits: Tensor,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""‖z − ẑ‖², summed over the classes, the mean over the rows; paper 94 (datamodel matching), derived.

    ẑ are the logits that a model trained without the forgotten data is predicted to have.

    Args: logits, target_logits: [*, C]; the targets get no gradient. reduction, mask, normalizer: see `nkd_loss`.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.logit_matching_loss(torch.zeros(2, 3), torch.ones(2, 3)).item()
    3.0
    """
    of_tokens_checked(logits, target_logits=target_logits)
    valid = valid_rows(logits, None, mask)
    # Equal ones are 0 apart where they are infinite too.
    differ = valid[..., None] & (logits != target_logits)
    apart = masked(widened(logits) - target_logits.detach(), differ)
    return over_rows("logit_matching_loss", apart.square().sum(-1), valid, reduction, normalizer)


def target_margin(
    logits: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""log p_c − log(1 − p_c) = s_c − log Σ_{i≠c} e^{s_i}, [*], with gradient; paper 94 (datamodel matching), derived.

    It has all its digits where p_c is near 1. Args: logits: [*, C]. labels: [*]; 0 where ignored or masked.

    >>> import torch, kldiv_kernels as kk
    >>> round(kk.recipes.target_margin(torch.tensor([[2.0, 0.5, -1.0, 0.0]]), torch.tensor([1])).item(), 4)
    -1.6698
    """
    target, valid = valid_labels(labels, mask, ignore_index, logits.shape[-1] if vocab_size is None else vocab_size)
    stats = topk_token_stats(logits, target[..., None], mask=valid, vocab_size=vocab_size, backend=backend)
    return masked(stats.topk_logprobs[..., 0] - stats.tail_logprob, valid)


@torch.no_grad()
def klom(margins: Tensor, other_margins: Tensor, *, bins: int, pseudocount: float) -> Tensor:
    r"""KL between the histograms, over models, of an example's margins: [*], nats; paper 94 (its KLoM), derived.

    KL(margins ‖ other_margins) on `bins` bins of one width from the smallest to the largest margin of both.

    Args: margins: [M, *], of M models. other_margins: [M', *]. bins: 1 or more. pseudocount: added to each bin's count;
    with 0 a bin that only the first has makes the result infinite.

    >>> import torch, kldiv_kernels as kk
    >>> first, second = torch.tensor([0.0, 1.0, 1.0, 4.0]), torch.tensor([0.0, 4.0])
    >>> round(kk.recipes.klom(first, second, bins=2, pseudocount=0.0).item(), 4)
    0.1308
    """
    if bins < 1 or pseudocount < 0:
        raise ValueError(f"klom: bins is {bins}, pseudocount {pseudocount}; expected 1 or more, and 0 or more")
    if margins.shape[1:] != other_margins.shape[1:] or 0 in (margins.shape[0], other_margins.shape[0]):
        raise ValueError(
            f"klom: margins has shape {list(margins.shape)}, other_margins {list(other_margins.shape)}; expected "
            "[models, *] each, with a model and the same examples"
        )
    both = widened(torch.cat([margins, other_margins]))
    low, high = both.amin(0), both.amax(0)
    width = torch.where(high > low, (high - low) / bins, 1.0)
    logs = []
    for x in (margins, other_margins):
        place = ((widened(x) - low) / width).long().clamp(0, bins - 1)
        count = x.new_full((bins, *x.shape[1:]), pseudocount, dtype=both.dtype)
        logs.append(count.scatter_add(0, place, torch.ones_like(place, dtype=both.dtype)).log().movedim(0, -1))
    return token_stats(logs[1].contiguous(), logs[0].contiguous(), stats=("forward_kl",)).forward_kl
