"""The implementations that are compared: ours, and what a user would run today.

Each takes the inputs of a case and returns its scalar loss, the mean over tokens. `eager` is what one writes in
plain PyTorch, in fp32 because bf16 log-softmaxes are too coarse to train on; `compile` is `torch.compile` of the
same function; `trl` calls TRL's functions as its trainers do, on logits in the model's dtype.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.benchmarking.cases import (
    ENTROPY_COEFFICIENT,
    GRPO,
    GRPO_CLIP,
    JS_BETA,
    TOPK,
    TOPK_FROM_LOGITS,
    Case,
    Inputs,
)
from kldiv_kernels.benchmarking.defaults import LOGPROB_ENTROPY
from kldiv_kernels.choices import Backend

Loss = Callable[[Inputs], Tensor]

OURS = "kldiv_kernels"
PEERS = ("eager", "compile", "trl")
# Beside a top-k loss: what reading the logits once and writing their gradient takes for one label.
LOGPROB = "logprob"
# What a reader calls them.
LABELS = {
    "eager": "PyTorch eager",
    "compile": "torch.compile",
    "trl": "TRL",
    LOGPROB: "our log-probability loss",
}


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


def _grpo(logits: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
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


def _topk(logits: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    student = F.log_softmax(logits.float(), -1).gather(-1, ids)
    p, q = (torch.cat([x, _rest(x)[:, None]], dim=-1) for x in (logprobs, student))
    return (p.exp() * (p - q)).sum(-1).mean()


def _topk_from_logits(logits: Tensor, teacher: Tensor, k: int) -> Tensor:
    ids = logits.detach().topk(k, dim=-1).indices
    return _topk(logits, ids, F.log_softmax(teacher.float(), -1).gather(-1, ids))


_EAGER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jeffreys": _jeffreys,
    "js": _js,
    "hellinger": _hellinger,
    "tvd": _tvd,
    LOGPROB_ENTROPY: _logprob_entropy,
}
# TRL has one divergence, with β; its conventions for β = 0 and β = 1 are the package's.
_TRL_BETA = {"forward_kl": 0.0, "js": JS_BETA, "reverse_kl": 1.0}


def names_for(case: Case, peers: tuple[str, ...] = PEERS) -> list[str]:
    """Ours first, then those of `peers` that have the case's loss."""
    has = {
        "eager": case.kind in (*_EAGER, GRPO, TOPK, TOPK_FROM_LOGITS),
        "compile": case.kind in (*_EAGER, GRPO, TOPK, TOPK_FROM_LOGITS),
        "trl": case.kind in (*_TRL_BETA, LOGPROB_ENTROPY, GRPO, TOPK_FROM_LOGITS),
    }
    ours = [OURS, LOGPROB] if case.kind == TOPK else [OURS]
    return [*ours, *(name for name in PEERS if name in peers and has[name])]


def build(name: str, case: Case) -> Loss:
    """The implementation of that name. ImportError where its package is missing."""
    if name == OURS:
        return _ours(case)
    if name == LOGPROB:
        return lambda inputs: -kk.token_stats(inputs.logits, labels=inputs.labels, stats=("logprob",)).logprob.mean()
    if name == "trl":
        return _trl(case)
    if case.kind in (TOPK, TOPK_FROM_LOGITS):
        return _topk_peer(name, case)
    if case.kind == GRPO:
        policy = _compiled(_grpo) if name == "compile" else _grpo
        return lambda inputs: policy(inputs.logits, inputs)[0]
    function = _compiled(_EAGER[case.kind]) if name == "compile" else _EAGER[case.kind]
    return lambda inputs: function(inputs.logits, _second(inputs))


def _topk_peer(name: str, case: Case) -> Loss:
    if case.kind == TOPK_FROM_LOGITS:
        both = _compiled(_topk_from_logits) if name == "compile" else _topk_from_logits
        return lambda inputs: both(inputs.logits, _second(inputs), case.k)
    one = _compiled(_topk) if name == "compile" else _topk
    return lambda inputs: one(inputs.logits, *_known(inputs))


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Each case is compiled on its own, for its own shape, as a training loop with fixed shapes would have it."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def _second(inputs: Inputs) -> Tensor:
    second = inputs.labels if inputs.reference is None else inputs.reference
    assert second is not None
    return second


