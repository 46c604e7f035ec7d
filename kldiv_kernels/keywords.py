"""The keyword arguments that a function takes for another one: which there are, and their place in its signature."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
Parameters = Mapping[str, inspect.Parameter]


def keywords(function: Callable[..., Any], without: Iterable[str] = ()) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters
    return {n: p for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY and n not in without}


def written_out(function: F, more: Parameters) -> F:
    """The function, in whose signature `**options` is written out, for help() and editors at run time."""
    own = inspect.signature(function)
    kept = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    names = {p.name for p in kept}
    function.__signature__ = own.replace(  # type: ignore[attr-defined]
        parameters=[*kept, *(p for name, p in more.items() if name not in names)]
    )
    return function


def nearest(name: str, allowed: Iterable[str]) -> str:
    """What to say of a name that is not allowed: what it may have been, or nothing."""
    near = difflib.get_close_matches(name, allowed, n=1)
    return f"; did you mean {near[0]}?" if near else ""
