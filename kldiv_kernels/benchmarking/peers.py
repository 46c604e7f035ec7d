"""The implementations that are compared: ours, and what a user would run today.

Each takes the inputs of a case and returns its scalar loss, the mean over tokens. `eager` is what one writes in
plain PyTorch, in fp32 because bf16 log-softmaxes are too coarse to train on; `compile` is `torch.compile` of the
same function; `trl` calls TRL's functions as its trainers do, on logits in the model's dtype.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.benchmarking.cases import ENTROPY_COEFFICIENT, JS_BETA, LOGPROB_ENTROPY, Case, Inputs

Loss = Callable[[Inputs], Tensor]

OURS = "kldiv_kernels"
PEERS = ("eager", "compile", "trl")


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
        "eager": case.kind in _EAGER,
        "compile": case.kind in _EAGER,
        "trl": case.kind in _TRL_BETA or case.kind == LOGPROB_ENTROPY,
    }
    return [OURS, *(name for name in PEERS if name in peers and has[name])]


def build(name: str, case: Case) -> Loss:
    """The implementation of that name. ImportError where its package is missing."""
    if name == OURS:
        return _ours(case)
    if name == "trl":
        return _trl(case)
    function = _EAGER[case.kind]
    if name == "compile":
        # Each case is compiled on its own, for its own shape, as a training loop with fixed shapes would have it.
        torch.compiler.reset()
        function = torch.compile(function, fullgraph=True, dynamic=False)
    return lambda inputs: function(inputs.logits, _second(inputs))


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
    return lambda inputs: kk.divergence_loss(inputs.logits, _second(inputs), case.kind, beta=JS_BETA)


def _trl(case: Case) -> Loss:
    # TRL prints a notice about its experimental modules, where the distillation trainers live.
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    if case.kind == LOGPROB_ENTROPY:
        from trl.trainer.utils import selective_log_softmax_and_entropy

        def loss(inputs: Inputs) -> Tensor:
            logprob, entropy = selective_log_softmax_and_entropy(inputs.logits, _second(inputs))
            result: Tensor = -logprob.mean() - ENTROPY_COEFFICIENT * entropy.mean()
            return result

        return loss
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    beta = _TRL_BETA[case.kind]
    trl_loss: Callable[..., Tensor] = GKDTrainer.generalized_jsd_loss

    def divergence(inputs: Inputs) -> Tensor:
        return trl_loss(inputs.logits, inputs.reference, beta=beta)

    return divergence
