"""Hidden states and heads in the place of logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kldiv_kernels import _ops, autograd, ops
from kldiv_kernels.backends import Call
from kldiv_kernels.linear import operators, shards
from kldiv_kernels.linear.chunks import chunk_shape
from kldiv_kernels.linear.head import Head, Side, side_of
from kldiv_kernels.linear.work import Task
from kldiv_kernels.parallel import Group, Shard, agree, checked_shard
from kldiv_kernels.sources import Attach, PolicyTokens, TopKTeacher

AnyHead = Tensor | nn.Linear | Head


@dataclass(frozen=True)
class HiddenStates:
    """A `Source`. `logits` and `reference` stand for what is still to be made: a row of memory, expanded.

    `shard`: which columns of the vocabulary the heads have, where it is spread over a group. The hidden states'
    gradient is then summed over the group if `reduces`.
    """

    where: str
    student: Side
    other: Side | Tensor | None
    logits: Tensor
    reference: Tensor | None
    rows: int
    shard: Shard | None
    reduces: bool

    def wanted(self) -> tuple[bool, bool]:
        of = self._wanted()
        return any(of[:3]), any(of[3:])

    def waits(self) -> bool:
        # Factors too: the logits' gradient is rounded to their dtype, and under autocast the tensors may be wider.
        sides = (self.student, self.other)
        dtypes = [(x.compute, x.hidden.dtype, x.weight.dtype) for x in sides if isinstance(x, Side)]
        if isinstance(self.other, Tensor):
            dtypes.append((self.other.dtype,) * 3)
        return any(of and torch.float16 in found for of, found in zip(self.wanted(), dtypes, strict=False))

    def known_beforehand(self, where: str, why_not: str | None, call: Call, backend: str) -> bool:
        # Of a group, the pass that finds the values waits for the other processes.
        return self.shard is None and any(self._wanted()) and why_not is None and not self.waits()

    def statistics(self, call: Call, backend: str) -> Tensor:
        if self.shard is not None:
            return self._of_shards(self.shard, call, backend)
        values: Tensor = _ops.ops.linear_statistics(*self._arguments(call, backend))
        return values

    def _of_shards(self, shard: Shard, call: Call, backend: str) -> Tensor:
        task = self._task(call, backend)
        sides = [side for side in (task.student, task.reference) if isinstance(side, Side)]
        # All ranks take the same rows at a time, whatever their own columns are.
        rows = chunk_shape(
            task.count, -(-shard.total // shard.size), [side.compute for side in sides], task.logits,
            self.student.hidden.device.type, self.rows, sum(side.softcap > 0 for side in sides),
        ).rows  # fmt: skip
        agree(
            shard, self.where, self.student.hidden, stats=list(call.stats), backend=backend, rows=task.count,
            vocab_size=call.vocab_size, labels=None if call.labels is None else call.labels_per_row,
            rows_per_chunk=rows, hidden_size=self.student.hidden.shape[-1],
        )  # fmt: skip
        return shards.statistics(shard, replace(task, rows=rows), self._tensors(), self.reduces)

    def loss(self, call: Call, backend: str, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        values, *gradients = _ops.ops.linear_one_read(
            *self._detached(call, backend), coefficients.contiguous(), self._wanted()
        )
        return self._attach(gradients)(autograd.weighted_sum(coefficients, values)), values

    def policy(self, call: Call, backend: str, known: PolicyTokens) -> tuple[Tensor, Attach]:
        values, *gradients = _ops.ops.linear_policy(
            *self._detached(call, backend), known.coefficients, known.tokens, known.term, known.kl, known.bounds,
            self._of_student(),
        )  # fmt: skip
        return values, self._attach(gradients)

    def topk(self, call: Call, backend: str, teacher: TopKTeacher) -> tuple[Tensor, Attach]:
        divergences, *gradients = _ops.ops.linear_topk(
            *self._detached(call, backend), teacher.logprobs, teacher.scale, teacher.kind, teacher.alpha, teacher.beta,
            self._of_student(),
        )  # fmt: skip
        return divergences, self._attach(gradients)

    def _tensors(self) -> list[Tensor]:
        """Six, in the operators' order; where one is missing the hidden states, of which nobody then asks."""
        student, other = self.student, self.other
        nothing = student.hidden.detach()
        found = [student.hidden, student.weight, student.bias, nothing, nothing, nothing]
        if isinstance(other, Side):
            found[3:] = [other.hidden, other.weight, other.bias]
        elif other is not None:
            found[3] = other
        return [nothing if x is None else x for x in found]

    def _wanted(self) -> list[bool]:
        return [torch.is_grad_enabled() and x.requires_grad for x in self._tensors()]

    def _of_student(self) -> list[bool]:
        return [*self._wanted()[:3], False, False, False]

    def _task(self, call: Call, backend: str) -> Task:
        # A statistic of one side has no use for the other.
        other = None if call.reference is None else self.other
        return Task(self.student, other, call, backend, self.logits.dtype, self.rows)

    def _arguments(self, call: Call, backend: str) -> tuple[Any, ...]:
        return operators.arguments(self._task(call, backend))

    def _detached(self, call: Call, backend: str) -> tuple[Any, ...]:
        return tuple(x.detach() if isinstance(x, Tensor) else x for x in self._arguments(call, backend))

    def _attach(self, gradients: list[Tensor]) -> Attach:
        pairs = [pair for pair in zip(self._tensors(), gradients, strict=True) if pair[0].requires_grad]
        pairs = [(tensor, gradient) for tensor, gradient in pairs if gradient.shape == tensor.shape]
        return lambda value: ops.with_gradients(value, *zip(*pairs, strict=True))


