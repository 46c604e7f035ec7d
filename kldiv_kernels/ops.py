"""The package's operators: schema, fake and autograd once, for every backend.

`statistics` reads the logits and returns per-token values; `statistics_backward` turns one coefficient per token
and statistic into gradients; `loss` takes the coefficients beforehand and does both in one read. All three are
functional. `torch.compile` sees them as opaque operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kldiv_kernels import backends
from kldiv_kernels.backends import Call

_CALL_SCHEMA = (
    "Tensor logits, Tensor? reference, Tensor? labels, Tensor? mask, Tensor? exclude, Tensor? token_parameters, "
    "float[] parameters, str[] stats, int vocab_size, str backend"
)
_CALL_ARGUMENTS = 10

_library: Any = torch.library.Library("kldiv_kernels", "DEF")  # type: ignore[no-untyped-call]
_library.define(f"statistics({_CALL_SCHEMA}, bool with_state) -> (Tensor, Tensor)")
_library.define(
    f"statistics_backward({_CALL_SCHEMA}, Tensor state, Tensor coefficients, bool student, bool teacher)"
    " -> (Tensor, Tensor)"
)
_library.define(
    f"loss({_CALL_SCHEMA}, Tensor coefficients, bool student, bool teacher) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _call(arguments: tuple[Any, ...]) -> tuple[Call, backends.Backend]:
    logits, reference, labels, mask, exclude, token_parameters, parameters, stats, vocab_size, backend = arguments
    call = Call(
        logits, reference, labels, mask, exclude, token_parameters, tuple(parameters), tuple(stats), vocab_size
    )  # fmt: skip
    return call, backends.get(backend)


def _or_empty(gradient: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if gradient is None else gradient


def _statistics(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, backend = _call(arguments[:_CALL_ARGUMENTS])
    return backend.forward(call, arguments[_CALL_ARGUMENTS])


def _statistics_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, backend = _call(arguments[:_CALL_ARGUMENTS])
    dlogits, dreference = backend.backward(call, *arguments[_CALL_ARGUMENTS:])
    return _or_empty(dlogits, call.logits), _or_empty(dreference, call.logits)


def _loss(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call, backend = _call(arguments[:_CALL_ARGUMENTS])
    coefficients = arguments[_CALL_ARGUMENTS]
    values, dlogits, dreference = backend.one_read(call, *arguments[_CALL_ARGUMENTS:])
    # A token of weight 0 takes no part, whatever its value is: 0 * inf is not NaN here.
    terms = torch.where(coefficients == 0, torch.zeros_like(values), coefficients * values)
    return terms.sum(), values, _or_empty(dlogits, call.logits), _or_empty(dreference, call.logits)


for _name, _function in (
    ("statistics", _statistics),
    ("statistics_backward", _statistics_backward),
    ("loss", _loss),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")


def _value_dtype(logits: Tensor, reference: Tensor | None) -> torch.dtype:
    double = logits.dtype == torch.float64 or (reference is not None and reference.dtype == torch.float64)
    return torch.float64 if double else torch.float32


def _fake_values(call: Call) -> Tensor:
    rows = backends.value_rows(call.stats, call.labels_per_row)
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


torch.library.register_fake("kldiv_kernels::statistics", _fake_statistics)
torch.library.register_fake("kldiv_kernels::statistics_backward", _fake_backward)
torch.library.register_fake("kldiv_kernels::loss", _fake_loss)


def _save_statistics(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    call = inputs[:_CALL_ARGUMENTS]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*call[:6], output[1])
    ctx.rest = call[6:]


def _statistics_gradient(ctx: Any, values: Tensor | None, _: Any) -> tuple[Any, ...]:
    nothing = (None,) * (_CALL_ARGUMENTS - 1)
    if values is None:
        return None, None, *nothing
    *tensors, saved = ctx.saved_tensors
    student, teacher = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    dlogits, dreference = torch.ops.kldiv_kernels.statistics_backward(
        *tensors, *ctx.rest, saved, values, student, teacher
    )
    return dlogits if student else None, dreference if teacher else None, *nothing


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, values, dlogits, dreference = output
    ctx.mark_non_differentiable(values, dlogits, dreference)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dlogits, dreference)


_DOUBLE_BACKWARD = (
    "kldiv_kernels: double backward is not supported: the gradient of a divergence with respect to the logits "
    "has no second derivative here; call backward() without create_graph=True"
)


def _loss_gradient(ctx: Any, loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing = (None,) * (_CALL_ARGUMENTS + 1)
    if loss is None:
        return None, None, *nothing
    if torch.is_grad_enabled():
        raise RuntimeError(_DOUBLE_BACKWARD)
    gradients = [
        _times_upstream(gradient, loss) if needed else None
        for gradient, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
    ]
    return *gradients, *nothing


def _times_upstream(gradient: Tensor, upstream: Tensor) -> Tensor:
    """The gradient of the one-read form times the upstream scalar.

    In eager mode it is scaled in place, and not touched when the scalar is 1: the buffer is ours, and the graph
    is freed after this backward. While the graph is kept (retain_graph) or traced by torch.compile, it is copied.
    """
    if type(gradient) is not Tensor or torch._C._autograd._get_current_graph_task_keep_graph():
        return gradient * upstream
    return backends.scale_in_place(gradient, upstream)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _no_double_backward(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(_DOUBLE_BACKWARD)


torch.library.register_autograd("kldiv_kernels::statistics", _statistics_gradient, setup_context=_save_statistics)
torch.library.register_autograd("kldiv_kernels::loss", _loss_gradient, setup_context=_save_loss)
torch.library.register_autograd("kldiv_kernels::statistics_backward", _no_double_backward, setup_context=_save_nothing)
