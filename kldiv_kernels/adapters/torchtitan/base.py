"""torchtitan's `BaseLoss` where it is installed. Elsewhere what it is to a loss: a configuration builds its owner."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, ClassVar

if find_spec("torchtitan") is None:

    class BaseLoss:
        @dataclass(kw_only=True, slots=True)
        class Config:
            _owner: ClassVar[type[Any]]

            def build(self, **runtime: Any) -> Any:
                """The loss of this configuration; `runtime` are arguments that no configuration can hold."""
                return self._owner(replace(self), **runtime)

        def __init_subclass__(cls, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            if "Config" in cls.__dict__:
                cls.Config._owner = cls

else:
    from torchtitan.components.loss import BaseLoss  # type: ignore[no-redef]

__all__ = ["BaseLoss"]
