"""Losses of logits whose columns are spread over processes: ours, and that of whole rows, gathered in each process.

The processes share this machine's threads. A time is that of the slower one. In a turn they begin together; of the two
calls in it the second counts, as in measure.py.
"""

from __future__ import annotations

import os
import queue
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, distributed
from torch.multiprocessing import get_context

from kldiv_kernels.benchmarking import peers
from kldiv_kernels.benchmarking.cases import Case, Inputs
from kldiv_kernels.benchmarking.measure import CaseResult, Copy, Result, describe_error, once
from kldiv_kernels.parallel import CHECK_BYTES, all_gather

_EXCHANGES = ("all_gather_into_tensor", "all_gather_single", "all_reduce")


def measure(case: Case, names: list[str], repeats: int, step: Callable[[str], None]) -> CaseResult:
    """`measure.measure` in processes of their own."""
    context = get_context("spawn")
    said = context.Queue()
    copy = Copy()
    copy.seconds()
    copies = [copy.seconds() for _ in range(repeats)]
    threads = max(1, torch.get_num_threads() // case.ranks)
    with tempfile.TemporaryDirectory() as folder:
        meeting = os.path.join(folder, "meeting")
        processes = [
            context.Process(target=_run, args=(rank, case, names, repeats, threads, meeting, said), daemon=True)
            for rank in range(case.ranks)
        ]
        for process in processes:
            process.start()
        found: list[list[Result]] = []
        while len(found) < case.ranks:
            try:
                what = said.get(timeout=1)
            except queue.Empty:
                if not any(process.is_alive() for process in processes):
                    raise RuntimeError(f"{case.name}: a process ended without a word") from None
                continue
            if isinstance(what, str):
                step(what)
            else:
                found.append(what)
        for process in processes:
            process.join()
    return CaseResult(case, _slowest(found), copy.bytes / statistics.median(copies))


def _slowest(found: list[list[Result]]) -> list[Result]:
    """Of what each process measured the longer time, turn by turn; an error is one of all."""
    together = []
    for of_ranks in zip(*found, strict=True):
        failed = next((one for one in of_ranks if one.error is not None), None)
        first = [one.first_call_seconds or 0.0 for one in of_ranks]
        seconds = [max(turn) for turn in zip(*(one.seconds for one in of_ranks), strict=True)]
        together.append(failed or replace(of_ranks[0], seconds=seconds, first_call_seconds=max(first)))
    return together


def _run(rank: int, case: Case, names: list[str], repeats: int, threads: int, meeting: str, said: Any) -> None:
    torch.set_num_threads(threads)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=case.ranks)
    results, inputs = [Result(name) for name in names], columns(case, rank)

    def step(what: str) -> None:
        distributed.barrier()
        if rank == 0:
            said.put(f"{case.name}: {what}")

    try:
        losses: dict[str, peers.Loss] = {}
        for result in results:
            step(f"{result.name}, first call")
            losses[result.name] = build(result.name, case, rank)
            with _counted() as sent:
                result.first_call_seconds, result.loss = once(losses[result.name], inputs)
            # What the check of the arguments takes does not grow with the rows.
            result.sent_bytes_per_row = (sum(sent) - CHECK_BYTES * (result.name == peers.OURS)) / case.rows
        for turn in range(repeats):
            step(f"turn {turn + 1} of {repeats}")
            for result in results:
                once(losses[result.name], inputs)
                distributed.barrier()
                seconds, _ = once(losses[result.name], inputs)
                result.seconds.append(seconds)
    except Exception as error:
        for result in results:
            result.error = describe_error(error)
    said.put(results)
    distributed.destroy_process_group()


@contextmanager
def _counted() -> Iterator[list[int]]:
    """The bytes of each exchange."""
    sent: list[int] = []
    before = {name: getattr(distributed, name) for name in _EXCHANGES if hasattr(distributed, name)}

    def counted(exchange: Callable[..., Any], at: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            sent.append(args[at].numel() * args[at].element_size())
            return exchange(*args, **kwargs)

        return call

    try:
        for name, exchange in before.items():
            setattr(distributed, name, counted(exchange, 0 if name == "all_reduce" else 1))
        yield sent
    finally:
        for name, exchange in before.items():
            setattr(distributed, name, exchange)


def columns(case: Case, rank: int) -> Inputs:
    """Of the case's inputs what this process has."""
    whole, width = case.inputs(), case.vocab // case.ranks
    here = slice(rank * width, (rank + 1) * width)
    student = whole.student.detach()[:, here].clone().requires_grad_()
    reference = None if whole.reference is None else whole.reference[:, here].clone()
    return replace(whole, student=student, reference=reference)


def build(name: str, case: Case, rank: int) -> peers.Loss:
    """The implementation of that name, of what this process has of the inputs."""
    return peers.ours(case, distributed.group.WORLD) if name == peers.OURS else _gathered(case, rank)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, here: Tensor, rank: int) -> Tensor:
        group = distributed.group.WORLD
        assert group is not None
        every = all_gather(group, here)
        ctx.here = slice(rank * here.shape[1], (rank + 1) * here.shape[1])
        return every.transpose(0, 1).flatten(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[:, ctx.here].contiguous(), None


def _gathered(case: Case, rank: int) -> peers.Loss:
    of_whole = peers.build(peers.OURS, Case(case.loss, case.dtype, case.rows, case.vocab))

    def loss(inputs: Inputs) -> Tensor:
        both = (inputs.student, inputs.reference)
        student, reference = (None if x is None else _Gather.apply(x, rank) for x in both)  # type: ignore[no-untyped-call]
        assert student is not None
        return of_whole(replace(inputs, student=student, reference=reference))

    return loss
