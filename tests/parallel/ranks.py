"""Several processes on one machine, started once, that run cases together and say how each went."""

from __future__ import annotations

import importlib
import os
import queue
import tempfile
import traceback
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed
from torch.multiprocessing import get_context

import kldiv_kernels as kk  # noqa: F401  (its library is loaded before the processes' clocks start)

# Of one exchange: a process that waits longer has been left alone.
_WAIT = timedelta(seconds=60)


def cases_of(*modules: str) -> list[str]:
    """module.case, in their order."""
    return [
        f"{module}.{name}"
        for module in modules
        for name in vars(importlib.import_module(module))
        if name.startswith("case_")
    ]


def run(world: int, *modules: str) -> dict[str, list[str]]:
    """What went wrong in each case, rank by rank; the first failure ends all of them."""
    context = get_context("forkserver")
    said = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = [(rank, world, modules, os.path.join(folder, "meeting"), said) for rank in range(world)]
        processes = [context.Process(target=_run, args=of_rank) for of_rank in arguments]
        for process in processes:
            process.start()
        found: list[list[tuple[str, str]]] = []
        while len(found) < world:
            try:
                found.append(said.get(timeout=1))
            except queue.Empty:
                assert any(process.is_alive() for process in processes), "a process ended without a word"
        for process in processes:
            process.join(timeout=60)
            process.kill()
    names = cases_of(*modules)
    return {name: [text for of_rank in found for of, text in of_rank if of == name] for name in [*names, "start"]}


def _run(rank: int, world: int, modules: tuple[str, ...], meeting: str, said: Any) -> None:
    found: list[tuple[str, str]] = []
    name = "start"
    try:
        torch.set_num_threads(1)
        distributed.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=_WAIT
        )
        for name in cases_of(*modules):
            module, _, case = name.rpartition(".")
            torch.manual_seed(0)
            getattr(importlib.import_module(module), case)(rank, world)
            distributed.barrier()
        distributed.destroy_process_group()
    except BaseException:
        found.append((name, f"rank {rank}: {traceback.format_exc()}"))
    said.put(found)


def same_everywhere(tensor: Tensor) -> None:
    """The same bits on all ranks."""
    every = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(every, tensor.detach().contiguous())
    for other in every:
        assert torch.equal(other.nan_to_num(nan=7.25), tensor.nan_to_num(nan=7.25)), "ranks differ in their bits"


def uneven(vocab: int, world: int, *, empty: bool = False) -> list[int]:
    """Where each rank's columns begin, and where the last end: shards of different widths, the second one empty."""
    borders = [0, *sorted((3 * i + 1) * vocab // (3 * world + 2) for i in range(1, world)), vocab]
    if empty and world > 2:
        borders[2] = borders[1]
    return borders
