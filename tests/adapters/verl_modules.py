"""verl's own functions, for the tests beside them; tests that ask for them are skipped where verl is not installed.

verl imports Ray for the name of one class in annotations. Its losses do not need it, so that a stand-in is there while
verl is imported (Ray would be 70 MB of servers more).
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

import pytest


def verl(name: str) -> Any:
    """The module of that name. The Makefile installs the version that the adapter knows."""
    if find_spec("verl") is None:
        pytest.skip("verl is not installed")
    stands_in = "ray" not in sys.modules and find_spec("ray") is None
    if stands_in:
        ray: ModuleType = module_from_spec(ModuleSpec("ray", None))
        ray.ObjectRef = object  # type: ignore[attr-defined]
        sys.modules["ray"] = ray
    try:
        return import_module(name)
    finally:
        if stands_in:
            del sys.modules["ray"]
