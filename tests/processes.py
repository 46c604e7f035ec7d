"""Starts the ranks of a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def start_ranks(of_rank: Callable[..., None], args: tuple[Any, ...], ranks: int = 2, *, join: bool = True) -> Any:
    """`of_rank(rank, *args)` in each of the ranks, in processes that end without finalizing the interpreter.

    A process that spawn starts does, and then a thread of gloo or of autograd that lets go of a tensor a moment late
    aborts it (pytorch/pytorch#190489): seen where the machine had other work.
    """
    return torch.multiprocessing.start_processes(  # type: ignore[no-untyped-call]
        of_rank, args=args, nprocs=ranks, join=join, start_method="forkserver"
    )
