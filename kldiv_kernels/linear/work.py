"""The loop: logits of a chunk, its values and the gradient of its logits, the gradients of hidden states and weight.

Logits are computed into one buffer, and their gradient is written over them. Nothing else of [rows, V] is kept but, for
factors below float32, a rounded copy of that gradient for the multiplications, and with a softcap the gradient beside
the logits that it is multiplied by a function of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kldiv_kernels import registry
from kldiv_kernels.backends import Call, get, value_rows
from kldiv_kernels.linear.chunks import Rows, chunk_shape, chunks, kept_rows, take, take_columns, take_logits
from kldiv_kernels.linear.gemm import Gemm
from kldiv_kernels.linear.head import Side

# Gradients of hidden states, weight and bias; of the reference's; None where nobody wants one.
Gradients = list[Tensor | None]
# Values [value rows, n], dlogits, dreference of a chunk: (its call, which rows, whether dlogits may take their place).
Turn = Callable[[Call, Rows, bool], tuple[Tensor, Tensor | None, Tensor | None]]


@dataclass(frozen=True)
class Task:
    """A `Call` whose logits and reference are still to be made, or are there, [*, V]. `call` has neither.

    logits: the dtype of those that are made; rows: at a time, 0 for a number that fits. sums_hidden: the gradient of
    hidden states is a part of a sum, and not rounded to their dtype.
    """

    student: Side | Tensor
    reference: Side | Tensor | None
    call: Call
    backend: str
    logits: torch.dtype
    rows: int
    sums_hidden: bool = False

    @property
    def rows_given(self) -> Tensor:
        """The student's, [*, H] or [*, V]."""
        return self.student.hidden if isinstance(self.student, Side) else self.student

    @property
    def count(self) -> int:
        return self.rows_given.shape[:-1].numel()

    def chunk_rows(self) -> int:
        sides = [side for side in (self.student, self.reference) if isinstance(side, Side)]
        softcaps = sum(side.softcap > 0 for side in sides)
        device = self.rows_given.device.type
        dtypes = [side.compute for side in sides]
        return chunk_shape(self.count, self.call.vocab_size, dtypes, self.logits, device, self.rows, softcaps).rows


class _Given:
    """One side whose logits are there, and their gradient."""

    def __init__(self, logits: Tensor, task: Task, wanted: bool) -> None:
        self.given, self.columns = logits.detach(), task.call.vocab_size
        self.gradient = torch.zeros_like(logits, memory_format=torch.contiguous_format) if wanted else None

    def logits(self, rows: Rows) -> Tensor:
        return take_logits(self.given, rows)

    def add(self, rows: Rows, logits: Tensor, dlogits: Tensor | None) -> None:
        if self.gradient is None:
            return
        assert dlogits is not None
        # Where a process has no columns -1 would be no number of rows.
        self.gradient.flatten(0, -2)[rows, : self.columns] = dlogits[:, : self.columns]

    def gradients(self) -> Gradients:
        return [self.gradient, None, None]


class _Made:
    """One side whose logits are made: their buffer, and the sums of its gradients."""

    def __init__(self, side: Side, task: Task, rows: int, wanted: list[bool]) -> None:
        columns = task.call.vocab_size
        weight = side.weight.detach()[:columns]
        self.side, self.task = side, task
        self.gemm = Gemm(weight if weight.dtype == side.compute else weight.to(side.compute))
        self.bias = None if side.bias is None else side.bias.detach()[:columns].to(task.logits)
        self.buffer = weight.new_empty((rows, columns), dtype=task.logits)
        self.sums_dtype = torch.float64 if task.logits == torch.float64 else torch.float32
        hidden, of_weight, of_bias = wanted
        # Rows that the mask leaves out get 0.
        whole = task.call.mask is None
        make, dtype = torch.empty_like if whole else torch.zeros_like, side.hidden.dtype
        self.dhidden = make(side.hidden, dtype=self.sums_dtype if task.sums_hidden else dtype) if hidden else None
        self.dweight = weight.new_empty(side.weight.shape, dtype=self.sums_dtype) if of_weight else None
        self.dbias = weight.new_zeros(side.columns, dtype=self.sums_dtype) if of_bias else None
        self.first, self.wanted, self.softcap = True, any(wanted), side.softcap
        # What the logits are multiplied by here.
        self.scale = side.scale / _of_temperature(side, task)

    def hidden(self, rows: Rows) -> Tensor:
        return take(self.side.hidden.detach(), rows).to(self.side.compute)

    def logits(self, rows: Rows) -> Tensor:
        hidden = self.hidden(rows)
        out = self.buffer[: hidden.shape[0]]
        self.gemm.logits(hidden, out)
        if self.bias is not None:
            out.add_(self.bias)
        if self.softcap:
            out.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)
        elif self.scale != 1:
            out.mul_(self.scale)
        return out

    def add(self, rows: Rows, logits: Tensor, dlogits: Tensor | None) -> None:
        """The gradients that these of the logits make. A softcap's slope takes the place of the logits."""
        if not self.wanted:
            return
        assert dlogits is not None
        if self.softcap:
            dlogits.mul_(logits.div_(self.softcap).square_().neg_().add_(1).mul_(self.scale))
        elif self.scale != 1:
            dlogits.mul_(self.scale)
        hidden = self.hidden(rows)
        if self.dhidden is not None:
            of_rows = self.dhidden[rows] if isinstance(rows, slice) else self.dhidden.new_empty(hidden.shape)
            self.gemm.times_weight(dlogits, of_rows)
            if not isinstance(rows, slice):
                self.dhidden.index_copy_(0, rows, of_rows)
        if self.dweight is not None:
            self.gemm.add_outer(self.dweight[: dlogits.shape[1]], dlogits, hidden, self.first)
            self.first = False
        if self.dbias is not None:
            self.dbias[: dlogits.shape[1]] += dlogits.sum(0, dtype=self.sums_dtype)

    def gradients(self) -> Gradients:
        side, dweight, dbias = self.side, self.dweight, self.dbias
        if dweight is not None:
            # Columns of padding; and where no row was left, all of it.
            dweight[0 if self.first else self.task.call.vocab_size :] = 0
            dweight = dweight.to(side.weight.dtype)
        if dbias is not None and side.bias is not None:
            dbias = dbias.to(side.bias.dtype)
        return [self.dhidden, dweight, dbias]


