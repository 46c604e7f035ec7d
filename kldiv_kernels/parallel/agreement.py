"""Whether the processes of a group make the same call: told to all before anyone waits for numbers of the others.

It is one small exchange. On GPUs its answer would have to be waited for, so there it is made with KLDIV_CHECK_VALUES=1
only, as every check of values is.
"""

from __future__ import annotations

import contextvars
import functools
import json
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, distributed

from kldiv_kernels import inputs
from kldiv_kernels.parallel.shard import Group, Shard, all_gather

P = ParamSpec("P")
R = TypeVar("R")

# What a process has to say, padded: what is longer is cut.
CHECK_BYTES = 1024
# The arguments that are groups, in the order in which a function meets them.
_GROUPS = ("group", "sequence_group", "batch_group")
# Those that the public function under way has met so far.
_waiting: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("waiting", default=None)


class GroupMismatchError(ValueError):
    """The processes of a group do not make the same call; raised in all of them."""


def together(function: Callable[P, R]) -> Callable[P, R]:
    """The function; where it raises in one process, the others of its groups are told, and raise too."""

    @functools.wraps(function)
    def with_others(*args: P.args, **kwargs: P.kwargs) -> R:
        alone = all(kwargs.get(name) is None for name in _GROUPS)
        if alone or _waiting.get() is not None or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        met: list[str] = []
        token = _waiting.set(met)
        try:
            return function(*args, **kwargs)
        except Exception as error:
            _tell(args, kwargs, met, error)
            raise
        finally:
            _waiting.reset(token)

    return with_others


def _tell(args: Any, kwargs: Any, met: list[str], error: Exception) -> None:
    """Tells the processes of the groups that were not met: those who were have nothing to wait for any more."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    if not tensors or not inputs.looks_at(tensors[0]):
        return
    for name in _GROUPS:
        group = kwargs.get(name)
        if name in met or not isinstance(group, distributed.ProcessGroup) or distributed.get_rank(group) < 0:
            continue
        if distributed.get_world_size(group) > 1:
            _exchanged(group, {"raised": f"{type(error).__name__}: {error}"}, tensors[0].device)


def agree(shard: Shard, where: str, on: Tensor, **said: Any) -> None:
    """Raises `GroupMismatchError` in all processes where one has failed, says something else, or has columns that do
    not follow those of the one before."""
    told = _agreed("group", shard.group, where, on, {"start": shard.start, "width": shard.width}, said)
    end = 0
    for rank, of in enumerate(told):
        if of["start"] != end:
            ranges = ", ".join(f"[{x['start']}, {x['start'] + x['width']})" for x in told)
            raise GroupMismatchError(
                f"{where}: vocab_start is {of['start']} on rank {rank} of group; expected {end}, where the columns of "
                f"the rank before end (the ranks have {ranges})"
            )
        end += of["width"]
    if told and end < shard.total:
        raise GroupMismatchError(
            f"{where}: the ranks of group have {end} columns; expected {shard.total}, the vocabulary"
        )


def agree_in(name: str, group: Group | None, where: str, on: Tensor, **said: Any) -> None:
    """The same of the group that the argument `name` is, whose processes have no columns; None: this one alone."""
    if group is not None:
        _agreed(name, group, where, on, {}, said)


def _agreed(
    name: str, group: Group, where: str, on: Tensor, more: dict[str, Any], said: dict[str, Any]
) -> list[dict[str, Any]]:
    """What the ranks have told each other, in their order; nothing where values are not looked at."""
    if not inputs.looks_at(on):
        return []
    met = _waiting.get()
    if met is not None:
        met.append(name)
    told = _exchanged(group, {**more, "said": {"function": where, **said}}, on.device)
    for rank, of in enumerate(told):
        if "raised" in of:
            raise GroupMismatchError(f"{where}: rank {rank} of {name} raised {of['raised']}")
    for rank, of in enumerate(told):
        for argument, value in of["said"].items():
            expected = told[0]["said"].get(argument)
            if value != expected:
                raise GroupMismatchError(
                    f"{where}: {argument} is {value} on rank {rank} of {name}; expected {expected} as on rank 0"
                )
    return told


def _exchanged(group: Group, said: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    text = json.dumps(said)
    if len(text.encode()) > CHECK_BYTES:
        # A long error: its beginning says what it is about.
        said = {**said, **{name: value[: CHECK_BYTES // 4] for name, value in said.items() if isinstance(value, str)}}
        text = json.dumps(said)
    mine = torch.frombuffer(bytearray(text.encode().ljust(CHECK_BYTES)), dtype=torch.uint8).to(device)
    return [json.loads(bytes(row)) for row in all_gather(group, mine).tolist()]
