"""`python -m kldiv_kernels.cli`, for launchers such as torchrun."""

from __future__ import annotations

from kldiv_kernels.cli import main

main()
