"""DTensor arguments: where every rank has whole rows, a call is computed from the local tensors."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeGuard, TypeVar, cast

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

P = ParamSpec("P")
R = TypeVar("R")


def on_replicas(function: Callable[P, R]) -> Callable[P, R]:
    """The function, of DTensors too, if they are replicated: it gets their local tensors.

    What it returns is replicated as well, and so are the gradients. Tensors beside them are taken to be the same on
    every rank.
    """
    names = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def on_tensors(*args: P.args, **kwargs: P.kwargs) -> R:
        meshes = [x.device_mesh for x in (*args, *kwargs.values()) if _is_distributed(x)]
        if not meshes:
            return function(*args, **kwargs)
        local = functools.partial(_local, function.__name__)
        on_locals = cast("Callable[..., R]", function)
        found = on_locals(*map(local, names, args), **{name: local(name, x) for name, x in kwargs.items()})
        return cast("R", _replicated(found, meshes[0]))

    return on_tensors


def _is_distributed(x: Any) -> TypeGuard[DTensor]:
    # Told by what it has: importing the class takes as long as the rest of the package.
    return isinstance(x, Tensor) and hasattr(x, "device_mesh")


def _local(where: str, name: str, x: Any) -> Any:
    if not _is_distributed(x):
        return x
    if not all(placement.is_replicate() for placement in x.placements):
        raise ValueError(
            f"{where}: {name} is a DTensor with placements {x.placements}; expected Replicate() in all dimensions of "
            f"its mesh (redistribute() it)"
        )
    return x.to_local(grad_placements=x.placements)


def _replicated(found: Any, mesh: Any) -> Any:
    if isinstance(found, Tensor):
        from torch.distributed.tensor import DTensor, Replicate

        return DTensor.from_local(found, mesh, [Replicate()] * mesh.ndim, run_check=False)
    if isinstance(found, dict):
        return type(found)({name: _replicated(x, mesh) for name, x in found.items()})
    if isinstance(found, tuple):
        return type(found)(*(_replicated(x, mesh) for x in found))
    return dataclasses.replace(
        found, **{field.name: _replicated(getattr(found, field.name), mesh) for field in dataclasses.fields(found)}
    )
