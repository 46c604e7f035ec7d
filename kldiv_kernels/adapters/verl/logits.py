r"""verl's functions of raw logits: log-probabilities, entropy, and the forward KL on a teacher's top k.

With p the teacher's and q the student's probabilities of the K ids that the teacher gives for a token:

    forward KL, top k   Σ_k p_k (log p_k − log q_k)

Neither side is renormalised and the rest of the vocabulary is left out, so that it can be negative (verl clamps it
afterwards). Gradient with respect to student logit j: (Σ_k p_k) q_j − p_j [j among the ids].
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from kldiv_kernels import inputs
from kldiv_kernels.adapters.config import read
from kldiv_kernels.stats import entropy, selective_log_softmax


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """log softmax(logits) at the labels, differentiable.

    Args:
        logits: [*, V], at their temperature already.
        labels: [*] integers; -100 gives 0 without gradient.
        inplace_backward: no effect: the gradient is a tensor of its own.

    Returns:
        [*] float32, in nats. Errors: see `kldiv_kernels.selective_log_softmax`.

    >>> logprobs_from_logits(torch.zeros(1, 2, 4), torch.tensor([[0, 3]])).exp()
    tensor([[0.2500, 0.2500]])
    """
    return selective_log_softmax(logits, labels)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) [*, V], differentiable: [*] float32, in nats. A column at −inf has no share in it.

    >>> round(entropy_from_logits(torch.tensor([[0.0, 0.0, float("-inf")]])).exp().item(), 4)
    2.0
    """
    return entropy(logits)


def compute_forward_kl_topk(
    student_logits: Tensor, teacher_topk_log_probs: Tensor, teacher_topk_ids: Tensor, config: Any, data_format: str
) -> dict[str, Tensor]:
    """Σ_k p_k (log p_k − log q_k) over the teacher's top k, per token.

    Args:
        student_logits: [1, tokens, V], at their temperature already.
        teacher_topk_log_probs, teacher_topk_ids: [1, tokens, K], or nested [batch, *, K]. Under Ulysses sequence
            parallelism they are whole, and this rank's slice is taken.
        config: verl's DistillationConfig; of `config.distillation_loss`, `log_prob_min_clamp` (default None: off)
            bounds both log-probabilities from below, for the loss only. The student's has no gradient there.
        data_format: "thd" or "bshd"; the shapes say which it is.

    Returns:
        Each [1, tokens]: `distillation_losses` and `student_mass` (Σ q_k), float32 with gradient; `teacher_mass`
        (Σ p_k); `overlap_count`, how many of the teacher's ids are among the student's top K;
        `overlap_token_advantage`, the mean over those of p_k (log q_k − log p_k), 0 without any.

    Raises:
        ValueError, TypeError, IndexError: naming the argument, what it was and what is allowed.

    >>> logits, ids = torch.zeros(1, 1, 4, requires_grad=True), torch.tensor([[[2, 0]]])
    >>> out = compute_forward_kl_topk(logits, torch.tensor([[[0.5, 0.25]]]).log(), ids, None, "thd")
    >>> round(out["distillation_losses"].item(), 4), round(out["student_mass"].item(), 4)  # ½·log 2 + ¼·log 1
    (0.3466, 0.5)
    """
    log_p, ids = _of_this_rank(teacher_topk_log_probs), _of_this_rank(teacher_topk_ids)
    log_q, log_p = on_teachers_ids("compute_forward_kl_topk", student_logits, log_p, ids)
    student_mass, teacher_mass = log_q.exp().sum(-1), log_p.exp().sum(-1)
    least = read(read(config, "distillation_loss"), "log_prob_min_clamp")
    if least is not None:
        log_q, log_p = log_q.clamp_min(least), log_p.clamp_min(least)
    p = log_p.exp()
    terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
    with torch.no_grad():
        # Whether an id is in the student's top K needs the K-th logit only: nothing of size [tokens, K, K].
        kth = student_logits.topk(ids.shape[-1], dim=-1).values[..., -1:]
        shared = student_logits.gather(-1, ids) >= kth
        count = shared.sum(-1)
        advantage = torch.where(shared, -terms, 0.0).sum(-1) / count.clamp_min(1)
    return {
        "distillation_losses": terms.sum(-1),
        "student_mass": student_mass,
        "teacher_mass": teacher_mass,
        "overlap_count": count,
        "overlap_token_advantage": advantage,
    }


def on_teachers_ids(
    where: str, student_logits: Tensor, log_p: Tensor, ids: Tensor, **columns: Any
) -> tuple[Tensor, Tensor]:
    """log q at the teacher's ids, and the teacher's own log-probabilities in its dtype; both [*, K].

    Args:
        columns: where the logits are this rank's columns of the vocabulary, the arguments of `token_stats` for that.
    """
    # Of a group, a process may have no columns at all; its other checks are those of token_stats.
    if not columns:
        inputs.logits_checked(where, student_logits, "student_logits")
    if ids.dim() != student_logits.dim() or ids.shape[:-1] != student_logits.shape[:-1]:
        raise ValueError(
            f"{where}: teacher_topk_ids has shape {list(ids.shape)}; expected {[*student_logits.shape[:-1], 'K']}"
        )
    if log_p.shape != ids.shape:
        raise ValueError(
            f"{where}: teacher_topk_log_probs has shape {list(log_p.shape)}; expected {list(ids.shape)} like "
            f"teacher_topk_ids"
        )
    try:
        log_q = selective_log_softmax(student_logits, ids, **columns)
    except (IndexError, TypeError, ValueError) as error:
        raise type(error)(str(error).replace("token_stats: labels", f"{where}: teacher_topk_ids")) from None
    return log_q, log_p.detach().to(log_q.dtype)


def _of_this_rank(given: Tensor) -> Tensor:
    """[1, tokens, K]"""
    whole = given.values().unsqueeze(0) if given.is_nested else given
    # Who runs sequence-parallel has verl's module loaded.
    ulysses = sys.modules.get("verl.utils.ulysses")
    if ulysses is None or ulysses.get_ulysses_sequence_parallel_world_size() <= 1:
        return whole
    part: Tensor = ulysses.slice_input_tensor(whole, dim=1)
    return part
