"""Hidden states and heads that are DTensors: which rows are here, and over which group the vocabulary is spread.

A head's Shard(0) may be a part of the vocabulary, which the group keeps, or a part of a parameter that data-parallel
processes hold for each other (`fully_shard`), which is gathered. It is the first where `group=` is given, and where the
hidden states are a DTensor that the same processes have whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from torch import Tensor, distributed

from kldiv_kernels.dtensors import (
    Arguments,
    Columns,
    Layout,
    OfRows,
    columns_of,
    is_distributed,
    mean_of_rows,
    same_mesh,
)
from kldiv_kernels.linear.head import Head, taken

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

P = ParamSpec("P")
R = TypeVar("R")

_HIDDEN = ("hidden", "reference_hidden")
_HEADS = ("head", "reference_head")


def on_spread_heads(function: Callable[P, R]) -> Callable[P, R]:
    """The function, of DTensors too; see `dtensors.on_dtensors`."""
    return with_spread_rows_and_heads(mean_of_rows)(function)


def with_spread_rows_and_heads(of_rows: OfRows) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """`on_spread_heads` for a function that does something else where rows are spread."""
    return functools.partial(_on_spread_heads, of_rows)


def _on_spread_heads(of_rows: OfRows, function: Callable[P, R]) -> Callable[P, R]:
    arguments = Arguments(function)

    @functools.wraps(function)
    def on_tensors(*args: P.args, **kwargs: P.kwargs) -> R:
        given = arguments.given(args, kwargs)
        where = function.__name__
        rows = {name: x for name, x in given.items() if name not in _HEADS}
        if given.get("group") is None and not any(is_distributed(x) for x in rows.values()):
            return function(*args, **kwargs)
        heads = {name: taken(where, name, given[name]) for name in _HEADS if given.get(name) is not None}
        spread = _spread(where, rows, heads)
        layout = spread.layout
        options = arguments.options_of(of_rows, layout, given)
        local = {name: spread.local(name, x) for name, x in rows.items()}
        local |= {name: spread.head(name, heads[name]) if name in heads else None for name in _HEADS if name in given}
        found = arguments.call(args, kwargs, local, options | spread.options)
        return cast("R", found if layout is None else layout.wrapped(found))

    return on_tensors


@dataclass(frozen=True)
class _Spread:
    """What a call's DTensors say.

    layout: of the rows; None where they are plain tensors. ranks: those of the group that the vocabulary is spread
    over. columns: which of them are here, where a head says it. placed: the hidden states are a DTensor.
    """

    where: str
    layout: Layout | None
    ranks: list[int] | None
    columns: Columns | None
    options: dict[str, Any]
    placed: bool
    reduces: bool

    def local(self, name: str, x: Any) -> Any:
        layout = self.layout
        if layout is None or not isinstance(x, Tensor):
            return x
        if name in _HIDDEN and is_distributed(x):
            return self._hidden(layout, name, x)
        if name != "reference_logits" or layout.vocab is None:
            return layout.local(name, x)
        from torch.distributed.tensor import Shard

        expected = layout.of_rows(x)
        expected[layout.vocab] = Shard(x.dim() - 1)
        return layout.local(name, x, expected) if self.columns is None else self.columns.wide(layout, name, x, expected)

    def _hidden(self, layout: Layout, name: str, x: DTensor) -> Any:
        from torch.distributed.tensor import Partial

        expected = layout.of_rows(x)
        if layout.vocab is not None and x.placements[layout.vocab].is_shard():
            # Sequence parallel: what the processes of the group have of the rows is put together.
            together = list(x.placements)
            together[layout.vocab] = expected[layout.vocab]
            x = x.redistribute(placements=together)
        if list(x.placements) != expected:
            return layout.local(name, x, expected)
        if layout.vocab is not None and not self.reduces:
            expected[layout.vocab] = Partial("sum")
        return x.to_local(grad_placements=expected)

    def head(self, name: str, head: Head) -> Head:
        """The head with what is here of it."""
        if self.ranks is None and not self.placed:
            return head
        weight, bias = head.weight, head.bias
        if is_distributed(weight):
            weight = self._parameter(f"the weight of {name}", weight)
        if is_distributed(bias):
            bias = self._parameter(f"the bias of {name}", bias)
        return replace(head, weight=weight, bias=bias)

    def _parameter(self, name: str, x: Tensor) -> Tensor:
        from kldiv_kernels.linear.sharded import kept

        rows: list[list[int]] = []
        same: list[list[int]] = []
        if self.layout is not None and self.placed:
            for i in range(self.layout.mesh.ndim):
                (rows if i in self.layout.rows else same).append(_ranks(self.layout.mesh, i))
        return kept(self.where, name, x, self.ranks, rows, same)


def _spread(where: str, given: Mapping[str, Any], heads: Mapping[str, Head]) -> _Spread:
    hidden, group = given.get("hidden"), given.get("group")
    weight = heads["head"].weight if "head" in heads else None
    layout = same_mesh(where, "hidden", given) if any(is_distributed(x) for x in given.values()) else None
    ranks = None
    if isinstance(group, distributed.ProcessGroup) and distributed.get_rank(group) >= 0:
        ranks = distributed.get_process_group_ranks(group)
    if layout is not None and is_distributed(hidden):
        if layout.vocab is not None:
            raise ValueError(
                f"{where}: hidden is a DTensor with placements {hidden.placements}; expected its last dimension whole "
                f"(redistribute() it)"
            )
        of_hidden = [_ranks(layout.mesh, i) for i in range(layout.mesh.ndim)]
        if ranks is None and is_distributed(weight):
            ranks = _shared_ranks(where, hidden, of_hidden, weight)
        vocab = of_hidden.index(ranks) if ranks in of_hidden else None
        if vocab is not None:
            group = layout.mesh.get_group(vocab)
            layout = replace(layout, vocab=vocab, rows={i: dim for i, dim in layout.rows.items() if i != vocab})
    columns, options = None, {}
    if ranks is not None and group is not None:
        options["group"] = group
        if is_distributed(weight) and ranks in _vocabulary_ranks(weight):
            if given.get("vocab_start") is not None:
                raise ValueError(
                    f"{where}: vocab_start is given beside a head that is a DTensor, which says it; leave it out"
                )
            columns = columns_of(where, weight.shape[0], len(ranks), ranks.index(distributed.get_rank()))
            options |= columns.options(given.get("vocab_size"))
    reduces = given.get("reduce_hidden_grad", True)
    return _Spread(where, layout, ranks, columns, options, is_distributed(hidden), reduces)


def _shared_ranks(where: str, hidden: DTensor, of_hidden: list[list[int]], weight: DTensor) -> list[int] | None:
    """Of the processes that have the same rows, those that have different columns; None where there are none."""
    of_weight = _vocabulary_ranks(weight)
    whole = [ranks for ranks, at in zip(of_hidden, hidden.placements, strict=True) if at.is_replicate()]
    found = [ranks for ranks in whole if ranks in of_weight]
    if len(found) > 1:
        raise ValueError(
            f"{where}: head is a DTensor with placements {weight.placements}; expected its rows to be spread over one "
            f"dimension of the mesh (redistribute() it)"
        )
    return found[0] if found else None


def _ranks(mesh: Any, dim: int) -> list[int]:
    return distributed.get_process_group_ranks(mesh.get_group(dim))


def _vocabulary_ranks(weight: DTensor) -> list[list[int]]:
    """The processes of each of the mesh's dimensions that spread its rows."""
    return [
        _ranks(weight.device_mesh, i)
        for i, placement in enumerate(weight.placements)
        if type(placement).__name__ == "Shard" and placement.is_shard(0)
    ]