def hidden_states(
    where: str,
    hidden: Tensor,
    head: AnyHead,
    reference_hidden: Tensor | None = None,
    reference_head: AnyHead | None = None,
    reference_logits: Tensor | None = None,
    *,
    logits_dtype: torch.dtype | None = None,
    rows_per_chunk: int | None = None,
    frozen_reference: bool = False,
    group: Group | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    reduce_hidden_grad: bool = True,
) -> HiddenStates:
    """The source for these arguments; raises TypeError or ValueError naming the argument, before anything is made."""
    if autograd.transformed():
        raise NotImplementedError(f"{where}: torch.func transforms are for logits; use the function without linear_")
    if group is None and vocab_start is not None:
        raise ValueError(f"{where}: vocab_start is {vocab_start}, but group is None; expected them together")
    if group is None and reduce_hidden_grad is not True:
        raise ValueError(f"{where}: reduce_hidden_grad is {reduce_hidden_grad!r}, but group is None; leave it out")
    spread = group is not None
    student = side_of(where, hidden, head, may_be_empty=spread)
    leading = hidden.shape[:-1]
    other: Side | Tensor | None = reference_logits
    if reference_hidden is None and reference_head is not None:
        raise ValueError(f"{where}: reference_head is given without reference_hidden; expected both or none")
    if reference_hidden is not None:
        if reference_logits is not None:
            raise ValueError(f"{where}: reference_hidden and reference_logits are both given; pass one of them")
        if reference_head is None:
            raise ValueError(f"{where}: reference_head is None; reference_hidden needs the teacher's head")
        other = side_of(where, reference_hidden, reference_head, "reference_", may_be_empty=spread)
        if reference_hidden.shape[:-1] != leading:
            raise ValueError(
                f"{where}: reference_hidden has shape {list(reference_hidden.shape)}; expected {[*leading, 'H']} like "
                f"hidden"
            )
        if other.weight.device != student.weight.device:
            raise ValueError(
                f"{where}: reference_hidden is on {other.weight.device}; expected {student.weight.device} like hidden"
            )
    dtype = _logits_dtype(where, student, other, logits_dtype)
    if rows_per_chunk is not None and (
        isinstance(rows_per_chunk, bool) or not isinstance(rows_per_chunk, int) or rows_per_chunk < 1
    ):
        raise ValueError(f"{where}: rows_per_chunk is {rows_per_chunk!r}; expected 1 and more, or None")
    if frozen_reference and isinstance(other, Side):
        other = replace(
            other, hidden=other.hidden.detach(), weight=other.weight.detach(),
            bias=None if other.bias is None else other.bias.detach(),
        )  # fmt: skip
    elif frozen_reference and isinstance(other, Tensor):
        other = other.detach()
    shard = None
    if group is not None:
        shard = checked_shard(where, group, vocab_start, student.columns, vocab_size)
        _same_shard_checked(where, shard, student, other, vocab_start, vocab_size)

    def stand_in(x: Side | Tensor) -> Tensor:
        if isinstance(x, Tensor) and shard is None:
            return x
        row = (x.weight if isinstance(x, Side) else x).detach()
        columns = shard.total if shard is not None else row.shape[0]
        return row.new_empty(columns, dtype=dtype if isinstance(x, Side) else x.dtype).expand(*leading, columns)

    reference = None if other is None else stand_in(other)
    return HiddenStates(
        where, student, other, stand_in(student), reference, rows_per_chunk or 0, shard, reduce_hidden_grad
    )


def _same_shard_checked(
    where: str,
    shard: Shard | None,
    student: Side,
    other: Side | Tensor | None,
    vocab_start: int | None,
    vocab_size: int | None,
) -> None:
    """The teacher's columns are those of the student's head."""
    if shard is None or other is None:
        return
    width = other.columns if isinstance(other, Side) else other.shape[-1]
    name = "reference_head" if isinstance(other, Side) else "reference_logits"
    needed = shard.columns(shard.total if vocab_size is None else vocab_size)
    if (vocab_start is None and width != student.columns) or width < needed:
        raise ValueError(
            f"{where}: {name} has {width} columns of this process; expected {student.columns} like head (where the "
            f"padding differs, give vocab_start and vocab_size)"
        )


def _logits_dtype(where: str, student: Side, other: Side | Tensor | None, given: torch.dtype | None) -> torch.dtype:
    made = [side.compute for side in (student, other) if isinstance(side, Side)]
    allowed = [torch.float64] if torch.float64 in made else list(dict.fromkeys((torch.float32, student.compute)))
    if given is not None and given not in allowed:
        names = " or ".join(str(dtype) for dtype in allowed)
        raise ValueError(f"{where}: logits_dtype is {given}; expected {names}, or None")
    return allowed[0] if given is None else given
