"""What torch.compile is told of a function, without importing its compiler.

`torch.compiler`'s decorators of the same meaning import torch._dynamo when they are applied, which takes as long as
PyTorch itself. These wait until something is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch._compile import _disable_dynamo

P = ParamSpec("P")
R = TypeVar("R")


def constant(function: Callable[P, R]) -> Callable[P, R]:
    """Its answer is taken as it is instead of being traced: `torch.compiler.assume_constant_result`."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """It is left out of graphs: `torch.compiler.disable`."""
    return _disable_dynamo(function)
