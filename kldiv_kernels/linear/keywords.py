"""The keyword arguments that a function shares with that of logits: names, defaults, and their place in a signature."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class Keywords:
    """Those of `function`, without some."""

    def __init__(self, function: Callable[..., Any], *without: str) -> None:
        found = inspect.signature(function).parameters
        self.name = function.__name__
        self.parameters = {n: p for n, p in found.items() if p.kind is p.KEYWORD_ONLY and n not in without}

    def complete(self, where: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """With defaults for those that are not given; TypeError for what is none."""
        for name in given:
            if name not in self.parameters:
                near = difflib.get_close_matches(name, self.parameters, n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; see {self.name}"
                raise TypeError(f"{where}: {name} is no argument of it{hint}")
        return {name: given.get(name, parameter.default) for name, parameter in self.parameters.items()}

    def explicit(self, function: F) -> F:
        """For help() and editors at run time: `**options` is written out."""
        own = inspect.signature(function)
        kept = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        function.__signature__ = own.replace(  # type: ignore[attr-defined]
            parameters=[*kept, *self.parameters.values()]
        )
        return function
