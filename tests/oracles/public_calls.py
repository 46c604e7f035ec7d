"""Calls of the public functions on the same tensors, and what each is by definition, in plain PyTorch and float64.

For tests of what surrounds a call: torch.func, tracing, DTensor, inference mode. Shapes are [*, T, V], so that a sample
of a batch is one too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import kldiv_kernels as kk


class Given(NamedTuple):
    logits: Tensor
    teacher: Tensor
    labels: Tensor
    ids: Tensor
    topk_logprobs: Tensor
    old: Tensor
    advantages: Tensor
    weight: Tensor
    temperature: Tensor
    mask: Tensor


def given(*leading: int, vocab: int = 13, dtype: torch.dtype = torch.float32) -> Given:
    logits, teacher = (2 * torch.randn(*leading, vocab, dtype=dtype) for _ in "st")
    labels = torch.randint(vocab, leading)
    ids = torch.rand(*leading, vocab).argsort(-1)[..., :3]
    old = _logq(logits + 0.3 * torch.randn_like(logits)).gather(-1, labels[..., None])[..., 0].to(dtype)
    mask = torch.rand(leading) < 0.7
    mask[..., 0] = True
    return Given(
        logits, teacher, labels, ids, _logq(teacher).gather(-1, ids).to(dtype), old, torch.randn(leading, dtype=dtype),
        torch.rand(leading, dtype=dtype) + 0.5, torch.rand(leading, dtype=dtype) + 0.5, mask,
    )  # fmt: skip


class PublicCall(NamedTuple):
    ours: Callable[..., Tensor]
    definition: Callable[[Given], Tensor]


def _logq(logits: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    scale = temperature[..., None].double() if isinstance(temperature, Tensor) else temperature
    return (logits.double() / scale).log_softmax(-1)


def _kl(logp: Tensor, logq: Tensor) -> Tensor:
    return (logp.exp() * (logp - logq)).sum(-1)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum()


def _js(x: Given) -> Tensor:
    p, q = _logq(x.teacher, x.temperature), _logq(x.logits, x.temperature)
    m = (0.3 * p.exp() + 0.7 * q.exp()).log()
    return _mean(x.weight * (0.3 * _kl(p, m) + 0.7 * _kl(q, m)), x.mask)


def _stats_ours(x: Given, **options: str) -> Tensor:
    stats = kk.token_stats(
        x.logits, x.teacher, x.labels, stats=("logprob", "entropy", "reverse_kl"), mask=x.mask, **options
    )
    return stats.logprob * stats.entropy + stats.reverse_kl.square()


def _entropy(logq: Tensor) -> Tensor:
    return -(logq.exp() * logq).sum(-1)


def _stats(x: Given) -> Tensor:
    q = _logq(x.logits)
    logprob = q.gather(-1, x.labels[..., None])[..., 0]
    return (logprob * _entropy(q) + _kl(q, _logq(x.teacher)).square()) * x.mask


def _clipped(x: Given) -> Tensor:
    q = _logq(x.logits)
    ratio = (q.gather(-1, x.labels[..., None])[..., 0] - x.old).exp()
    term = torch.min(ratio * x.advantages, ratio.clamp(0.8, 1.2) * x.advantages)
    return -_mean(term + 0.1 * _entropy(q), x.mask)


def _batch(x: Given) -> Given:
    """Of one sequence: a batch of it."""
    return x if x.labels.dim() == 2 else Given(*(tensor[None] for tensor in x))


def _gspo_ours(x: Given, **options: str) -> Tensor:
    x = _batch(x)
    return kk.policy_loss(
        x.logits, x.labels, x.advantages, loss_type="gspo", old_logprobs=x.old, mask=x.mask, reference_logits=x.teacher,
        kl_coef=0.1, kl_estimator="forward_kl", **options,
    ).loss  # fmt: skip


def _gspo(x: Given) -> Tensor:
    x = _batch(x)
    q = _logq(x.logits)
    count = x.mask.sum(-1, keepdim=True)
    log_ratio = (q.gather(-1, x.labels[..., None])[..., 0] - x.old) * x.mask
    ratio = (log_ratio.sum(-1, keepdim=True) / count).exp()
    term = -torch.min(ratio * x.advantages, ratio.clamp(0.8, 1.2) * x.advantages) + 0.1 * _kl(_logq(x.teacher), q)
    return ((term * x.mask).sum(-1) / count[..., 0]).mean()


def _with_rest(logq: Tensor, ids: Tensor) -> Tensor:
    """The log-probabilities of the ids and of all others together."""
    among = logq.gather(-1, ids)
    return torch.cat([among, torch.log1p(-among.exp().sum(-1, keepdim=True))], dim=-1)


def bucket(x: Given, ids: Tensor) -> Tensor:
    return _kl(_with_rest(_logq(x.teacher), ids), _with_rest(_logq(x.logits), ids))


def _topk_stats_ours(x: Given, **options: str) -> Tensor:
    stats = kk.topk_token_stats(
        x.logits, x.ids, x.labels, stats=("topk_logprobs", "tail_logprob", "logprob"), **options
    )
    return stats.topk_logprobs.sum(-1) * stats.tail_logprob + stats.logprob


def _topk_stats(x: Given) -> Tensor:
    q = _logq(x.logits)
    outcomes = _with_rest(q, x.ids)
    return outcomes[..., :-1].sum(-1) * outcomes[..., -1] + q.gather(-1, x.labels[..., None])[..., 0]


CALLS = {
    "divergence_loss": PublicCall(
        lambda x, **options: kk.divergence_loss(
            x.logits, x.teacher, "js", beta=0.3, mask=x.mask, weight=x.weight, temperature=x.temperature, **options
        ),
        _js,
    ),
    "divergence_loss, each token": PublicCall(
        lambda x, **options: kk.reverse_kl(x.logits, x.teacher, reduction="none", weight=x.weight, **options),
        lambda x: x.weight * _kl(_logq(x.logits), _logq(x.teacher)),
    ),
    "divergence_loss, no options": PublicCall(
        lambda x, **options: kk.divergence_loss(x.logits, x.teacher, **options),
        lambda x: _kl(_logq(x.teacher), _logq(x.logits)).mean(),
    ),
    "token_stats": PublicCall(_stats_ours, _stats),
    "entropy": PublicCall(
        lambda x, **options: kk.entropy(x.logits, temperature=x.temperature, **options),
        lambda x: _entropy(_logq(x.logits, x.temperature)),
    ),
    "selective_log_softmax": PublicCall(
        lambda x, **options: kk.selective_log_softmax(x.logits, x.ids, **options),
        lambda x: _logq(x.logits).gather(-1, x.ids),
    ),
    "policy_loss": PublicCall(
        lambda x, **options: kk.policy_loss(
            x.logits, x.labels, x.advantages, old_logprobs=x.old, mask=x.mask, entropy_coef=0.1,
            aggregation="token-mean", **options,
        ).loss,
        _clipped,
    ),
    "policy_loss of sequences": PublicCall(_gspo_ours, _gspo),
    "topk_divergence_loss": PublicCall(
        lambda x, **options: kk.topk_divergence_loss(x.logits, x.ids, x.topk_logprobs, mask=x.mask, **options),
        lambda x: _mean(bucket(x, x.ids), x.mask),
    ),
    "topk_divergence_from_logits": PublicCall(
        lambda x, **options: kk.topk_divergence_from_logits(x.logits, x.teacher, k=3, reduction="none", **options),
        lambda x: bucket(x, x.teacher.topk(3, -1).indices),
    ),
    "topk_token_stats": PublicCall(_topk_stats_ours, _topk_stats),
    "topk": PublicCall(
        lambda x, **options: kk.topk(x.logits, 3, **options).log_mass,
        lambda x: _logq(x.logits).topk(3, -1).values.logsumexp(-1),
    ),
}  # fmt: skip
