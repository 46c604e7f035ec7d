r"""SDFT's and SDPO's `compute_topk_self_distillation_loss`: a divergence over the K tokens the student finds likeliest.

a, b [*, K] are the log-probabilities of student and teacher at those tokens, over the whole vocabulary, from one read
of each row and with a gradient that reaches all of it. What remains is on [*, K], or on [*, K + 1] with the mass of all
other tokens as one more:

    with tail       a_tail = logsumexp of the other columns − logsumexp of all, and so for b
    without         a − logsumexp(a), and so for b

TRL takes the tail from the captured mass, log(1 − Σ e^a), and holds Σ e^a below 1 − 1e-7: a student surer than that has
a constant tail of 1e-7 without a gradient, so that nothing tells it what the teacher thinks of the other tokens. Only
dropping that bound would leave 1 − Σ e^a as rounding error. Here the other columns are summed themselves, from a copy
of the row with the K at −inf: exact however small the tail, with gradients that do not cancel. Where no other column is
left (K the whole vocabulary, or all others at −inf) the tail has no part in value and gradient.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kldiv_kernels.adapters.trl.calls import backend_for, bound, dtype_of, is_served
from kldiv_kernels.stats import token_stats

# What the library takes for −inf.
_NO_LOGIT = -1e30


def topk_loss(original: Callable[..., Tensor], backend: str) -> Callable[..., Tensor]:
    """[batch, tokens], in TRL's dtype."""

    @functools.wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Tensor:
        call = bound(original, args, kwargs)
        student, teacher = call["student_logits"], call["teacher_logits"]
        if not is_served(student, teacher):
            return original(*args, **kwargs)
        likeliest = student.detach().topk(call["distillation_topk"], dim=-1).indices
        logprobs = with_tail if call["distillation_add_tail"] else renormalised
        log_q, log_p = (logprobs(logits, likeliest, backend_for(backend, logits)) for logits in (student, teacher))
        return divergence(log_p, log_q, call["distillation_alpha"]).to(dtype_of(student, teacher))

    return replaced


def with_tail(logits: Tensor, token_ids: Tensor, backend: str = "auto") -> Tensor:
    """Logits [*, V] and ids [*, K] → log-probabilities [*, K + 1]; the last is of all other tokens together.

    >>> import torch
    >>> with_tail(torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log(), torch.tensor([[0, 1]])).exp()
    tensor([[0.5000, 0.2500, 0.2500]])
    """
    stats = token_stats(logits, labels=token_ids, stats=("logprob", "logsumexp"), backend=backend)
    others = logits.scatter(-1, token_ids, -math.inf)
    # A row without a logit would be NaN, and so might its gradient.
    any_left = others.detach().amax(-1) > _NO_LOGIT
    rest = token_stats(others, stats=("logsumexp",), mask=any_left, backend=backend).logsumexp
    tail = torch.where(any_left, rest - stats.logsumexp, -math.inf)
    return torch.cat([stats.logprob, tail[..., None]], dim=-1)


def renormalised(logits: Tensor, token_ids: Tensor, backend: str = "auto") -> Tensor:
    """Logits [*, V] and ids [*, K] → log-probabilities [*, K] of a distribution over these alone."""
    logprobs = token_stats(logits, labels=token_ids, stats=("logprob",), backend=backend).logprob
    return logprobs - logprobs.logsumexp(-1, keepdim=True)


def divergence(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """[*]: KL(p‖q) for alpha 0, KL(q‖p) for 1, else alpha·KL(p‖m) + (1 − alpha)·KL(q‖m), m = alpha·p + (1 − alpha)·q.

    0·log 0 = 0: a token that both exclude has no part in value and gradient.

    >>> import torch
    >>> log_p, log_q = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.25, 0.25]]).log()
    >>> round(divergence(log_p, log_q, 0.0).item(), 4), divergence(log_p, log_q, 1.0).item()
    (0.3466, inf)
    """
    if alpha == 0:
        return _kl(log_p, log_q)
    if alpha == 1:
        return _kl(log_q, log_p)
    neither = log_p.isneginf() & log_q.isneginf()
    # logaddexp has no gradient where both are −inf; m is of no account there.
    p, q = log_p.masked_fill(neither, 0.0), log_q.masked_fill(neither, 0.0)
    log_m = torch.logaddexp(p + math.log(alpha), q + math.log1p(-alpha))
    return alpha * _kl(log_p, log_m) + (1 - alpha) * _kl(log_q, log_m)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    none = log_p.isneginf()
    # Both branches of a where have a gradient: the one not taken must be finite.
    p, q = log_p.masked_fill(none, 0.0), log_q.masked_fill(none, 0.0)
    return torch.where(none, 0.0, p.exp() * (p - q)).sum(-1)
