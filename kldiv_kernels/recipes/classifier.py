"""Distillation of classifiers that weighs the label's class apart from the others.

q = softmax(logits) is the student, p = softmax(teacher_logits) the teacher, c the label. ŝ and t̂ are their softmaxes
over the classes i ≠ c: `exclude=labels` of the package's functions. Rows are [*], as a batch of images [B] or its
pixels [B, H, W]; a row whose label is `ignore_index` is left out.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kldiv_kernels.choices import Backend
from kldiv_kernels.losses import divergence_loss
from kldiv_kernels.recipes.checks import of_tokens_checked
from kldiv_kernels.recipes.recipe import Recipe
from kldiv_kernels.recipes.reductions import masked, over_rows, times, valid_labels, widened
from kldiv_kernels.stats import token_stats

PAPERS = (
    Recipe(
        44, "NKD / USKD",
        "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and "
        "Customized Soft Labels",
        2023, ("nkd_loss", "uskd_loss"), "R1", "code", link="github.com/yzd-v/cls_KD",
        differs="uskd_loss ranks the classes in PyTorch. Where the paper ranks by q/(1 − q_c), the code has log q in "
        "both places (code_ranking=True). The code's labels of mixed images, two a row, are not here.",
    ),
    Recipe(
        50, "OFA-KD",
        "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation", 2023,
        ("ofa_loss",), "R1", "code", link="github.com/Hao840/OFAKD",
        differs="eps is 1 in the code's class and 1.5 in its command for ImageNet. 1 is soft cross-entropy, in one "
        "read; another one has two more of the teacher, without gradient.",
    ),
)  # fmt: skip


def nkd_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    gamma: float = 1.5,
    non_target_temperature: float = 1.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""−p_c·log q_c − γλ²·Σ_{i≠c} t̂_i log ŝ_i, with ŝ and t̂ at temperature λ; paper 44 (NKD) and its code.

    The labels' cross-entropy is added to it by the caller. Finite where q_c is 1.

    Args:
        logits, teacher_logits: [*, C]; the teacher gets no gradient. labels: [*]. gamma: γ; with λ, 1.5 and 1 for
            ImageNet, 3.5 and 3 for CIFAR-100. non_target_temperature: λ; p_c and q_c are at temperature 1.
        reduction: "mean" over the rows, or over `normalizer`; "sum"; "none": [*]. mask: [*].
        ignore_index, vocab_size, backend: see `kk.token_stats`.

    >>> import torch, kldiv_kernels as kk
    >>> s, t = torch.tensor([[2.0, 0.5, -1.0, 0.0]]), torch.tensor([[1.0, 1.5, -0.5, 0.0]])
    >>> round(kk.recipes.nkd_loss(s, t, torch.tensor([1])).item(), 4)
    2.5171
    """
    target, valid = valid_labels(labels, mask, ignore_index, logits.shape[-1] if vocab_size is None else vocab_size)
    shared: dict[str, Any] = {"mask": valid, "vocab_size": vocab_size, "backend": backend}
    teacher = teacher_logits.detach()
    of_label = token_stats(logits, teacher, target, stats=("logprob", "reference_logprob"), ignore_index=-1, **shared)
    values = times(of_label.reference_logprob.exp(), -of_label.logprob)
    if gamma != 0:
        others = token_stats(
            logits, teacher, stats=("cross_entropy",), exclude=target, temperature=non_target_temperature, **shared
        )
        values = values + gamma * non_target_temperature**2 * others.cross_entropy
    return over_rows("nkd_loss", values, valid, reduction, normalizer)


