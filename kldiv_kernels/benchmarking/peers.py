"""The implementations that are compared: ours, and what a user would run today.

Each takes the inputs of a case and returns its scalar loss, the mean over tokens. `eager` is what one writes in
plain PyTorch, in fp32 because bf16 log-softmaxes are too coarse to train on; `compile` is `torch.compile` of the
same function; `trl` calls TRL's functions as its trainers do, on logits in the model's dtype. Those from hidden states
are in linear.py, those of several processes in parallel.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.benchmarking import eager, linear
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
from kldiv_kernels.benchmarking.in_place import InPlace
from kldiv_kernels.choices import Backend
from kldiv_kernels.parallel import Group

Loss = Callable[[Inputs], Tensor]

OURS = "kldiv_kernels"
# The same with its gradient in the place of the logits.
IN_PLACE = "in_place"
PEERS = ("eager", "compile", "trl")
# Beside a top-k loss: what reading the logits once and writing their gradient takes for one label.
LOGPROB = "logprob"
# Beside a loss from hidden states: its multiplications.
GEMMS = "gemms"
# Beside a loss of logits that are spread over processes: whole rows, gathered for the loss of one process.
GATHER = "gather"
# What a reader calls them.
LABELS = {
    IN_PLACE: "ours, in_place=True",
    "eager": "PyTorch eager",
    "compile": "torch.compile",
    "trl": "TRL",
    LOGPROB: "our log-probability loss",
    GEMMS: "the multiplications alone",
    GATHER: "gathered logits",
}


def names_for(case: Case, peers: tuple[str, ...] = PEERS) -> list[str]:
    """Ours first, then those of `peers` that have the case's loss."""
    if case.ranks > 1:
        return [OURS, GATHER]
    has = {
        "eager": case.loss in (*eager.LOSSES, GRPO, TOPK, TOPK_FROM_LOGITS),
        "compile": case.loss in (*eager.LOSSES, GRPO, TOPK, TOPK_FROM_LOGITS),
        "trl": case.loss in (*linear.TRL_BETA, LOGPROB_ENTROPY, GRPO, TOPK_FROM_LOGITS),
    }
    beside = [LOGPROB] if case.kind == TOPK else [GEMMS] if case.from_hidden else []
    if case.is_divergence and not case.from_hidden and case.kind != TOPK_FROM_LOGITS and case.dtype != torch.float16:
        beside = [IN_PLACE]
    return [OURS, *beside, *(name for name in PEERS if name in peers and has[name])]


def build(name: str, case: Case) -> Loss:
    """The implementation of that name. ImportError where its package is missing."""
    if case.from_hidden:
        return _from_hidden(name, case)
    if name == OURS:
        return ours(case)
    if name == IN_PLACE:
        return InPlace(case)
    if name == LOGPROB:
        return lambda inputs: -kk.token_stats(inputs.logits, labels=inputs.labels, stats=("logprob",)).logprob.mean()
    if name == "trl":
        return _trl(case)
    if case.kind in (TOPK, TOPK_FROM_LOGITS):
        return _topk_peer(name, case)
    if case.kind == GRPO:
        policy = _compiled(eager.grpo) if name == "compile" else eager.grpo
        return lambda inputs: policy(inputs.logits, inputs)[0]
    function = _compiled(eager.LOSSES[case.kind]) if name == "compile" else eager.LOSSES[case.kind]
    return lambda inputs: function(inputs.logits, _second(inputs))


def prepare(loss: Loss, inputs: Inputs) -> None:
    """What has to be done before each call of a loss, and is none of it."""
    if isinstance(loss, InPlace):
        loss.prepare(inputs)


def _from_hidden(name: str, case: Case) -> Loss:
    if name in ("eager", "compile"):
        function = _compiled(linear.eager(case)) if name == "compile" else linear.eager(case)
        return lambda inputs: function(inputs)[0]
    return {OURS: linear.ours, GEMMS: linear.multiplications, "trl": linear.trl}[name](case)


def _topk_peer(name: str, case: Case) -> Loss:
    if case.kind == TOPK_FROM_LOGITS:
        both = _compiled(eager.topk_from_logits) if name == "compile" else eager.topk_from_logits
        return lambda inputs: both(inputs.logits, _second(inputs), case.k)
    one = _compiled(eager.topk) if name == "compile" else eager.topk
    return lambda inputs: one(inputs.logits, *_known(inputs))


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Each case is compiled on its own, for its own shape, as a training loop with fixed shapes would have it."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def _second(inputs: Inputs) -> Tensor:
    second = inputs.labels if inputs.reference is None else inputs.reference
    assert second is not None
    return second


def ours(case: Case, group: Group | None = None) -> Loss:
    """Of whole rows, or of this process's columns of them, as the losses that have such a case take them."""
    if case.loss == LOGPROB_ENTROPY:

        def loss(inputs: Inputs) -> Tensor:
            stats = kk.token_stats(inputs.logits, labels=inputs.labels, stats=("logprob", "entropy"), group=group)
            return -stats.logprob.mean() - ENTROPY_COEFFICIENT * stats.entropy.mean()

        return loss
    if case.loss == GRPO:
        return lambda inputs: grpo_loss(case, inputs, "auto", group)
    if case.loss == TOPK:
        return lambda inputs: topk_loss(inputs, "auto")
    if case.loss == TOPK_FROM_LOGITS:
        return lambda inputs: kk.topk_divergence_from_logits(
            inputs.logits, _second(inputs), k=case.k, support="student"
        )
    beta = JS_BETA if case.loss == "js" else None
    return lambda inputs: kk.divergence_loss(inputs.logits, _second(inputs), case.loss, beta=beta, group=group)


def topk_loss(inputs: Inputs, backend: Backend) -> Tensor:
    return kk.topk_divergence_loss(inputs.logits, *_known(inputs), backend=backend)


def _known(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The teacher's ids and log-probabilities."""
    assert inputs.topk_ids is not None
    assert inputs.topk_logprobs is not None
    return inputs.topk_ids, inputs.topk_logprobs


def grpo_loss(case: Case, inputs: Inputs, backend: Backend, group: Group | None = None) -> Tensor:
    """policy_loss as a trainer calls it: [sequences, tokens]."""
    labels, advantages, old = case.in_sequences(inputs)
    return kk.policy_loss(
        inputs.logits.view(*labels.shape, -1), labels, advantages, loss_type="dapo", old_logprobs=old,
        clip_low=GRPO_CLIP, clip_high=GRPO_CLIP, group=group, backend=backend,
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
                return eager.clipped_surrogate(logprob.reshape(-1).float(), inputs)
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

    beta = linear.TRL_BETA[case.kind]
    trl_loss: Callable[..., Tensor] = GKDTrainer.generalized_jsd_loss

    def divergence(inputs: Inputs) -> Tensor:
        return trl_loss(inputs.logits, inputs.reference, beta=beta)

    return divergence
