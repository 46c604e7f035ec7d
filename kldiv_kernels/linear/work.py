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
    """A `Call` whose logits, and perhaps reference, are still to be made. `call` has neither.

    logits: the dtype of the logits; rows: at a time, 0 for a number that fits.
    """

    student: Side
    reference: Side | Tensor | None
    call: Call
    backend: str
    logits: torch.dtype
    rows: int

    @property
    def count(self) -> int:
        return self.student.hidden.shape[0]

    def chunk_rows(self) -> int:
        sides = [side for side in (self.student, self.reference) if isinstance(side, Side)]
        softcaps = sum(side.softcap > 0 for side in sides)
        device = self.student.hidden.device.type
        dtypes = [side.compute for side in sides]
        return chunk_shape(self.count, self.call.vocab_size, dtypes, self.logits, device, self.rows, softcaps).rows


class Made:
    """One side at work: its logits' buffer, and the sums of its gradients."""

    def __init__(self, side: Side, task: Task, rows: int, wanted: tuple[bool, bool, bool]) -> None:
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
        self.dhidden = (torch.empty_like if whole else torch.zeros_like)(side.hidden) if hidden else None
        self.dweight = weight.new_empty(side.weight.shape, dtype=self.sums_dtype) if of_weight else None
        self.dbias = weight.new_zeros(side.columns, dtype=self.sums_dtype) if of_bias else None
        self.first = True

    @property
    def wanted(self) -> bool:
        return any(x is not None for x in (self.dhidden, self.dweight, self.dbias))

    def hidden(self, rows: Rows) -> Tensor:
        return take(self.side.hidden.detach(), rows).to(self.side.compute)

    def logits(self, rows: Rows) -> Tensor:
        hidden = self.hidden(rows)
        out = self.buffer[: hidden.shape[0]]
        self.gemm.logits(hidden, out)
        if self.bias is not None:
            out.add_(self.bias)
        if self.side.softcap:
            out.mul_(self.side.scale / self.side.softcap).tanh_().mul_(self.side.softcap)
        return out

    def add(self, rows: Rows, logits: Tensor | None, dlogits: Tensor | None) -> None:
        """The gradients that these of the logits make. A softcap's slope takes the place of the logits."""
        assert logits is not None
        assert dlogits is not None
        softcap = self.side.softcap
        if softcap:
            dlogits.mul_(logits.div_(softcap).square_().neg_().add_(1).mul_(self.side.scale))
        hidden = self.hidden(rows)
        if self.dhidden is not None:
            of_rows = self.dhidden[rows] if isinstance(rows, slice) else torch.empty_like(hidden)
            self.gemm.times_weight(dlogits, of_rows)
            if not isinstance(rows, slice):
                self.dhidden.index_copy_(0, rows, of_rows.to(self.dhidden.dtype))
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
    """Values [value rows, N], and the gradients that are wanted of: student's hidden, weight, bias, the reference's."""
    # The factors' dtypes are chosen already.
    with torch.autocast(task.student.hidden.device.type, enabled=False):
        return _run(task, wanted, turn)


def _run(task: Task, wanted: list[bool], turn: Turn) -> tuple[Tensor, Gradients]:
    size, call = task.chunk_rows(), task.call
    index = kept_rows(call.mask)
    count = task.count if index is None else index.shape[0]
    rows = min(size, count)
    student = Made(task.student, task, rows, (wanted[0], wanted[1], wanted[2]))
    made, given, dgiven = None, None, None
    if isinstance(task.reference, Side):
        made = Made(task.reference, task, rows, (wanted[3], wanted[4], wanted[5]))
    elif task.reference is not None:
        given = task.reference.detach()
        dgiven = torch.zeros_like(given, memory_format=torch.contiguous_format) if wanted[3] else None
    dtype = torch.float64 if task.logits == torch.float64 else torch.float32
    values = student.buffer.new_zeros((value_rows(call.stats, call.labels_per_row), task.count), dtype=dtype)
    for part in chunks(count, size, index):
        logits = student.logits(part)
        reference = made.logits(part) if made is not None else None if given is None else take_logits(given, part)
        of_part = _call_of(task, logits, reference, part, masked=index is None)
        in_place = not task.student.softcap and get(task.backend).refuses_in_place(of_part, any(wanted[3:])) is None
        values[:, part], dlogits, dreference = turn(of_part, part, in_place)
        if made is not None and made.wanted:
            made.add(part, reference, dreference)
        if dgiven is not None:
            assert dreference is not None
            dgiven.view(-1, dgiven.shape[-1])[part, : call.vocab_size] = dreference[:, : call.vocab_size]
        if student.wanted:
            student.add(part, logits, dlogits)
    of_reference = [dgiven, None, None] if made is None else made.gradients()
    return values, [*student.gradients(), *of_reference]


def _call_of(task: Task, logits: Tensor, reference: Tensor | None, rows: Rows, *, masked: bool) -> Call:
    """The call of a chunk. A scale of the logits is one of the temperature, unless a softcap comes in between."""
    call = task.call
    scales = [
        side.scale if isinstance(side, Side) and not side.softcap else 1.0 for side in (task.student, task.reference)
    ]
    table = call.token_parameters
    if table is not None:
        table = take_columns(table, rows)
        table[:2] /= table.new_tensor(scales)[:, None]
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
