"""The files of torchtune and OpenRLHF that have their losses, imported alone.

Their packages ask for torchao, DeepSpeed, Ray and flash-attention when they are imported. The losses need none of them.
"""

from __future__ import annotations

import platform
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def torchtune() -> Any:
    """torchtune's `modules/loss`."""
    return _alone("torchtune", "modules/loss", "kd_losses")


def openrlhf(file: str) -> Any:
    """A file of OpenRLHF's `models`."""
    if find_spec("openrlhf") is None and (sys.version_info >= (3, 13) or platform.machine() != "x86_64"):
        pytest.skip("OpenRLHF has no wheel for this machine")
    stands_in = find_spec("deepspeed") is None
    if stands_in:
        sys.modules["deepspeed"] = module_from_spec(ModuleSpec("deepspeed", None))
    try:
        return _alone("openrlhf", "models", file)
    finally:
        if stands_in:
            del sys.modules["deepspeed"]


def _alone(package: str, folder: str, file: str) -> Any:
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    # A package of the folder's files, without what its __init__ imports.
    name = f"{package}_alone"
    if name not in sys.modules:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(Path(found.submodule_search_locations[0]) / folder)]
    return import_module(f"{name}.{file}")