def _ours(case: Case) -> Loss:
    if case.kind == LOGPROB_ENTROPY:

        def loss(inputs: Inputs) -> Tensor:
            stats = kk.token_stats(inputs.logits, labels=inputs.labels, stats=("logprob", "entropy"))
            return -stats.logprob.mean() - ENTROPY_COEFFICIENT * stats.entropy.mean()

        return loss
    if case.kind == GRPO:
        return lambda inputs: grpo_loss(case, inputs, "auto")
    if case.kind == TOPK:
        return lambda inputs: topk_loss(inputs, "auto")
    if case.kind == TOPK_FROM_LOGITS:
        return lambda inputs: kk.topk_divergence_from_logits(
            inputs.logits, _second(inputs), k=case.k, support="student"
        )
    beta = JS_BETA if case.kind == "js" else None
    return lambda inputs: kk.divergence_loss(inputs.logits, _second(inputs), case.kind, beta=beta)


def topk_loss(inputs: Inputs, backend: Backend) -> Tensor:
    return kk.topk_divergence_loss(inputs.logits, *_known(inputs), backend=backend)


def _known(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The teacher's ids and log-probabilities."""
    assert inputs.topk_ids is not None
    assert inputs.topk_logprobs is not None
    return inputs.topk_ids, inputs.topk_logprobs


def grpo_loss(case: Case, inputs: Inputs, backend: Backend) -> Tensor:
    """policy_loss as a trainer calls it: [sequences, tokens]."""
    assert inputs.labels is not None
    assert inputs.advantages is not None
    assert inputs.old_logprobs is not None
    shape = (case.sequences, case.rows // case.sequences)
    tokens = [x.view(shape) for x in (inputs.labels, inputs.advantages, inputs.old_logprobs)]
    logits = inputs.logits.view(*shape, case.vocab)
    return kk.policy_loss(
        logits, tokens[0], tokens[1], loss_type="dapo", old_logprobs=tokens[2], clip_low=GRPO_CLIP,
        clip_high=GRPO_CLIP, backend=backend,
    ).loss  # fmt: skip


def _trl(case: Case) -> Loss:
    # TRL prints a notice about its experimental modules, where the distillation trainers live.
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    if not case.is_divergence:
        from trl.trainer.utils import selective_log_softmax_and_entropy

        def loss(inputs: Inputs) -> Tensor:
            # In sequences, as trainers have them: it takes them one by one.
            shape = (case.sequences, case.rows // case.sequences)
            logprob, entropy = selective_log_softmax_and_entropy(
                inputs.logits.view(*shape, case.vocab), _second(inputs).view(shape),
                entropy_requires_grad=case.kind == LOGPROB_ENTROPY,
            )  # fmt: skip
            if case.kind == GRPO:
                return clipped_surrogate(logprob.reshape(-1).float(), inputs)
            result: Tensor = -logprob.mean() - ENTROPY_COEFFICIENT * entropy.mean()
            return result

        return loss
    if case.kind == TOPK_FROM_LOGITS:
        from trl.experimental.sdft.loss_utils import compute_topk_self_distillation_loss as trl_topk

        def topk(inputs: Inputs) -> Tensor:
            shape = (case.sequences, case.rows // case.sequences, case.vocab)
            losses: Tensor = trl_topk(
                inputs.logits.view(shape), _second(inputs).view(shape), distillation_topk=case.k,
                distillation_alpha=0.0, distillation_add_tail=True,
            )  # fmt: skip
            return losses.mean()

        return topk
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    beta = _TRL_BETA[case.kind]
    trl_loss: Callable[..., Tensor] = GKDTrainer.generalized_jsd_loss

    def divergence(inputs: Inputs) -> Tensor:
        return trl_loss(inputs.logits, inputs.reference, beta=beta)

    return divergence
