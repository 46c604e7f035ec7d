"""The losses from hidden states: ours, plain PyTorch's, TRL's, and the matrix multiplications of ours alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.benchmarking.cases import ENTROPY_COEFFICIENT, GRPO, GRPO_CLIP, JS_BETA, Case, Inputs
from kldiv_kernels.benchmarking.defaults import LOGPROB_ENTROPY
from kldiv_kernels.benchmarking.eager import LOSSES, clipped_surrogate, grpo
from kldiv_kernels.choices import Backend
from kldiv_kernels.linear import Gemm

_Loss = Callable[[Inputs], Tensor]

# TRL has one divergence, with β; its conventions for β = 0 and β = 1 are the package's.
TRL_BETA = {"forward_kl": 0.0, "js": JS_BETA, "reverse_kl": 1.0}
# Columns of logits at a time: what TRL's trainers give to its function.
_TRL_COLUMNS = 32_768


def _student(inputs: Inputs) -> tuple[Tensor, Tensor]:
    assert inputs.weight is not None
    return inputs.student, inputs.weight


def _teacher(inputs: Inputs) -> tuple[Tensor, Tensor]:
    assert inputs.reference is not None
    assert inputs.reference_weight is not None
    return inputs.reference, inputs.reference_weight


def _labels(inputs: Inputs) -> Tensor:
    assert inputs.labels is not None
    return inputs.labels


def ours(case: Case, backend: Backend = "auto") -> _Loss:
    def statistics(inputs: Inputs) -> Tensor:
        stats = kk.linear_token_stats(*_student(inputs), inputs.labels, stats=("logprob", "entropy"), backend=backend)
        return -stats.logprob.mean() - ENTROPY_COEFFICIENT * stats.entropy.mean()

    def policy(inputs: Inputs) -> Tensor:
        hidden, weight = _student(inputs)
        labels, advantages, old = case.in_sequences(inputs)
        return kk.linear_policy_loss(
            hidden.view(*labels.shape, case.hidden), weight, labels, advantages, loss_type="dapo", old_logprobs=old,
            clip_low=GRPO_CLIP, clip_high=GRPO_CLIP, backend=backend,
        ).loss  # fmt: skip

    def divergence(inputs: Inputs) -> Tensor:
        beta = JS_BETA if case.loss == "js" else None
        return kk.linear_divergence_loss(*_student(inputs), *_teacher(inputs), case.loss, beta=beta, backend=backend)

    return {LOGPROB_ENTROPY: statistics, GRPO: policy}.get(case.loss, divergence)


def eager(case: Case) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """The logits, then the loss in float32; for a policy loss, the entropy that a trainer logs beside it."""

    def policy(inputs: Inputs) -> tuple[Tensor, ...]:
        return grpo(F.linear(*_student(inputs)), inputs)

    def loss(inputs: Inputs) -> tuple[Tensor, ...]:
        second = F.linear(*_teacher(inputs)) if case.is_divergence else _labels(inputs)
        return (LOSSES[case.loss](F.linear(*_student(inputs)), second),)

    return policy if case.loss == GRPO else loss


def trl(case: Case) -> _Loss:
    if case.is_divergence:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        chunked_divergence: Callable[..., Any] = ChunkedDivergenceFunction.apply

        def divergence(inputs: Inputs) -> Tensor:
            student, teacher = _student(inputs), _teacher(inputs)
            values, _ = chunked_divergence(*student, None, *teacher, None, TRL_BETA[case.loss])
            mean: Tensor = values.mean()
            return mean

        return divergence
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    chunked_logprob: Callable[..., Any] = ChunkedLogProbFunction.apply

    def loss(inputs: Inputs) -> Tensor:
        logprob, entropy, *_ = chunked_logprob(
            *_student(inputs), None, _labels(inputs), 1.0, _TRL_COLUMNS, None, 1.0, ("entropy",)
        )
        if case.loss == GRPO:
            return clipped_surrogate(logprob, inputs)
        result: Tensor = -logprob.mean() - ENTROPY_COEFFICIENT * entropy.mean()
        return result

    return loss


def multiplications(case: Case) -> _Loss:
    """What ours multiplies, in the same chunks and with the same conversions, and no loss in between.

    The gradients are left where a loss leaves them, so that the memory is comparable; their values mean nothing.
    """

    def loss(inputs: Inputs) -> Tensor:
        leaves = _student(inputs)
        hidden, weight = (leaf.detach() for leaf in leaves)
        device = hidden.device
        plan = kk.plan(rows=case.rows, vocab=case.vocab, dtype=case.dtype, device=device, **case.planned)
        assert plan.rows_per_chunk is not None
        assert plan.multiplications is not None
        size = plan.rows_per_chunk
        # Beside two for the gradients, the logits of each side: once, or once more for a gradient that waits for its
        # loss.
        times = (plan.multiplications // -(-case.rows // size) - 2) // (1 + case.is_divergence)
        student, chunk = Gemm(weight), torch.empty(size, case.vocab, device=device)
        sides = [(hidden, student, chunk)]
        if case.is_divergence:
            reference, reference_weight = _teacher(inputs)
            sides.append((reference, Gemm(reference_weight), torch.empty_like(chunk)))
        dhidden, dweight = torch.empty_like(hidden), torch.empty(weight.shape, device=device)
        for begin in range(0, case.rows, size):
            rows = slice(begin, min(case.rows, begin + size))
            logits = chunk[: rows.stop - begin]
            for _ in range(times):
                for states, gemm, out in sides:
                    gemm.logits(states[rows], out[: rows.stop - begin])
            student.times_weight(logits, dhidden[rows])
            student.add_outer(dweight, logits, hidden[rows], begin == 0)
        leaves[0].grad, leaves[1].grad = dhidden, dweight.to(weight.dtype)
        return torch.zeros((), device=device, requires_grad=True)

    return loss
