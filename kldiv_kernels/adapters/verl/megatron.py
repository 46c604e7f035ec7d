r"""verl's forward KL on a teacher's top k for Megatron, whose logits are this rank's columns of the vocabulary.

Formula and gradient are those of logits.py; the student's softmax is over the columns of all ranks of the group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kldiv_kernels.adapters.config import read
from kldiv_kernels.adapters.verl.logits import on_teachers_ids
from kldiv_kernels.parallel import Group, together
from kldiv_kernels.top_k import topk


def compute_forward_kl_topk(
    student_logits: Tensor,
    teacher_topk_log_probs: Tensor,
    teacher_topk_ids: Tensor,
    config: Any,
    data_format: str,
    *,
    group: Group | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
) -> dict[str, Tensor]:
    """Σ_k p_k (log p_k − log q_k) over the teacher's top k, per token: that of
    `verl.trainer.distillation.megatron.losses`.

    Args:
        student_logits: [batch, tokens, V / ranks], this rank's columns at their temperature already.
        teacher_topk_log_probs, teacher_topk_ids: [batch, tokens, K] of this rank's tokens, or nested [batch, *, K] of
            whole sequences, of which verl's own function then takes this context-parallel rank's. Ids are those of the
            whole vocabulary.
        config: verl's DistillationConfig; of `config.distillation_loss`, `log_prob_min_clamp` (default None: off)
            bounds both log-probabilities from below. The student's has no gradient there.
        data_format: "thd" or "bshd", which nested tensors are laid out in.
        group: the process group of the columns. Default: Megatron's tensor-parallel group.
        vocab_start, vocab_size: see `kldiv_kernels.token_stats`; for columns that the ranks do not share evenly, or
            padding.

    Returns:
        Each [batch, tokens], the same on all ranks of the group: `distillation_losses`, float32 with gradient;
        `student_mass` (Σ q_k) and `teacher_mass` (Σ p_k), of the bounded ones; `overlap_count`, how many of the
        teacher's ids are among the student's top K; `overlap_token_advantage`, the mean over those of
        p_k (log q_k − log p_k), 0 without any.

    Raises:
        ImportError: no group, and no Megatron; nested tensors, and no verl with Megatron. ValueError, TypeError,
        IndexError: naming the argument, what it was and what is allowed.
    """
    where = "compute_forward_kl_topk"
    if data_format not in ("thd", "bshd"):
        raise ValueError(f"{where}: data_format is {data_format!r}; expected thd or bshd")
    return _of_group(
        where, student_logits, teacher_topk_log_probs, teacher_topk_ids, config, data_format,
        group=_tensor_parallel_group(where) if group is None else group, vocab_start=vocab_start, vocab_size=vocab_size,
    )  # fmt: skip


@together
def _of_group(
    where: str,
    student_logits: Tensor,
    teacher_topk_log_probs: Tensor,
    teacher_topk_ids: Tensor,
    config: Any,
    data_format: str,
    **columns: Any,
) -> dict[str, Tensor]:
    log_p, ids = (_of_this_rank(where, x, data_format) for x in (teacher_topk_log_probs, teacher_topk_ids))
    log_q, log_p = on_teachers_ids(where, student_logits, log_p, ids, **columns)
    with torch.no_grad():
        # Whether an id is in the student's top K needs the K-th value only: nothing of size [tokens, K, K].
        shared = log_q >= topk(student_logits, ids.shape[-1], **columns).values[..., -1:]
    least = read(read(config, "distillation_loss"), "log_prob_min_clamp")
    if least is not None:
        log_q, log_p = log_q.clamp_min(least), log_p.clamp_min(least)
    p = log_p.exp()
    terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
    with torch.no_grad():
        count = shared.sum(-1)
        advantage = torch.where(shared, -terms, 0.0).sum(-1) / count.clamp_min(1)
        student_mass = log_q.exp().sum(-1)
    return {
        "distillation_losses": terms.sum(-1),
        "student_mass": student_mass,
        "teacher_mass": p.sum(-1),
        "overlap_count": count,
        "overlap_token_advantage": advantage,
    }


def _tensor_parallel_group(where: str) -> Group:
    try:
        from megatron.core import parallel_state
    except ImportError as error:
        raise ImportError(
            f"{where}: group is None, and megatron.core.parallel_state cannot be imported ({error}); expected the "
            f"process group of the columns, or Megatron in this environment"
        ) from error
    group: Group = parallel_state.get_tensor_model_parallel_group()
    return group


def _of_this_rank(where: str, given: Tensor, data_format: str) -> Tensor:
    """[batch, tokens, K]"""
    if not given.is_nested:
        return given
    try:
        from verl.models.mcore import util
    except ImportError as error:
        raise ImportError(
            f"{where}: the teacher's tensors are nested, and verl.models.mcore.util cannot be imported ({error}); "
            f"expected verl 0.9.1 and Megatron, which lay them out, or [batch, tokens, K]"
        ) from error
    laid_out = util.preprocess_thd_engine if data_format == "thd" else util.preprocess_bshd_engine
    part: Tensor = laid_out(given, pre_process=True)[0]
    return part
