"""The package's operators: schema, fake and autograd once, for every backend.

`statistics` reads the logits and returns per-token values; `statistics_backward` turns one coefficient per token
and statistic into gradients; `loss` takes the coefficients beforehand and does both in one read; so do `policy` and
`topk`, which find coefficients on the way, and `with_gradients` gives what they find to the loss. All are functional.
`torch.compile` sees them as opaque operators, but for those of the Triton backend, which it gets in a form
that it sees through (`backends/triton/ops.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kldiv_kernels import autograd, inputs
from kldiv_kernels._ops import add_op_namespace_prefix
from kldiv_kernels._ops import ops as operators
from kldiv_kernels.backends import Backend, Call, OneReadPolicy, OneReadTopK, get, scale_in_place, value_rows
from kldiv_kernels.tracing import constant

_CALL_SCHEMA = (
    "Tensor logits, Tensor? reference, Tensor? labels, Tensor? mask, Tensor? exclude, Tensor? token_parameters, "
    "float[] parameters, str[] stats, SymInt vocab_size, str backend"
)
_CALL_ARGUMENTS = 10
# What `policy_outcome` adds up, in order (csrc/policy_outcome.h).
POLICY_SUMS = (
    "loss", "tokens", "entropy", "ratio_mean", "approx_kl", "clip_fraction_low", "clip_fraction_high",
    "clip_fraction_dual", "kl", "exact_kl", "sampling_kl", "off_policy_weight", "ratio_max",
)  # fmt: skip


def statistics(call: Call, backend: str, with_state: bool) -> Tensor:
    """Values [value_rows, N], differentiable."""
    values: Tensor
    if autograd.transformed():
        # Which of the tensors a transform wants a gradient of is not to be seen from here: the state is always kept.
        values, _ = autograd.transformable_statistics(*inputs.operator_arguments(call, backend), True)
        return values
    prefix, arguments = _operators(call, backend)
    values = getattr(operators, f"{prefix}statistics")(*arguments, with_state)[0]
    return values


def loss(call: Call, backend: str, coefficients: Tensor, student: bool, teacher: bool) -> tuple[Tensor, Tensor]:
    """Σ coefficients · values, a scalar, differentiable; and the values [value_rows, N], without gradient."""
    prefix, arguments = _operators(call, backend)
    operator = getattr(operators, f"{prefix}loss")
    reduced, values = operator(*arguments, coefficients, student, teacher)[:2]
    return reduced, values.detach()


def policy_loss(
    call: Call, backend: str, coefficients: Tensor, tokens: Tensor, term: str, kl: str, bounds: list[float]
) -> tuple[Tensor, Tensor]:
    """Values [value_rows, N] and the gradient of the logits that a policy loss has (csrc/policy.h), both without a
    gradient of their own; `with_gradients` brings them together."""
    logits, *arguments = inputs.operator_arguments(call, backend)
    assert isinstance(logits, Tensor)
    values, dlogits = operators.policy(
        logits.detach(), *arguments, coefficients, tokens, term, kl, bounds
    )  # fmt: skip
    return values, dlogits


def policy_outcome(backend: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each token [N], the sums of a batch, the number of its tokens (`backends.OneReadPolicy`)."""
    found: tuple[Tensor, Tensor, Tensor] = operators.policy_outcome(*arguments, backend)
    return found


def topk_loss(
    call: Call, backend: str, teacher: Tensor, scale: Tensor, kind: str, alpha: float, beta: float
) -> tuple[Tensor, Tensor]:
    """Divergences [N] and the gradient of the logits that Σ scale · divergence has (`backends.OneReadTopK`)."""
    logits, *arguments = inputs.operator_arguments(call, backend)
    assert isinstance(logits, Tensor)
    _, divergences, dlogits = operators.topk(logits.detach(), *arguments, teacher, scale, kind, alpha, beta)
    return divergences, dlogits


