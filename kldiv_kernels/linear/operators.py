"""The operators: schema, fake and autograd. They are functional, and opaque to torch.compile.

`linear_statistics` is differentiable: its backward pass makes the logits once more, in the same dtype. The others find
gradients with the values, for `ops.with_gradients`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kldiv_kernels import ops
from kldiv_kernels._ops import add_op_namespace_prefix
from kldiv_kernels._ops import ops as operators
from kldiv_kernels.autograd import DOUBLE_BACKWARD, keep, kept
from kldiv_kernels.backends import Call, get, value_rows
from kldiv_kernels.linear.chunks import Rows, take, take_columns
from kldiv_kernels.linear.head import Side
from kldiv_kernels.linear.work import Gradients, Task, run

_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? reference, Tensor? reference_weight, Tensor? reference_bias, "
    "Tensor? labels, Tensor? mask, Tensor? exclude, Tensor? token_parameters, float[] numbers, float[] parameters, "
    "str[] stats, SymInt vocab_size, str backend, ScalarType compute, ScalarType reference_compute, "
    "ScalarType logits_dtype, SymInt rows"
)
_ARGUMENTS, _TENSORS, _SIDES = 19, 10, 6
_GRADIENTS = ", ".join(["Tensor"] * _SIDES)


def arguments(task: Task) -> tuple[Any, ...]:
    student, reference, call = task.student, task.reference, task.call
    assert isinstance(student, Side)
    numbers = [student.scale, student.softcap, 1.0, 0.0]
    of_reference: tuple[Tensor | None, ...] = (None, None, None)
    if isinstance(reference, Side):
        of_reference = (reference.hidden, reference.weight, reference.bias)
        numbers[2:] = [reference.scale, reference.softcap]
    elif reference is not None:
        of_reference = (reference, None, None)
    return (
        student.hidden, student.weight, student.bias, *of_reference, call.labels, call.mask, call.exclude,
        call.token_parameters, numbers, list(call.parameters), list(call.stats), call.vocab_size, task.backend,
        student.compute, reference.compute if isinstance(reference, Side) else student.compute, task.logits, task.rows,
    )  # fmt: skip


def _task(given: tuple[Any, ...]) -> Task:
    (
        hidden, weight, bias, reference, reference_weight, reference_bias, labels, mask, exclude, token_parameters,
        numbers, parameters, stats, vocab_size, backend, compute, reference_compute, logits_dtype, rows,
    ) = given  # fmt: skip
    student = Side(hidden, weight, bias, numbers[0], numbers[1], compute)
    other = reference
    if reference_weight is not None:
        other = Side(reference, reference_weight, reference_bias, numbers[2], numbers[3], reference_compute)
    call = Call(hidden, None, labels, mask, exclude, token_parameters, tuple(parameters), tuple(stats), vocab_size)
    return Task(student, other, call, backend, logits_dtype, rows)


def _sides(wanted: list[bool]) -> tuple[bool, bool]:
    return any(wanted[:3]), any(wanted[3:])


def _out(gradients: Gradients, like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if x is None else x for x in gradients)


def _statistics(*given: Any) -> Tensor:
    task = _task(given)

    def turn(call: Call, rows: Rows, in_place: bool) -> tuple[Tensor, None, None]:
        return get(task.backend).forward(call, False)[0], None, None

    return run(task, [False] * _SIDES, turn)[0]


def _one_read(*given: Any) -> tuple[Tensor, ...]:
    task = _task(given[:_ARGUMENTS])
    coefficients, wanted = given[_ARGUMENTS:]
    student, reference = _sides(wanted)

    def turn(call: Call, rows: Rows, in_place: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        of_rows = take_columns(coefficients, rows)
        return get(task.backend).one_read(call, of_rows, student, reference, in_place and student)

    values, gradients = run(task, wanted, turn)
    return values, *_out(gradients, task.rows_given)


def _policy(*given: Any) -> tuple[Tensor, ...]:
    task = _task(given[:_ARGUMENTS])
    coefficients, tokens, term, kl, bounds, wanted = given[_ARGUMENTS:]

    def turn(call: Call, rows: Rows, in_place: bool) -> tuple[Tensor, Tensor, None]:
        tables = take_columns(coefficients, rows), take_columns(tokens, rows)
        return *ops.one_read_policy(task.backend).policy(call, *tables, term, kl, bounds, in_place), None

    values, gradients = run(task, wanted, turn)
    return values, *_out(gradients, task.rows_given)


def _topk(*given: Any) -> tuple[Tensor, ...]:
    task = _task(given[:_ARGUMENTS])
    teacher, scale, kind, alpha, beta, wanted = given[_ARGUMENTS:]
    divergences = teacher.new_zeros(task.count)

    def turn(call: Call, rows: Rows, in_place: bool) -> tuple[Tensor, Tensor, None]:
        of_rows = take(teacher, rows), take(scale, rows)
        values, found, dlogits = ops.one_read_topk(task.backend).topk(call, *of_rows, kind, alpha, beta, in_place)
        divergences[rows] = found
        return values, dlogits, None

    _, gradients = run(task, wanted, turn)
    return divergences, *_out(gradients, task.rows_given)


def _fake_values(given: tuple[Any, ...]) -> Tensor:
    task = _task(given[:_ARGUMENTS])
    rows = value_rows(task.call.stats, task.call.labels_per_row)
    dtype = torch.float64 if task.logits == torch.float64 else torch.float32
    return task.rows_given.new_empty((rows, task.count), dtype=dtype)


def _fake_gradients(given: tuple[Any, ...]) -> tuple[Tensor, ...]:
    wanted = given[-1]
    return tuple(
        x.new_empty(x.shape) if of and x is not None else given[0].new_empty(0)
        for of, x in zip(wanted, given[:_SIDES], strict=True)
    )


def _fake(*given: Any) -> tuple[Tensor, ...]:
    return _fake_values(given), *_fake_gradients(given)


def _fake_topk(*given: Any) -> tuple[Tensor, ...]:
    return _fake_values(given)[0], *_fake_gradients(given)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    keep(ctx, *inputs[:_TENSORS])
    ctx.rest = inputs[_TENSORS:]


def _statistics_gradient(ctx: Any, values: Tensor) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(DOUBLE_BACKWARD)
    tensors = kept(ctx)
    wanted = [tensor is not None and needed for tensor, needed in zip(tensors, ctx.needs_input_grad, strict=False)]
    _, *gradients = operators.linear_one_read(*tensors, *ctx.rest, values.contiguous(), wanted[:_SIDES])
    found = [x if of else None for x, of in zip(gradients, wanted, strict=False)]
    return *found, *(None,) * (_ARGUMENTS - _SIDES)


for _name, _more, _returns, _function, _meta in (
    ("linear_statistics", "", "Tensor", _statistics, lambda *given: _fake_values(given)),
    ("linear_one_read", ", Tensor coefficients, bool[] wanted", f"(Tensor, {_GRADIENTS})", _one_read, _fake),
    (
        "linear_policy",
        ", Tensor coefficients, Tensor tokens, str term, str kl, float[] bounds, bool[] wanted",
        f"(Tensor, {_GRADIENTS})",
        _policy,
        _fake,
    ),
    (
        "linear_topk",
        ", Tensor teacher, Tensor scale, str kind, float alpha, float beta, bool[] wanted",
        f"(Tensor, {_GRADIENTS})",
        _topk,
        _fake_topk,
    ),
):
    _qualified = add_op_namespace_prefix(_name)
    torch.library.define(_qualified, f"({_SCHEMA}{_more}) -> {_returns}")
    torch.library.impl(_qualified, "CompositeExplicitAutograd", _function)
    torch.library.register_fake(_qualified, _meta)
torch.library.register_autograd(add_op_namespace_prefix("linear_statistics"), _statistics_gradient, setup_context=_save)
