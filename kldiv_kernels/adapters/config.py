"""Reads the configurations of frameworks: dataclasses, pydantic's and omegaconf's, dictionaries."""

from __future__ import annotations

from typing import Any


def read(config: Any, name: str, default: Any = None) -> Any:
    """The entry of that name; `default` where it is None or missing, as a group of entries is when config is None."""
    value = config.get(name) if hasattr(config, "get") else getattr(config, name, None)
    return default if value is None else value
