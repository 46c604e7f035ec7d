r"""TRL's fused LM head: `ChunkedLogProbFunction` of GRPO, RLOO, SFT and DPO, and the divergence of Distillation.

Both take hidden states and a head, of which TRL makes the logits in tiles: once or twice for the values, and again for
the gradients. Here the divergence has values and gradients from one pass. p teacher, q student, TRL's β as in
`divergences`; the entropy that Distillation logs comes from the same pass.

TRL's own serves the mean of the logits, which KTO logs, heads that are gathered only for a moment (DTensors, ZeRO-3),
and calls without a single token. Results are float32, as TRL's. The logits are float32, where TRL's log-probabilities
are of logits in the hidden states' dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from kldiv_kernels.adapters.trl.calls import backend_for, bound, is_served
from kldiv_kernels.choices import Backend
from kldiv_kernels.linear import Head, hidden_states, linear_token_stats
from kldiv_kernels.weighted import weighted_sum_of

# TRL's names of what it can be asked for, and ours.
_OUTPUTS = {"log_probs": "logprob", "entropy": "entropy", "log_sum_sq_probs": "collision", "is_top1": "argmax"}
_LOGPROB_ARGUMENTS = {
    "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale",
    "outputs",
}  # fmt: skip
_SIDE = ("hidden_states", "lm_head_weight", "lm_head_bias", "logit_scale", "final_logit_softcapping")
_LOSS_ARGUMENTS = {f"{side}_{name}" for side in ("student", "teacher") for name in _SIDE} | {
    "completion_mask", "beta", "num_items_in_batch", "temperature",
}  # fmt: skip


def chunked_logprob(original: Any, backend: Backend) -> Any:
    """The autograd function, with another `apply`: [N] each, None where not asked for."""

    forward = functools.partial(original.forward, None)

    def apply(*args: Any) -> tuple[Tensor | None, ...]:
        call = bound(forward, args, {})
        if not _serves_logprob(call):
            found: tuple[Tensor | None, ...] = original.apply(*args)
            return found
        hidden, targets = call["hidden"], call["targets"]
        names = ["logprob", *(_OUTPUTS[name] for name in call["outputs"] if name != "log_probs")]
        stats = linear_token_stats(
            hidden, _head(call), targets, stats=names, temperature=call["temperature"],
            backend=backend_for(backend, hidden),
        )  # fmt: skip
        values = {name: stats[name].float() for name in names if name != "argmax"}
        sum_of_squares = values["collision"].detach() if "collision" in values else None
        is_first = stats.argmax == targets if "argmax" in names else None
        return values["logprob"], values.get("entropy"), sum_of_squares, None, is_first

    return type(original.__name__, (original,), {"apply": staticmethod(apply), "__doc__": original.__doc__})


def chunked_divergence_loss(
    original: Callable[..., tuple[Tensor, Tensor, Tensor]], backend: Backend
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`_chunked_divergence_loss`: the loss, Σ entropy of the student and how many tokens there are."""

    @functools.wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        call = bound(original, args, kwargs)
        if set(call) != _LOSS_ARGUMENTS:
            return original(*args, **kwargs)
        student, teacher = ({name: call[f"{side}_{name}"] for name in _SIDE} for side in ("student", "teacher"))
        mask, beta, temperature = call["completion_mask"] != 0, call["beta"], call["temperature"]
        columns = len(student["lm_head_weight"])
        served = _serves_side(student) and _serves_side(teacher) and len(teacher["lm_head_weight"]) >= columns
        if not (served and 0 <= beta <= 1 and temperature > 0):
            return original(*args, **kwargs)
        count, items = mask.sum(), call["num_items_in_batch"]
        if items is None:
            items = count.clamp(min=1)
        elif isinstance(items, Tensor):
            items = items.to(count.device)
        # TRL has no gradient of the teacher.
        teacher = {name: x.detach() if isinstance(x, Tensor) else x for name, x in teacher.items()}
        source = hidden_states(
            "DistillationTrainer", student["hidden_states"], _head_of(student), teacher["hidden_states"],
            _head_of(teacher),
        )  # fmt: skip
        kind = {0: "forward_kl", 1: "reverse_kl"}.get(beta, "js")
        loss, (_, entropies) = weighted_sum_of(
            "DistillationTrainer", source, None, {kind: 1.0, "entropy": 0.0}, mask=mask, beta=float(beta),
            normalizer=items, temperature=temperature, vocab_size=columns,
            backend=backend_for(backend, source.logits),
        )  # fmt: skip
        return loss.float(), entropies.sum().float(), count

    return replaced


def _serves_logprob(call: dict[str, Any]) -> bool:
    if set(call) != _LOGPROB_ARGUMENTS or not set(call["outputs"]) <= set(_OUTPUTS):
        return False
    hidden, targets = call["hidden"], call["targets"]
    one_each = hidden.dim() == 2 and targets.shape == hidden.shape[:1]
    return one_each and call["temperature"] > 0 and _serves_head(hidden, *_parts(call))


def _parts(call: dict[str, Any]) -> tuple[Any, ...]:
    return call["weight"], call["bias"], call["logit_scale"], call["final_logit_softcapping"]


def _head(call: dict[str, Any]) -> Head:
    weight, bias, scale, softcap = _parts(call)
    return Head(weight, bias, scale, softcap)


def _head_of(side: dict[str, Any]) -> Head:
    return Head(*(side[name] for name in _SIDE[1:]))


def _serves_side(side: dict[str, Any]) -> bool:
    return _serves_head(*(side[name] for name in _SIDE))


def _serves_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> bool:
    """Whether the head is there in the backward pass as it is now, and does what `Head` can."""
    for tensor in (weight, bias):
        # Of a DTensor each rank has a shard; a parameter of ZeRO-3 is gathered for the forward pass only.
        if tensor is not None and (hasattr(tensor, "device_mesh") or hasattr(tensor, "ds_id")):
            return False
    same = is_served(hidden) and is_served(weight) and hidden.device == weight.device
    return same and scale > 0 and (softcap is None or softcap > 0)