def largest(logits: Tensor, mask: Tensor | None, k: int, columns: int) -> Tensor:
    """Column numbers [N, k] of the k largest of the first columns, the largest first, of equal ones the first first.

    One read, on CPUs. Rows that the mask leaves out are not read and get 0 to k-1.
    """
    ids: Tensor = operators.largest(logits, mask, k, columns)
    return ids


def with_gradients(value: Tensor, tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """A scalar of this value, and of these gradients with respect to the tensors, which require grad."""
    scalar: Tensor = operators.with_gradients(value, list(tensors), list(gradients))
    return scalar


def one_read_policy(backend: str) -> OneReadPolicy:
    found = get(backend)
    assert isinstance(found, OneReadPolicy)
    return found


def one_read_topk(backend: str) -> OneReadTopK:
    found = get(backend)
    assert isinstance(found, OneReadTopK)
    return found


def _operators(call: Call, backend: str) -> tuple[str, tuple[object, ...]]:
    """The prefix of the operators' names, and their leading arguments."""
    if backend == "triton" and torch.compiler.is_compiling():
        version = _traced_version(call.stats)
        if version:
            from kldiv_kernels.backends.triton import ops

            return "triton_", ops.arguments(call, version)
    return "", inputs.operator_arguments(call, backend)


def _version(stats: tuple[str, ...]) -> str:
    from kldiv_kernels.backends.triton import interpreted

    if interpreted():
        return ""
    from kldiv_kernels.backends.triton import ops

    return ops.version(stats)


# What an operator that torch.compile sees through has to say of these statistics, "" where it would see nothing.
# torch.compile takes the answer as it is instead of tracing it.
_traced_version = constant(_version)


def _call(arguments: tuple[Any, ...]) -> tuple[Call, Backend]:
    logits, reference, labels, mask, exclude, token_parameters, parameters, stats, vocab_size, backend = arguments
    call = Call(
        logits, reference, labels, mask, exclude, token_parameters, tuple(parameters), tuple(stats), vocab_size
    )  # fmt: skip
    return call, get(backend)


def _statistics(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, backend = _call(arguments[:_CALL_ARGUMENTS])
    return backend.forward(call, arguments[_CALL_ARGUMENTS])


def _statistics_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, backend = _call(arguments[:_CALL_ARGUMENTS])
    dlogits, dreference = backend.backward(call, *arguments[_CALL_ARGUMENTS:])
    return autograd.or_empty(dlogits, call.logits), autograd.or_empty(dreference, call.logits)


def _loss(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call, backend = _call(arguments[:_CALL_ARGUMENTS])
    coefficients = arguments[_CALL_ARGUMENTS]
    values, dlogits, dreference = backend.one_read(call, *arguments[_CALL_ARGUMENTS:])
    return autograd.reduced(coefficients, values, dlogits, dreference, call.logits)


def _policy(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, backend = _call(arguments[:_CALL_ARGUMENTS])
    return one_read_policy(backend.name).policy(call, *arguments[_CALL_ARGUMENTS:])


def _policy_outcome(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return one_read_policy(arguments[-1]).policy_outcome(*arguments[:-1])


def _topk(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call, backend = _call(arguments[:_CALL_ARGUMENTS])
    return one_read_topk(backend.name).topk(call, *arguments[_CALL_ARGUMENTS:])


def _largest(logits: Tensor, mask: Tensor | None, k: int, columns: int) -> Tensor:
    ids: Tensor = operators.largest_columns(logits, mask, k, columns)
    return ids


def _with_gradients(value: Tensor, tensors: list[Tensor], gradients: list[Tensor]) -> Tensor:
    return value.clone()


def _value_dtype(logits: Tensor, reference: Tensor | None) -> torch.dtype:
    double = logits.dtype == torch.float64 or (reference is not None and reference.dtype == torch.float64)
    return torch.float64 if double else torch.float32


def _fake_values(call: Call) -> Tensor:
    rows = value_rows(call.stats, call.labels_per_row)
    return call.logits.new_empty((rows, call.rows), dtype=_value_dtype(call.logits, call.reference))


def _fake_gradients(call: Call, student: bool, teacher: bool) -> tuple[Tensor, Tensor]:
    def like(tensor: Tensor | None, wanted: bool) -> Tensor:
        if not wanted or tensor is None:
            return call.logits.new_empty(0)
        return tensor.new_empty(tensor.shape)

    return like(call.logits, student), like(call.reference, teacher)


def _fake_statistics(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, backend = _call(arguments[:_CALL_ARGUMENTS])
    with_state = arguments[_CALL_ARGUMENTS]
    values = _fake_values(call)
    rows = backend.state_rows(call.stats) if with_state else 0
    return values, values.new_empty((rows, call.rows))


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, _ = _call(arguments[:_CALL_ARGUMENTS])
    return _fake_gradients(call, arguments[-2], arguments[-1])


def _fake_loss(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call, _ = _call(arguments[:_CALL_ARGUMENTS])
    values = _fake_values(call)
    return values.new_empty(()), values, *_fake_gradients(call, arguments[-2], arguments[-1])


def _fake_policy(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, _ = _call(arguments[:_CALL_ARGUMENTS])
    return _fake_values(call), _fake_gradients(call, True, False)[0]


def _fake_outcome(values: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    count = values.new_empty((), dtype=torch.int64)
    return values.new_empty(values.shape[1]), values.new_empty(len(POLICY_SUMS)), count


def _fake_topk(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    values, dlogits = _fake_policy(*arguments)
    return values, values.new_empty(values.shape[1:]), dlogits


def _fake_largest(logits: Tensor, mask: Tensor | None, k: int, columns: int) -> Tensor:
    return logits.new_empty((logits.numel() // logits.shape[-1], k), dtype=torch.int64)


_STATISTICS = f"({_CALL_SCHEMA}, bool with_state) -> (Tensor, Tensor)"
_BACKWARD = f"({_CALL_SCHEMA}, Tensor state, Tensor coefficients, bool student, bool teacher) -> (Tensor, Tensor)"
_LOSS = f"({_CALL_SCHEMA}, Tensor coefficients, bool student, bool teacher) -> (Tensor, Tensor, Tensor, Tensor)"
_POLICY = f"({_CALL_SCHEMA}, Tensor coefficients, Tensor tokens, str term, str kl, float[] bounds) -> (Tensor, Tensor)"
_OUTCOME = (
    "(Tensor values, Tensor coefficients, Tensor tokens, Tensor valid, Tensor scale, Tensor? old, Tensor? sampling, "
    "Tensor? off_policy_weight, Tensor? token_weights, Tensor? kl_weights, bool anchored, bool reference, bool exact, "
    "float kl_coef, str term, str kl, float[] bounds, str backend) -> (Tensor, Tensor, Tensor)"
)
_TOPK = f"({_CALL_SCHEMA}, Tensor teacher, Tensor scale, str kind, float alpha, float beta) -> (Tensor, Tensor, Tensor)"
for _name, _schema, _function, _fake in (
    ("statistics", _STATISTICS, _statistics, _fake_statistics),
    ("statistics_backward", _BACKWARD, _statistics_backward, _fake_backward),
    ("loss", _LOSS, _loss, _fake_loss),
    ("policy", _POLICY, _policy, _fake_policy),
    ("policy_outcome", _OUTCOME, _policy_outcome, _fake_outcome),
    ("topk", _TOPK, _topk, _fake_topk),
    ("largest", "(Tensor logits, Tensor? mask, int k, SymInt columns) -> Tensor", _largest, _fake_largest),
    (
        "with_gradients", "(Tensor value, Tensor[] tensors, Tensor[] gradients) -> Tensor",
        _with_gradients, _with_gradients,
    ),
):  # fmt: skip
    _qualified = add_op_namespace_prefix(_name)
    torch.library.define(_qualified, _schema)
    torch.library.impl(_qualified, "CompositeExplicitAutograd", _function)
    torch.library.register_fake(_qualified, _fake)

autograd.register("", scale_in_place)
autograd.register_given_gradients(scale_in_place)
