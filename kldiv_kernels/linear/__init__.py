"""Losses and statistics from hidden states and the model's head: the logits of all tokens are never there at once.

head.py          the head, and what is refused as one
gemm.py          the multiplications
chunks.py        which rows are computed together
work.py          the loop over them
operators.py     what PyTorch sees
source.py        hidden states in the place of logits
functions.py     the public functions
projection.py    a teacher for forward KL in [N, H] numbers
"""

from __future__ import annotations

from kldiv_kernels.linear.chunks import chunk_shape
from kldiv_kernels.linear.functions import (
    linear_divergence_loss,
    linear_policy_loss,
    linear_token_stats,
    linear_topk_divergence_loss,
)
from kldiv_kernels.linear.gemm import Gemm
from kldiv_kernels.linear.head import Head
from kldiv_kernels.linear.projection import TeacherProjection, teacher_projection
from kldiv_kernels.linear.source import AnyHead, HiddenStates, hidden_states

__all__ = [
    "AnyHead",
    "Gemm",
    "Head",
    "HiddenStates",
    "TeacherProjection",
    "chunk_shape",
    "hidden_states",
    "linear_divergence_loss",
    "linear_policy_loss",
    "linear_token_stats",
    "linear_topk_divergence_loss",
    "teacher_projection",
]
