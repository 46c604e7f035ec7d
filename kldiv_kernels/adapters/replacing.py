"""Puts a function in the place of a framework's own, wherever that framework has imported it by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def replace_everywhere(home: str, name: str, ours: Callable[..., Any]) -> list[str]:
    """The places, such as "package.module.name"; none where the home cannot be imported or has no such name.

    Args:
        home: the module that defines the function. Modules of its package that have the same object under that name
            have it replaced too.
    """
    try:
        original = getattr(import_module(home), name)
    except (ImportError, AttributeError):
        return []
    package = home.split(".")[0] + "."
    places = [
        key for key, module in sys.modules.items() if key.startswith(package) and vars(module).get(name) is original
    ]
    for place in places:
        setattr(sys.modules[place], name, ours)
    return [f"{place}.{name}" for place in sorted(places)]
