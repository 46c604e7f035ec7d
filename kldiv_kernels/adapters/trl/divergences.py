r"""TRL's divergence functions: `generalized_jsd_loss`, and two of SDFT and SDPO. Those over k tokens are in `topk`.

p teacher, q student, both at the temperature; TRL's β (SDFT's alpha) is that of `divergence_loss("js")`:

    β = 0   KL(p‖q)        β = 1   KL(q‖p)        else   β·KL(p‖m) + (1−β)·KL(q‖m),  m = βp + (1−β)q

Rows with logits at −inf have the right number, or +inf where the divergence is infinite; TRL's is NaN. The dtype is
that of TRL's formulas, to which the float32 result is rounded once. A mean over no token is 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kldiv_kernels.adapters.trl.calls import backend_for, bound, dtype_of, is_served
from kldiv_kernels.adapters.trl.topk import serves_topk, topk_divergence
from kldiv_kernels.choices import Backend, Support
from kldiv_kernels.losses import divergence_loss
from kldiv_kernels.stats import token_stats

# Whose top k IW-OPD takes.
_SUPPORT: dict[float, Support] = {0: "teacher", 1: "student"}


def generalized_jsd_loss(original: Callable[..., Tensor], backend: Backend) -> Callable[..., Tensor]:
    """GKD's, GOLD's and IW-OPD's static method.

    TRL's own serves reduction "none", which is elementwise, as is "mean" of a top_k, and probabilities in place of
    logits.
    """

    @functools.wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Tensor:
        call = bound(original, args, kwargs)
        student, teacher, labels = call.pop("student_logits"), call.pop("teacher_logits"), call.pop("labels")
        beta, temperature = call.pop("beta"), call.pop("temperature")
        reduction, items = call.pop("reduction"), call.pop("num_items_in_batch")
        add_tail, k = call.pop("add_tail", True), call.pop("top_k", 0)
        few = 0 < k < student.shape[-1]
        reductions = ("batchmean", "sum") if few else ("batchmean", "sum", "mean")
        # What is left is probabilities for logits, or an argument of a later version.
        served = not any(call.values()) and (serves_topk if few else is_served)(student, teacher)
        if not served or (items is None and reduction not in reductions):
            return original(*args, **kwargs)
        if items is not None:
            items = torch.as_tensor(items, device=student.device)
        elif reduction != "sum":
            items = student.shape[0] if labels is None else (labels != -100).sum().clamp_min(1)
            if reduction == "mean":
                items = student.numel() if labels is None else items * student.shape[-1]
        counted: dict[str, Any] = {"normalizer": items, "reduction": "sum" if items is None else "mean"}
        counted |= {"labels": labels, "temperature": temperature}
        if few:
            loss = topk_divergence(
                student, teacher, beta, k=k, support=_SUPPORT.get(beta, "union"), add_tail=add_tail, backend=backend,
                **counted,
            )  # fmt: skip
        else:
            loss = divergence_loss(student, teacher, **_kind(beta), **counted, backend=backend_for(backend, student))
        return loss.to(dtype_of(student, teacher))

    return replaced


def full_logit_loss(original: Callable[..., Tensor], backend: Backend) -> Callable[..., Tensor]:
    """`compute_full_logit_self_distillation_loss`, [batch, tokens]."""

    @functools.wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Tensor:
        call = bound(original, args, kwargs)
        student, teacher = call["student_logits"], call["teacher_logits"]
        if not is_served(student, teacher):
            return original(*args, **kwargs)
        loss = divergence_loss(
            student, teacher, **_kind(call["distillation_alpha"]), reduction="none",
            backend=backend_for(backend, student),
        )  # fmt: skip
        return loss.to(dtype_of(student, teacher))

    return replaced


def sampled_token_loss(original: Callable[..., Tensor], backend: Backend) -> Callable[..., Tensor]:
    """`compute_sampled_token_self_distillation_loss`, [batch, tokens]: sg[log q_y − log p_y]·log q_y.

    TRL's own serves (refuses) an alpha other than 1.
    """

    @functools.wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Tensor:
        call = bound(original, args, kwargs)
        student, teacher, token_ids = call["student_logits"], call["teacher_logits"], call["completion_ids"]
        served = is_served(student, teacher) and token_ids.shape == student.shape[:-1]
        if not served or call["distillation_alpha"] != 1:
            return original(*args, **kwargs)
        stats = token_stats(
            student, teacher.detach(), token_ids, stats=("logprob", "reference_logprob"),
            backend=backend_for(backend, student),
        )  # fmt: skip
        loss = (stats.logprob - stats.reference_logprob).detach() * stats.logprob
        return loss.to(dtype_of(student, teacher))

    return replaced


def _kind(beta: float) -> dict[str, Any]:
    if beta in (0, 1):
        return {"kind": "reverse_kl" if beta == 1 else "forward_kl"}
    return {"kind": "js", "beta": float(beta)}
