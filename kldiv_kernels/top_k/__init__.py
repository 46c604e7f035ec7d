"""Losses and statistics on k tokens a position, with all other tokens as one more outcome.

`statistics` has the parts, per token, `divergences` the losses, `inputs` what the teacher's tokens have to be.
"""

from __future__ import annotations

from kldiv_kernels.top_k.divergences import (
    tail_checked,
    topk_divergence_loss,
    topk_divergence_of,
)
from kldiv_kernels.top_k.from_logits import topk_divergence_from_logits
from kldiv_kernels.top_k.inputs import looks_at, tail_of, teacher_checked
from kldiv_kernels.top_k.statistics import TopK, topk, topk_statistics_of, topk_token_stats

__all__ = [
    "TopK",
    "looks_at",
    "tail_checked",
    "tail_of",
    "teacher_checked",
    "topk",
    "topk_divergence_from_logits",
    "topk_divergence_loss",
    "topk_divergence_of",
    "topk_statistics_of",
    "topk_token_stats",
]
