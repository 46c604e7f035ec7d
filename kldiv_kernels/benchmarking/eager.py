"""The losses as one writes them in plain PyTorch: from logits in any dtype, in float32, the mean over tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from kldiv_kernels.benchmarking.cases import ENTROPY_COEFFICIENT, GRPO_CLIP, JS_BETA, Inputs
from kldiv_kernels.benchmarking.defaults import LOGPROB_ENTROPY


def _forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    logq, logp = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
    return F.kl_div(logq, logp, reduction="batchmean", log_target=True)


def _reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    logq, logp = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
    return F.kl_div(logp, logq, reduction="batchmean", log_target=True)


def _jeffreys(student: Tensor, teacher: Tensor) -> Tensor:
    logq, logp = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
    return ((logp.exp() - logq.exp()) * (logp - logq)).sum(-1).mean()


def _js(student: Tensor, teacher: Tensor) -> Tensor:
    logq, logp = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
    p, q = logp.exp(), logq.exp()
    logm = (JS_BETA * p + (1 - JS_BETA) * q).log()
    return (JS_BETA * p * (logp - logm) + (1 - JS_BETA) * q * (logq - logm)).sum(-1).mean()


def _hellinger(student: Tensor, teacher: Tensor) -> Tensor:
    logq, logp = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
    return (1 - (0.5 * (logp + logq)).exp().sum(-1)).mean()


def _tvd(student: Tensor, teacher: Tensor) -> Tensor:
    return 0.5 * (student.float().softmax(-1) - teacher.float().softmax(-1)).abs().sum(-1).mean()


def _logprob_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    logq = F.log_softmax(logits.float(), -1)
    logprob = logq.gather(-1, labels[:, None]).squeeze(-1)
    entropy = -(logq.exp() * logq).sum(-1)
    return -logprob.mean() - ENTROPY_COEFFICIENT * entropy.mean()


def grpo(logits: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Loss, and the entropy that a trainer logs."""
    assert inputs.labels is not None
    logq = F.log_softmax(logits.float(), -1)
    logprob = logq.gather(-1, inputs.labels[:, None]).squeeze(-1)
    entropy = -(logq.exp() * logq).detach().sum(-1).mean()
    return clipped_surrogate(logprob, inputs), entropy


def clipped_surrogate(logprob: Tensor, inputs: Inputs) -> Tensor:
    assert inputs.advantages is not None
    assert inputs.old_logprobs is not None
    ratio = (logprob - inputs.old_logprobs).exp()
    clipped = ratio.clamp(1 - GRPO_CLIP, 1 + GRPO_CLIP)
    return -torch.min(ratio * inputs.advantages, clipped * inputs.advantages).mean()


def _rest(logprobs: Tensor) -> Tensor:
    """log(1 − Σ exp(logprobs)) as trainers have it, with a floor."""
    return torch.log1p(-logprobs.exp().sum(-1).clamp(max=1 - 1e-7))


def topk(logits: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    student = F.log_softmax(logits.float(), -1).gather(-1, ids)
    p, q = (torch.cat([x, _rest(x)[:, None]], dim=-1) for x in (logprobs, student))
    return (p.exp() * (p - q)).sum(-1).mean()


def topk_from_logits(logits: Tensor, teacher: Tensor, k: int) -> Tensor:
    ids = logits.detach().topk(k, dim=-1).indices
    return topk(logits, ids, F.log_softmax(teacher.float(), -1).gather(-1, ids))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jeffreys": _jeffreys,
    "js": _js,
    "hellinger": _hellinger,
    "tvd": _tvd,
    LOGPROB_ENTROPY: _logprob_entropy,
}
