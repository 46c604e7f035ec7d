"""Labels, or values of actions, beside a divergence to the model that training starts from.

q = softmax(logits/τ) is what is trained, p the model before training.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kldiv_kernels.choices import Backend
from kldiv_kernels.losses import reverse_kl
from kldiv_kernels.policy import aggregate
from kldiv_kernels.recipes.recipe import Recipe
from kldiv_kernels.recipes.reductions import masked, tempered_softmax, valid_rows, valid_tokens, widened
from kldiv_kernels.stats import selective_log_softmax, token_stats

PAPERS = (
    Recipe(
        58, "Demonstration-regularised RL", "Demonstration-Regularized RL", 2023, ("demonstration_regularized_loss",),
        "torch", "derived",
        differs="Derived from the abstract. Cloning, the first stage, is −kk.selective_log_softmax(…).mean().",
    ),
    Recipe(
        74, "ASFT / DFT", "Anchored Supervised Fine-Tuning", 2026, ("asft_loss", "dft_loss"), "R1", "code",
        link="github.com/zhuchichi56/ASFT",
        differs="The paper wants KL(q‖p), every released code computes KL(p‖q) (kind='forward_kl'). kl_coef is 0.05 in "
        "the experiments, 0.1 in the code.",
    ),
    Recipe(
        103, "Kronos", "Kronos: A Foundation Model for the Language of Financial Markets", 2025,
        ("two_vocabulary_cross_entropy",), "R1", "code", link="github.com/shiyu-coder/Kronos",
        differs="The tokenizer's own loss, of binary spherical quantisation, is not here.",
    ),
)  # fmt: skip


def demonstration_regularized_loss(
    logits: Tensor,
    clone_logits: Tensor,
    action_values: Tensor,
    *,
    kl_coef: float,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    temperature: float = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    r"""−E_q[Q] + λ·KL(q‖p), mean over states, p the policy cloned from demonstrations; paper 58, derived.

    Its optimum in a state is p·e^{Q/λ} over its sum. For few actions: makes [N, A] tensors in PyTorch.

    Args: logits, clone_logits, action_values: [*, A], of q, of p and Q; the latter two get no gradient. kl_coef: λ, of
    which no default was seen. mask: [*]. normalizer, temperature, backend: see `kk.divergence_loss`.

    >>> import torch, kldiv_kernels as kk
    >>> policy, values = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
    >>> kk.recipes.demonstration_regularized_loss(policy, policy, values, kl_coef=0.1).item()
    -0.5
    """
    valid = valid_rows(logits, None, mask)
    rows = masked(widened(logits), valid[..., None])
    q = tempered_softmax(rows, temperature)
    # An action that is never taken may have a value of −inf.
    taken = valid[..., None] & (q > 0)
    # The gradient is q·(Q − E[Q]): a number common to a state's values would round it.
    common = torch.where(taken, widened(action_values.detach()), -torch.inf).amax(-1, keepdim=True)
    common = torch.where(common.isfinite(), common, 0.0)
    expected = (q * torch.where(taken, action_values.detach() - common, 0.0)).sum(-1) + common[..., 0]
    loss = -aggregate(expected, valid, "token-mean", normalizer, True)
    if kl_coef == 0:
        return loss
    divergence = reverse_kl(
        logits, clone_logits.detach(), mask=valid, normalizer=normalizer, temperature=temperature, backend=backend
    )
    return loss + kl_coef * divergence


def dft_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""sg[q_y]·(−log q_y), mean over the labels: dynamic fine-tuning (DFT), the first term of paper 74 (ASFT).

    Its gradient is that of −q_y. `kk.policy_loss` with advantages 1, anchor_logprobs 0 and no clip has that gradient in
    one read; its value is −q_y.

    Args: logits: [*, V]. labels: [*], ignored ones are left out. the others: see `kk.divergence_loss`.

    >>> import torch, kldiv_kernels as kk
    >>> round(kk.recipes.dft_loss(torch.tensor([[2.0, 0.5, -1.0, 0.0]]), torch.tensor([1])).item(), 4)
    0.2919
    """
    valid = valid_tokens(labels, mask, ignore_index)
    logprob = selective_log_softmax(
        logits, torch.where(valid, labels, 0), temperature=temperature, mask=valid, vocab_size=vocab_size,
        backend=backend,
    )  # fmt: skip
    return aggregate(_dynamic(logprob), valid, "token-mean", normalizer, True)


