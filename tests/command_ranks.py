"""Runs a command of the command line in several ranks, without a launcher that would end the others of a lost one."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import commands
import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

Command = Callable[..., None]

SECONDS = 90


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for taken in sockets:
        taken.bind(("127.0.0.1", 0))
    ports: list[int] = [taken.getsockname()[1] for taken in sockets]
    for taken in sockets:
        taken.close()
    return ports


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip


def _killed(*shard: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _full_disk(*shard: Any) -> None:
    raise OSError(28, "No space left on device")


def _broken(*arguments: Any, **options: Any) -> None:
    raise RuntimeError("broken text")


# What happens to one rank, and in whose place.
FAULTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "killed": ("kldiv_kernels.teacher_cache.parallel.write_shard", _killed),
    "full disk": ("kldiv_kernels.teacher_cache.parallel.write_shard", _full_disk),
    "broken text": ("kldiv_kernels.trainer.data.pack", _broken),
}


@dataclass(frozen=True)
class Case:
    """Options and flags of a command. The rank `of` has its fault, and `theirs` and `more` beside them."""

    given: dict[str, str]
    flags: tuple[str, ...] = ()
    fault: str = ""
    of: int = -1
    theirs: dict[str, str] = field(default_factory=dict)
    more: tuple[str, ...] = ()


def _break(case: Case, rank: int, mark: Path) -> None:
    """The rank of the fault gets it; the others do not write before it has a shard."""
    place, fault = FAULTS[case.fault]
    module, _, name = place.rpartition(".")
    in_time = getattr(importlib.import_module(module), name)

    def late(*arguments: Any) -> Any:
        until = time.monotonic() + SECONDS
        while not mark.exists() and time.monotonic() < until:
            time.sleep(0.01)
        return in_time(*arguments)

    def broken(*arguments: Any, **options: Any) -> None:
        mark.touch()
        fault(*arguments, **options)

    if rank == case.of:
        pytest.MonkeyPatch().setattr(place, broken)
    elif name == "write_shard":
        pytest.MonkeyPatch().setattr(place, late)


def _rank(command: Command, rank: int, ranks: int, cases: list[tuple[int, Case]], results: Path) -> None:
    """Runs the command once a case, each on its own port, in a folder of the rank's own."""
    torch.set_num_threads(1)
    commands.stay_offline(pytest.MonkeyPatch())
    for port, case in cases:
        os.environ |= environment(rank, ranks, port)
        (results / f"of rank {rank}").mkdir(exist_ok=True)
        os.chdir(results / f"of rank {rank}")
        if case.fault:
            _break(case, rank, results / f"mark {port}")
        other = rank == case.of
        try:
            found = commands.run(
                command, case.given | (case.theirs if other else {}), *case.flags, *(case.more if other else ())
            )
        except RuntimeError as error:
            found = (1, repr(error))
        (results / f"{port} {rank}.json").write_text(json.dumps(found))


def _forkserver() -> Any:
    """Imports once, for all ranks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["kldiv_kernels.trainer.run", "kldiv_kernels.trainer.caching", "kldiv_kernels.trainer.data",
         "transformers.models.llama.modeling_llama", "pytest", "typer.testing"]
    )  # fmt: skip
    return context


def _launched(command: Command, given: dict[str, str]) -> tuple[int, str]:
    torch.set_num_threads(1)
    commands.stay_offline(pytest.MonkeyPatch())
    return commands.run(command, given)


def under_torchrun(command: Command, ranks: int, given: dict[str, str]) -> list[tuple[int, str]]:
    """What each rank gave and printed, started by torchrun's agent, which has their store."""
    _forkserver()
    launch = elastic_launch(
        LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=ranks, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
            run_id=str(ranks), max_restarts=0, monitor_interval=0.1, start_method="forkserver",
        ),
        _launched,
    )  # fmt: skip
    # In the main thread it would take the signals of the tests.
    agent = ThreadPoolExecutor(1)
    try:
        found = agent.submit(launch, command, given).result(timeout=SECONDS)
    except TimeoutError:
        # The agent then ends by itself.
        for rank in multiprocessing.active_children():
            rank.kill()
        raise
    finally:
        agent.shutdown(wait=False)
    return [found[number] for number in range(ranks)]


def in_ranks(command: Command, ranks: int, cases: dict[str, Case], results: Path) -> dict[str, list[tuple[int, str]]]:
    """Of each case what each rank gave and printed: after a fault by ranks that run nothing else, and end then."""
    context = _forkserver()
    ports = dict(zip(cases, free_ports(len(cases)), strict=True))
    together = [(ports[name], case) for name, case in cases.items() if not case.fault]
    alone = [[(ports[name], case)] for name, case in cases.items() if case.fault]
    started: dict[tuple[int, int], Any] = {}
    until = time.monotonic() + SECONDS
    try:
        for some in filter(None, [*alone, together]):
            processes = [
                context.Process(target=_rank, args=(command, rank, ranks, some, results), daemon=True)
                for rank in range(ranks)
            ]
            for rank, process in enumerate(processes):
                process.start()
                started |= {(port, rank): process for port, _ in some}
            for process in processes:
                process.join(until - time.monotonic())
                assert process.exitcode is not None, f"the ranks wait for each other in one of {some}"
    finally:
        for process in started.values():
            process.kill()

    def result(port: int, rank: int) -> tuple[int, str]:
        path = results / f"{port} {rank}.json"
        return tuple(json.loads(path.read_text())) if path.exists() else (started[port, rank].exitcode, "")

    return {name: [result(port, rank) for rank in range(ranks)] for name, port in ports.items()}
