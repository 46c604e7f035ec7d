"""Logits that are spread over a group, as the source of statistics and losses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kldiv_kernels import autograd, inputs, ops
from kldiv_kernels.backends import Call, Sharded, get
from kldiv_kernels.parallel.agreement import agree
from kldiv_kernels.parallel.shard import Group, Shard, checked_shard
from kldiv_kernels.parallel.statistics import gathered, statistics
from kldiv_kernels.parallel.whole import whole
from kldiv_kernels.sources import Attach, Logits, PolicyTokens, Source, TopKTeacher


@dataclass(frozen=True)
class SharedLogits:
    """A `Source`. `logits` and `reference` stand for whole rows: a row of memory, expanded.

    No gradient comes out of the pass that finds the values: that pass waits for the other processes.
    """

    where: str
    shard: Shard
    logits: Tensor
    reference: Tensor | None
    here: Tensor
    reference_here: Tensor | None

    def wanted(self) -> tuple[bool, bool]:
        grad = torch.is_grad_enabled()
        reference = self.reference_here is not None and self.reference_here.requires_grad
        return grad and self.here.requires_grad, grad and reference

    def waits(self) -> bool:
        return True

    def known_beforehand(self, where: str, why_not: str | None, call: Call, backend: str) -> bool:
        return False

    def statistics(self, call: Call, backend: str) -> Tensor:
        agree(
            self.shard, self.where, self.here, stats=list(call.stats), backend=backend, rows=call.rows,
            vocab_size=call.vocab_size, labels=None if call.labels is None else call.labels_per_row,
        )  # fmt: skip
        reference = None if call.reference is None else self.reference_here
        if isinstance(get(backend), Sharded):
            return statistics(self.shard, call, self.here, reference, backend)
        rows, reference_rows = (
            None if x is None else whole(self.shard, x, call.vocab_size) for x in (self.here, reference)
        )
        assert rows is not None
        return ops.statistics(replace(call, logits=rows, reference=reference_rows), backend, any(self.wanted()))

    def loss(self, call: Call, backend: str, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("no gradient is known beforehand")

    def policy(self, call: Call, backend: str, known: PolicyTokens) -> tuple[Tensor, Attach]:
        raise AssertionError("no gradient is known beforehand")

    def topk(self, call: Call, backend: str, teacher: TopKTeacher) -> tuple[Tensor, Attach]:
        raise AssertionError("no gradient is known beforehand")


def largest_of_shards(source: SharedLogits, ids: Tensor | None, k: int, columns: int, mask: Tensor | None) -> Tensor:
    """[*, k]: the columns of the k largest logits of whole rows, from those of the columns here, `ids` [*, k or fewer].

    The largest first; of equal ones that of the first column, which the first rank has.
    """
    shard, here = source.shard, source.here.detach()
    agree(shard, source.where, here, k=k, vocab_size=columns, rows=source.logits.shape[:-1].numel())
    leading = here.shape[:-1]
    dtype = torch.float64 if here.dtype == torch.float64 else torch.float32
    values = torch.full((*leading, k), -torch.inf, dtype=dtype, device=here.device)
    numbers = torch.full((*leading, k), columns, dtype=torch.int64, device=here.device)
    if ids is not None:
        values[..., : ids.shape[-1]] = here.gather(-1, ids).to(dtype)
        numbers[..., : ids.shape[-1]] = ids + shard.start
    every_value, every_number = gathered(shard, values, numbers)
    assert every_number is not None
    flat_values, flat_numbers = (x.movedim(0, -2).flatten(-2) for x in (every_value, every_number))
    # What stands for none has the last number, and so comes behind columns at −inf.
    by_number = flat_numbers.argsort(dim=-1, stable=True)
    order = flat_values.gather(-1, by_number).sort(dim=-1, descending=True, stable=True).indices[..., :k]
    found = flat_numbers.gather(-1, by_number.gather(-1, order))
    # Columns of ranks that have fewer than k stand for none; there are k in all.
    return found if mask is None else torch.where(mask.reshape(*leading, 1), found, torch.arange(k, device=here.device))


def logits_or_shared(
    where: str,
    logits: Tensor,
    reference: Tensor | None,
    group: Group | None,
    vocab_start: int | None,
    vocab_size: int | None,
    in_place: bool = False,
) -> Source:
    """The source for these arguments of a public function."""
    if group is None:
        if vocab_start is not None:
            raise ValueError(f"{where}: vocab_start is {vocab_start}, but group is None; expected them together")
        return Logits(logits, reference, in_place)
    for name, x in (("logits", logits), ("reference_logits", reference)):
        if x is not None and not (name == "reference_logits" and not isinstance(x, Tensor)):
            _checked(where, name, x)
    shard = checked_shard(where, group, vocab_start, logits.shape[-1], vocab_size)
    if shard is None:
        return Logits(logits, reference, in_place)
    if in_place:
        raise ValueError(
            f"{where}: in_place is True, but the gradient of logits of a group waits for the loss; leave it out"
        )
    if autograd.transformed():
        raise NotImplementedError(f"{where}: torch.func transforms no call that waits for the processes of a group")
    if reference is not None and vocab_start is None and reference.shape[-1] != logits.shape[-1]:
        raise ValueError(
            f"{where}: reference_logits has {reference.shape[-1]} columns of this process; expected "
            f"{logits.shape[-1]} like logits (where the padding differs, give vocab_start and vocab_size)"
        )
    if reference is not None and reference.shape[-1] < shard.columns(shard.total if vocab_size is None else vocab_size):
        raise ValueError(
            f"{where}: reference_logits has {reference.shape[-1]} columns of this process; expected the "
            f"{shard.columns(shard.total if vocab_size is None else vocab_size)} that logits have"
        )
    stand_in = None if reference is None else _stand_in(reference, shard.total)
    return SharedLogits(where, shard, _stand_in(logits, shard.total), stand_in, logits, reference)


def _checked(where: str, name: str, x: Tensor) -> None:
    # A process may have no columns at all.
    if isinstance(x, Tensor) and x.dim() >= 1 and x.shape[-1] == 0:
        x = x.new_empty((*x.shape[:-1], 1))
    inputs.logits_checked(where, x, name)


def _stand_in(logits: Tensor, columns: int) -> Tensor:
    return logits.detach().new_empty(columns).expand(*logits.shape[:-1], columns)
