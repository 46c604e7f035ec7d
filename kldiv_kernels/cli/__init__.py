"""The command line `kldiv`: doctor, plan, bench, train, demo, cache-teacher."""

from __future__ import annotations

from kldiv_kernels.cli.commands import app, main

__all__ = ["app", "main"]