def run(task: Task, wanted: list[bool], turn: Turn) -> tuple[Tensor, Gradients]:
    """Values [value rows, N], and the gradients that are wanted of: student's hidden, weight, bias, the reference's.

    Of logits that are there the first of three stands for them, and they are not written to.
    """
    # The factors' dtypes are chosen already.
    with torch.autocast(task.rows_given.device.type, enabled=False):
        return _run(task, wanted, turn)


def _run(task: Task, wanted: list[bool], turn: Turn) -> tuple[Tensor, Gradients]:
    size, call = task.chunk_rows(), task.call
    index = kept_rows(call.mask)
    count = task.count if index is None else index.shape[0]

    def at_work(side: Side | Tensor, of: list[bool]) -> _Made | _Given:
        return _Made(side, task, min(size, count), of) if isinstance(side, Side) else _Given(side, task, of[0])

    student = at_work(task.student, wanted[:3])
    reference = None if task.reference is None else at_work(task.reference, wanted[3:])
    dtype = torch.float64 if task.logits == torch.float64 else torch.float32
    values = task.rows_given.new_zeros((value_rows(call.stats, call.labels_per_row), task.count), dtype=dtype)
    for part in chunks(count, size, index):
        logits = student.logits(part)
        theirs = None if reference is None else reference.logits(part)
        of_part = _call_of(task, logits, theirs, part, masked=index is None)
        free = isinstance(student, _Made) and not student.softcap
        in_place = free and get(task.backend).refuses_in_place(of_part, any(wanted[3:])) is None
        values[:, part], dlogits, dtheirs = turn(of_part, part, in_place)
        if reference is not None and theirs is not None:
            reference.add(part, theirs, dtheirs)
        student.add(part, logits, dlogits)
    of_reference: Gradients = [None, None, None] if reference is None else reference.gradients()
    return values, [*student.gradients(), *of_reference]


def _of_temperature(side: Side | Tensor | None, task: Task) -> float:
    """The scale of a side's logits, where dividing the temperature by it is as good as making those: not where a
    softcap comes in between, or a statistic of the student takes no temperature."""
    if not isinstance(side, Side) or side.softcap:
        return 1.0
    tempered = all(registry.STATISTICS[name].tempered for name in task.call.stats)
    return side.scale if tempered or side is not task.student else 1.0


def _call_of(task: Task, logits: Tensor, reference: Tensor | None, rows: Rows, *, masked: bool) -> Call:
    call = task.call
    scales = [_of_temperature(side, task) for side in (task.student, task.reference)]
    table = call.token_parameters
    if table is not None:
        # Not in its place: where one chunk has all rows it is the caller's, and autograd's.
        table = take_columns(table, rows) / table.new_tensor([*scales, 1.0, 1.0])[:, None]
    temperature, reference_temperature, alpha, beta = call.parameters
    return replace(
        call,
        logits=logits,
        reference=reference,
        labels=None if call.labels is None else take(call.labels, rows),
        mask=call.mask[rows] if masked and call.mask is not None else None,
        exclude=None if call.exclude is None else take(call.exclude, rows),
        token_parameters=table,
        parameters=(temperature / scales[0], reference_temperature / scales[1], alpha, beta),
    )
