"""The command line `kldiv`: doctor, plan, bench, recipes, train, demo, cache-teacher.

`commands.py` has them. What a command needs beyond its options, PyTorch included, is imported when it runs.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from kldiv_kernels.extras import missing

if TYPE_CHECKING:
    from kldiv_kernels.cli.commands import app

__all__ = ["app", "main"]


def main() -> None:
    try:
        from kldiv_kernels.cli.commands import app
    except ModuleNotFoundError as error:
        # The core installs without the command line's packages, and pip installs the `kldiv` script all the same.
        said = missing("kldiv", error)
        if said is None:
            raise
        if sys.argv[1:] == ["doctor"]:
            from kldiv_kernels.cli import doctor

            print(doctor.as_text(doctor.checks()))
            return
        print(said, file=sys.stderr)
        raise SystemExit(2) from None
    app(prog_name="kldiv")


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kldiv_kernels.cli import commands

    return commands.app
