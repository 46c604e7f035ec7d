"""Heads whose rows are spread over a group: each process makes the logits of its own columns, chunk by chunk.

The values of a chunk take what those of logits take (`parallel`). Their states are kept, so that the backward pass
makes the logits once more, and their gradient, without waiting for anyone. The gradient of hidden states, a part of
which every process has, is summed over the group at the end.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kldiv_kernels import parallel
from kldiv_kernels.autograd import DOUBLE_BACKWARD, keep, kept
from kldiv_kernels.backends import Call, Sharded, get
from kldiv_kernels.linear.chunks import Rows, take_columns
from kldiv_kernels.linear.head import Side
from kldiv_kernels.linear.work import Task, run
from kldiv_kernels.parallel import Shard

_SIDES = 6


def statistics(shard: Shard, task: Task, tensors: list[Tensor], reduces: bool) -> Tensor:
    """Values [value_rows, N] of whole rows, differentiable by the six tensors; `task` speaks of whole rows."""
    found: Tensor = _Statistics.apply(shard, task, reduces, *tensors)  # type: ignore[no-untyped-call]
    return found


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Shard, task: Task, reduces: bool, *tensors: Tensor) -> Tensor:
        local, vocab_size = _local(shard, task)
        found: list[tuple[Rows, Tensor]] = []

        def turn(call: Call, rows: Rows, in_place: bool) -> tuple[Tensor, None, None]:
            whole = replace(call, vocab_size=vocab_size)
            if not isinstance(get(task.backend), Sharded):
                return get(task.backend).forward(_of_whole_rows(shard, whole), False)[0], None, None
            values, state = parallel.forward(shard, whole, call.logits, call.reference, task.backend)
            found.append((rows, state))
            return values, None, None

        values, _ = run(local, [False] * _SIDES, turn)
        state = values.new_zeros((found[0][1].shape[0] if found else 0, task.count))
        for rows, of_rows in found:
            state[:, rows] = of_rows
        ctx.shard, ctx.task, ctx.reduces = shard, _without_tensors(task), reduces
        keep(ctx, state, task.call.exclude, *tensors)
        return values

    @staticmethod
    def backward(ctx: Any, coefficients: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(DOUBLE_BACKWARD)
        state, exclude, *tensors = kept(ctx)
        shard, wanted = ctx.shard, list(ctx.needs_input_grad[3:])
        task = replace(_with_tensors(ctx.task, tensors, exclude), sums_hidden=ctx.reduces)
        local, vocab_size = _local(shard, task)
        sides = any(wanted[:3]), any(wanted[3:])

        def turn(call: Call, rows: Rows, in_place: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
            whole, of_rows = replace(call, vocab_size=vocab_size), take_columns(coefficients, rows)
            if not isinstance(get(task.backend), Sharded):
                rows_of_all = _of_whole_rows(shard, whole)
                _, *gradients = get(task.backend).one_read(rows_of_all, of_rows, *sides)
                here = slice(shard.start, shard.start + call.logits.shape[-1])
                dlogits, dreference = (None if x is None else x[:, here].contiguous() for x in gradients)
            else:
                dlogits, dreference = parallel.backward(
                    shard, whole, call.logits, call.reference, task.backend, take_columns(state, rows), of_rows, sides
                )
            return torch.zeros_like(of_rows), dlogits, dreference

        _, gradients = run(local, wanted, turn)
        for i in (0, 3):
            hidden = gradients[i]
            if hidden is not None and ctx.reduces and (i == 0 or isinstance(task.reference, Side)):
                parallel.all_reduce(shard.group, hidden)
                gradients[i] = hidden.to(tensors[i].dtype)
        return None, None, None, *(x if of else None for x, of in zip(gradients, wanted, strict=True))


def _local(shard: Shard, task: Task) -> tuple[Task, int]:
    """The task on the columns that are here, and the vocabulary of whole rows."""
    vocab_size = task.call.vocab_size
    return replace(task, call=replace(task.call, vocab_size=shard.columns(vocab_size))), vocab_size


def _of_whole_rows(shard: Shard, call: Call) -> Call:
    reference = None if call.reference is None else parallel.whole(shard, call.reference, call.vocab_size)
    return replace(call, logits=parallel.whole(shard, call.logits, call.vocab_size), reference=reference)


def _without_tensors(task: Task) -> Task:
    """Autograd keeps the six tensors, and exclude, which may be the caller's, so that it sees who writes to them."""

    def bare(side: Side | Tensor | None) -> Any:
        if not isinstance(side, Side):
            return side is not None
        nothing = side.hidden.new_empty(0)
        return replace(side, hidden=nothing, weight=nothing, bias=None)

    call = replace(task.call, exclude=None)
    return replace(task, student=bare(task.student), reference=bare(task.reference), call=call)


def _with_tensors(task: Task, tensors: list[Tensor], exclude: Tensor | None) -> Task:
    def filled(side: Any, hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        if not isinstance(side, Side):
            return hidden if side else None
        # Where there is none the hidden states stand.
        return replace(side, hidden=hidden, weight=weight, bias=None if bias.dim() != 1 else bias)

    call = replace(task.call, exclude=exclude)
    sides = filled(task.student, *tensors[:3]), filled(task.reference, *tensors[3:])
    return replace(task, student=sides[0], reference=sides[1], call=call)
