r"""TRL's divergences over k tokens: `compute_topk_self_distillation_loss` of SDFT and SDPO, `top_k` of IW-OPD.

Both are `topk_divergence_from_logits`: log-probabilities over the whole vocabulary at the k tokens, on which the
divergence is taken with the mass of all others as one more outcome, or renormalised. SDFT takes the tokens that the
student finds likeliest; IW-OPD the teacher's for KL(p‖q), the student's for KL(q‖p), and either's for what is between.

TRL takes the others' mass from the captured one, log(1 − Σ e^a), and holds Σ e^a below 1 − 1e-7: a student surer than
that has a constant tail of 1e-7 without a gradient, so that nothing tells it what the teacher thinks of the other
tokens. Only dropping that bound would leave 1 − Σ e^a as rounding error. Here the others are summed themselves: exact
however small their mass, with gradients that do not cancel. Where none is left (k the whole vocabulary, or all others
at −inf) they have no part in value and gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from kldiv_kernels.adapters.trl.calls import backend_for, bound, dtype_of, is_served
from kldiv_kernels.choices import Backend, Support
from kldiv_kernels.top_k import topk_divergence_from_logits


def topk_loss(original: Callable[..., Tensor], backend: Backend) -> Callable[..., Tensor]:
    """[batch, tokens], in TRL's dtype."""

    @functools.wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Tensor:
        call = bound(original, args, kwargs)
        student, teacher = call["student_logits"], call["teacher_logits"]
        if not serves_topk(student, teacher):
            return original(*args, **kwargs)
        loss = topk_divergence(
            student, teacher, call["distillation_alpha"], k=call["distillation_topk"], support="student",
            add_tail=call["distillation_add_tail"], reduction="none", backend=backend,
        )  # fmt: skip
        return loss.to(dtype_of(student, teacher))

    return replaced


def serves_topk(student: Tensor, teacher: Tensor) -> bool:
    return is_served(student, teacher) and not teacher.requires_grad


def topk_divergence(
    student: Tensor, teacher: Tensor, beta: float, *, k: int, support: Support, add_tail: bool, backend: Backend,
    **options: Any,
) -> Tensor:  # fmt: skip
    """β·KL(p‖m) + (1 − β)·KL(q‖m), m = βp + (1 − β)q; KL(p‖q) for β = 0 and KL(q‖p) for 1."""
    return topk_divergence_from_logits(
        student, teacher, "js", beta=float(beta), k=k, support=support, tail="bucket" if add_tail else "renormalize",
        backend=backend_for(backend, student), **options,
    )  # fmt: skip
