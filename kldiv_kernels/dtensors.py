"""DTensor arguments: a call is computed from what is local of them, and returns DTensors.

Of the logits' placements, Shard of the last dimension is a group over which the vocabulary is spread, Shard of another
one says which rows are here, and Replicate that every process has the same.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeGuard, TypeVar, cast

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

P = ParamSpec("P")
R = TypeVar("R")

# What a function does where rows are spread, with these arguments: the options to call it with, or an error.
OfRows = Callable[["Layout", Mapping[str, Any]], dict[str, Any]]

_WIDE = ("logits", "reference_logits")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the rows of a call are spread over a mesh.

    placements: of the first argument. leading: the shape of all rows. vocab: the mesh's dimension over which their
    columns are spread, rows: that of the tensor that each of the others spreads.
    """

    where: str
    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    leading: tuple[int, ...]
    vocab: int | None
    rows: dict[int, int]

    def of_rows(self, x: Tensor) -> list[Placement]:
        """The placements that belong to a tensor with these leading dimensions, or with the first of them."""
        from torch.distributed.tensor import Replicate, Shard

        spread = {i: Shard(dim) for i, dim in self.rows.items() if dim < x.dim()}
        return [spread.get(i, Replicate()) for i in range(self.mesh.ndim)]

    def local(self, name: str, x: Any, expected: list[Placement] | None = None) -> Any:
        """What is here of an argument; a tensor that is no DTensor is all here."""
        if not is_distributed(x):
            return x
        expected = self.of_rows(x) if expected is None else expected
        if list(x.placements) != expected:
            if not all(placement.is_replicate() for placement in x.placements):
                raise ValueError(
                    f"{self.where}: {name} is a DTensor with placements {x.placements}; expected {tuple(expected)} or "
                    f"Replicate() (redistribute() it)"
                )
            # What everyone has is cut without an exchange.
            x = x.redistribute(placements=expected)
        return x.to_local(grad_placements=expected)

    def wrapped(self, found: Any) -> Any:
        """The result as DTensors: rows are spread as the logits' are, a loss of spread rows is a part of the sum."""
        if isinstance(found, Tensor):
            return self._wrapped(found)
        if isinstance(found, dict):
            return type(found)({name: self.wrapped(x) for name, x in found.items()})
        if isinstance(found, tuple):
            return type(found)(*(self.wrapped(x) for x in found))
        of_fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
        # Metrics are means, maxima and shares: of the rows that are here.
        plain = {"metrics"} if self.rows else set()
        return dataclasses.replace(
            found, **{name: x if name in plain else self.wrapped(x) for name, x in of_fields.items()}
        )

    def _wrapped(self, found: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        if found.dim() < len(self.leading):
            spread: dict[int, Placement] = {i: Partial("sum") for i in self.rows}
        else:
            spread = {i: Shard(dim) for i, dim in self.rows.items()}
        placements = [spread.get(i, Replicate()) for i in range(self.mesh.ndim)]
        if not self.rows:
            return DTensor.from_local(found, self.mesh, placements, run_check=False)
        whole = found.new_empty(
            (*self.leading, *found.shape[len(self.leading) :]) if found.dim() else (), device="meta"
        )
        return DTensor.from_local(
            found, self.mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )


def on_dtensors(function: Callable[P, R]) -> Callable[P, R]:
    """The function, of DTensors too: its first argument's placements say what is here, and the others fit them.

    Tensors beside DTensors are those of this process. Where rows are spread, what "mean" divides by has to be given.
    """
    return with_spread_rows(mean_of_rows)(function)


def with_spread_rows(of_rows: OfRows) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """`on_dtensors` for a function that does something else where rows are spread."""
    return functools.partial(_on_dtensors, of_rows)


class Arguments:
    """The arguments of a function by name, and calls of it with others in their place."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, parameters = function, inspect.signature(function).parameters
        self.names = list(parameters)
        self._defaults = {name: of.default for name, of in parameters.items() if of.default is not of.empty}

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Those of a call, without defaults."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def options_of(self, of_rows: OfRows, layout: Layout | None, given: Mapping[str, Any]) -> dict[str, Any]:
        """What a call needs beside these where rows are spread."""
        return of_rows(layout, {**self._defaults, **given}) if layout is not None and layout.rows else {}

    def call(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], local: Mapping[str, Any], options: Mapping[str, Any]
    ) -> Any:
        """The call with `local` in the place of what was given, and with the options."""
        positional = (local[name] for name in self.names[: len(args)])
        rest = {name: local[name] for name in kwargs}
        # What is too much is the function's to refuse.
        return self.function(*positional, *args[len(self.names) :], **{**rest, **options})


def _on_dtensors(of_rows: OfRows, function: Callable[P, R]) -> Callable[P, R]:
    arguments = Arguments(function)

    @functools.wraps(function)
    def on_tensors(*args: P.args, **kwargs: P.kwargs) -> R:
        if not any(is_distributed(x) for x in (*args, *kwargs.values())):
            return function(*args, **kwargs)
        given = arguments.given(args, kwargs)
        layout = same_mesh(function.__name__, arguments.names[0], given)
        options = arguments.options_of(of_rows, layout, given)
        columns = _columns(layout, given)
        local = {name: _local(layout, columns, name, x) for name, x in given.items()}
        if columns is not None:
            options |= {"group": layout.mesh.get_group(layout.vocab), **columns.options(given.get("vocab_size"))}
        return cast("R", layout.wrapped(arguments.call(args, kwargs, local, options)))

    return on_tensors


def is_distributed(x: Any) -> TypeGuard[DTensor]:
    # Told by what it has: importing the class takes as long as the rest of the package.
    return isinstance(x, Tensor) and hasattr(x, "device_mesh")


def layout_of(where: str, name: str, x: DTensor) -> Layout:
    """How the rows of a DTensor [*, V] are spread; raises ValueError for what is no layout of rows."""
    last, vocab, rows = x.dim() - 1, None, {}
    for i, placement in enumerate(x.placements):
        dim = getattr(placement, "dim", None)
        if placement.is_replicate():
            continue
        # Those that are strided are a Shard too, of another order.
        if not placement.is_shard() or dim is None or type(placement).__name__ != "Shard":
            raise ValueError(
                f"{where}: {name} is a DTensor with placements {x.placements}; expected Shard or Replicate "
                f"(redistribute() it)"
            )
        dim = dim % x.dim()
        if dim < last:
            rows[i] = dim
        elif vocab is None:
            vocab = i
        else:
            raise ValueError(
                f"{where}: {name} is a DTensor with placements {x.placements}; expected its columns to be spread over "
                f"one dimension of the mesh (redistribute() it)"
            )
    return Layout(where, x.device_mesh, x.placements, tuple(x.shape[:-1]), vocab, rows)


def same_mesh(where: str, first: str, given: Mapping[str, Any]) -> Layout:
    """The layout of arguments of which some are DTensors; raises ValueError where their meshes differ."""
    logits = given.get(first)
    if is_distributed(logits):
        layout = layout_of(where, first, logits)
    else:
        from torch.distributed.tensor import Replicate

        # Whole rows here: the others have to be the same everywhere.
        mesh = next(x.device_mesh for x in given.values() if is_distributed(x))
        leading = tuple(logits.shape[:-1]) if isinstance(logits, Tensor) else ()
        layout = Layout(where, mesh, tuple(Replicate() for _ in range(mesh.ndim)), leading, None, {})
    for name, x in given.items():
        if is_distributed(x) and x.device_mesh != layout.mesh:
            raise ValueError(f"{where}: {name} is on {x.device_mesh}; expected {layout.mesh} like the other DTensors")
    return layout


def mean_of_rows(layout: Layout, given: Mapping[str, Any]) -> dict[str, Any]:
    """No options; raises ValueError where rows of other processes would have to be counted, or looked at."""
    where = layout.where
    if given.get("shift") and max(layout.rows.values()) == len(layout.leading) - 1:
        raise ValueError(
            f"{where}: shift is True, but tokens are spread over the mesh, {layout.placements}, and the next one may "
            f"be elsewhere; shift labels and masks before they are spread"
        )
    if given.get("reduction") == "mean" and given["normalizer"] is None:
        raise ValueError(
            f"{where}: normalizer is None, but rows are spread over the mesh, {layout.placements}; expected the number "
            f"of valid tokens of all of them, or a sum"
        )
    return {}


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns of `total` are here."""

    where: str
    start: int
    width: int
    total: int

    def options(self, vocab_size: int | None) -> dict[str, int]:
        """What a function of a group is told."""
        return {"vocab_start": self.start, "vocab_size": self.total if vocab_size is None else vocab_size}

    def wide(self, layout: Layout, name: str, x: Any, expected: list[Placement]) -> Any:
        """The columns of logits that are here; those that are no DTensor may be whole, if they get no gradient."""
        if not isinstance(x, Tensor) or not x.dim():
            return x
        width = x.shape[-1]
        whole = width == self.total and (is_distributed(x) or not x.requires_grad)
        if not whole and (is_distributed(x) or width != self.width):
            raise ValueError(
                f"{self.where}: {name} has shape {list(x.shape)}; expected {self.total} columns in a DTensor like "
                f"logits, or the {self.width} of this process"
            )
        if is_distributed(x) or width == self.width:
            return layout.local(name, x, expected)
        return x.narrow(-1, self.start, self.width)


def columns_of(where: str, total: int, parts: int, part: int) -> Columns:
    """As Shard has them: equal parts, of which the last ones may be smaller, or empty."""
    width = -(-total // parts)
    start = min(total, width * part)
    return Columns(where, start, min(width, total - start), total)


def _columns(layout: Layout, given: Mapping[str, Any]) -> Columns | None:
    if layout.vocab is None:
        return None
    if given.get("group") is not None or given.get("vocab_start") is not None:
        raise ValueError(
            f"{layout.where}: group is given beside logits that are a DTensor, whose mesh says it; leave it out"
        )
    total = next(iter(given.values())).shape[-1]
    return columns_of(layout.where, total, layout.mesh.size(layout.vocab), layout.mesh.get_local_rank(layout.vocab))


def _local(layout: Layout, columns: Columns | None, name: str, x: Any) -> Any:
    if name not in _WIDE:
        return layout.local(name, x)
    expected = list(layout.placements)
    return layout.local(name, x, expected) if columns is None else columns.wide(layout, name, x, expected)