def uskd_loss(
    logits: Tensor,
    weak_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 0.1,
    mu: float = 0.005,
    code_ranking: bool = False,
    reduction: Literal["mean", "sum", "none"] = "mean",
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    backend: Backend = "auto",
) -> Tensor:
    r"""−α·P_c log q_c − β·Σ_{i≠c} z_i log ŝ_i − μ·Σ_i ỹ_i log w_i: paper 44 (USKD), distillation without a teacher.

    P_c = q_c² + 1 − the batch's mean of q_c². w = softmax(weak_logits), ỹ = 0.9·onehot + 0.1/C. z_i is in proportion to
    1/rank of the class by w_i/(1 − w_c) + q_i/(1 − q_c), without the label's. P_c and z have no gradient. The labels'
    cross-entropy is added by the caller.

    Args:
        logits: [*, C]. weak_logits: [*, C], of a linear head on features in the middle; it is trained by the last term.
        labels: [*]. alpha, beta, mu: 1, 0.1, 0.005 for ImageNet, 0.1 each for CIFAR-100 with ResNet-18.
        code_ranking: True: log q in place of q in the second quotient, as in the code.
        reduction, mask, normalizer, ignore_index, backend: see `nkd_loss`.

    >>> import torch, kldiv_kernels as kk
    >>> s, w = torch.tensor([[2.0, 0.5, -1.0, 0.0]]), torch.tensor([[1.0, 1.5, -0.5, 0.0]])
    >>> round(kk.recipes.uskd_loss(s, w, torch.tensor([1])).item(), 4)
    1.9527
    """
    of_tokens_checked(logits, weak_logits=weak_logits)
    target, valid = valid_labels(labels, mask, ignore_index, logits.shape[-1])
    shared: dict[str, Any] = {"mask": valid, "backend": backend}
    # A row of zeros, not copied: cross-entropy to the uniform distribution.
    uniform = logits.new_zeros(logits.shape[-1]).expand(logits.shape)
    student = token_stats(logits, labels=target, stats=("logprob",), ignore_index=-1, **shared)
    weak = token_stats(
        weak_logits, uniform, target, stats=("logprob", "cross_entropy"), ignore_index=-1, **shared
    )  # fmt: skip
    zipf = _zipf_logprobs(masked(logits, valid[..., None]), masked(weak_logits, valid[..., None]), target, code_ranking)
    others = token_stats(logits, zipf, stats=("cross_entropy",), exclude=target, **shared)
    square = (2 * student.logprob.detach()).exp()
    weight = square + 1 - masked(square, valid).sum() / valid.sum().clamp_min(1)
    values = -alpha * weight * student.logprob
    # 0 times an infinite cross-entropy would be NaN.
    if beta != 0:
        values = values + beta * others.cross_entropy
    if mu != 0:
        values = values + mu * (0.1 * weak.cross_entropy - 0.9 * weak.logprob)
    return over_rows("uskd_loss", values, valid, reduction, normalizer)


@torch.no_grad()
def _zipf_logprobs(logits: Tensor, weak_logits: Tensor, target: Tensor, code_ranking: bool) -> Tensor:
    """−log rank of each class, [*, C]; equal ones in their order."""
    column = target.clamp_min(0)[..., None]

    def odds(x: Tensor) -> Tensor:
        # q_i/(1 − q_c), with all digits where q_c is near 1.
        others = torch.full_like(x, -torch.inf).where(torch.arange(x.shape[-1], device=x.device) == column, x)
        return (x - others.logsumexp(-1, keepdim=True)).exp()

    second = odds(widened(logits))
    if code_ranking:
        logq = widened(logits).log_softmax(-1)
        second = logq / (1 - logq.gather(-1, column))
    score = odds(widened(weak_logits)) + second
    rank = torch.argsort(score, dim=-1, descending=True, stable=True).argsort(-1) + 1
    return torch.log(1 / rank.to(score.dtype))


def ofa_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    eps: float = 1.0,
    temperature: float = 1.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""−Σ_i [(p_i + δ_i)^ε − δ_i]·log q_i, with δ_i = 1 for the label's class; paper 50 (OFA-KD) and its code.

    ε > 1 trusts the teacher less outside of the label's class, 0 < ε < 1 more. The weights do not sum to 1. Used for
    the last logits and for those of heads on each stage; the labels' cross-entropy is added by the caller.

    Args: logits, teacher_logits: [*, C]; the teacher gets no gradient. labels: [*]. eps: ε > 0. temperature: of both
    softmaxes. reduction, mask, normalizer: see `nkd_loss`. ignore_index, vocab_size, backend: see `kk.token_stats`.

    >>> import torch, kldiv_kernels as kk
    >>> s, t = torch.tensor([[2.0, 0.5, -1.0, 0.0]]), torch.tensor([[1.0, 1.5, -0.5, 0.0]])
    >>> round(kk.recipes.ofa_loss(s, t, torch.tensor([1]), eps=1.5).item(), 4)
    1.7812
    """
    if not eps > 0:
        raise ValueError(f"ofa_loss: eps is {eps}; expected a number above 0")
    target, valid = valid_labels(labels, mask, ignore_index, logits.shape[-1] if vocab_size is None else vocab_size)
    shared: dict[str, Any] = {"mask": valid, "vocab_size": vocab_size, "backend": backend}
    teacher = teacher_logits.detach()
    if eps == 1:
        return divergence_loss(
            logits, teacher, "cross_entropy", temperature=temperature, reduction=reduction, normalizer=normalizer,
            **shared,
        )  # fmt: skip
    # p^ε is softmax of ε times the logits, times what it sums to: by the largest of both, which no offset rounds.
    known = token_stats(
        teacher, labels=target, stats=("max_logprob", "logprob"), temperature=temperature, ignore_index=-1, **shared
    )
    sharper = token_stats(teacher, stats=("max_logprob",), temperature=temperature / eps, **shared)
    total = (eps * known.max_logprob - sharper.max_logprob).exp()
    label = known.logprob.exp()
    more = torch.expm1(eps * torch.log1p(label)) - label**eps
    student = token_stats(
        logits, teacher, target, stats=("logprob", "cross_entropy"), temperature=temperature,
        reference_temperature=temperature / eps, ignore_index=-1, **shared,
    )  # fmt: skip
    values = total * student.cross_entropy - times(more, student.logprob)
    return over_rows("ofa_loss", values, valid, reduction, normalizer)