def _dynamic(logprob: Tensor) -> Tensor:
    # q·log q is 0 at q = 0, where log q is infinite.
    return -logprob.detach().exp() * logprob.clamp_min(torch.finfo(logprob.dtype).min)


def asft_loss(
    logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    *,
    kl_coef: float = 0.05,
    kind: Literal["reverse_kl", "forward_kl"] = "reverse_kl",
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""sg[q_y]·(−log q_y) + λ·D, mean over the labels, D to the model before training; paper 74 (ASFT), eq. 6.

    Args:
        logits, reference_logits: [*, V]; the reference gets no gradient. labels: [*], ignored ones are left out.
        kl_coef: λ; 0.05 in the experiments, 0.1 in the code. kind: D, "reverse_kl" KL(q‖p), the paper's, or
            "forward_kl" KL(p‖q), the released code's. the others: see `kk.divergence_loss`.

    >>> import torch, kldiv_kernels as kk
    >>> s, t = torch.tensor([[2.0, 0.5, -1.0, 0.0]]), torch.tensor([[1.0, 1.5, -0.5, 0.0]])
    >>> round(kk.recipes.asft_loss(s, t, torch.tensor([1])).item(), 4)
    0.3103
    """
    if kind not in ("reverse_kl", "forward_kl"):
        raise ValueError(f"asft_loss: kind is {kind!r}; expected reverse_kl or forward_kl")
    valid = valid_tokens(labels, mask, ignore_index)
    stats = token_stats(
        logits, reference_logits.detach(), torch.where(valid, labels, 0),
        stats=("logprob", kind) if kl_coef != 0 else ("logprob",), temperature=temperature, mask=valid,
        vocab_size=vocab_size, backend=backend,
    )  # fmt: skip
    values = _dynamic(stats.logprob)
    values = values + kl_coef * stats[kind] if kl_coef != 0 else values
    return aggregate(values, valid, "token-mean", normalizer, True)


def two_vocabulary_cross_entropy(
    coarse_logits: Tensor,
    fine_logits: Tensor,
    coarse_labels: Tensor,
    fine_labels: Tensor,
    *,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    backend: Backend = "auto",
) -> Tensor:
    r"""Half the cross-entropy of coarse sub-tokens and half that of fine ones; paper 103 (Kronos).

    Args: coarse_logits: [*, V₁]. fine_logits: [*, V₂], computed with the coarse sub-token given. coarse_labels,
    fine_labels: [*]; each mean is over its own labels that are not ignored. mask: [*], of both. the others: see
    `kk.divergence_loss`.

    >>> import math, torch, kldiv_kernels as kk
    >>> loss = kk.recipes.two_vocabulary_cross_entropy(
    ...     torch.zeros(1, 4), torch.zeros(1, 16), torch.tensor([3]), torch.tensor([9]))
    >>> math.isclose(loss.item(), math.log(8), rel_tol=1e-6)
    True
    """
    halves = []
    for logits, labels in ((coarse_logits, coarse_labels), (fine_logits, fine_labels)):
        valid = valid_tokens(labels, mask, ignore_index)
        logprob = selective_log_softmax(
            logits, torch.where(valid, labels, 0), temperature=temperature, mask=valid, backend=backend
        )
        halves.append(aggregate(-logprob, valid, "token-mean", normalizer, True) / 2)
    return halves[0] + halves[1]
