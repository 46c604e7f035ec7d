"""Ctrl-C and SIGTERM in a training: a checkpoint at the end of the step, and the command that continues.

first signal   noted -> end of the step -> checkpoint -> Stopped -> `resumable` prints the command; status 128 + n
second signal  stops at once, as without this file
"""

from __future__ import annotations

import functools
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kldiv_kernels.trainer.ranks import RankLostError

if TYPE_CHECKING:
    from kldiv_kernels.trainer.arguments import DistillationArguments

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOTED = "\nThe run stops after this step, with a checkpoint. A second Ctrl-C stops it at once.\n"


class Stopped(KeyboardInterrupt):
    """A signal ended the run. Its last checkpoint is of the last step."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by signal {number} after step {step}")
        self.number, self.step = number, step


class Request:
    """Whether a signal has asked this run, on any of its ranks, to stop."""

    def __init__(self) -> None:
        self.number = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        # A process that ignores a signal, as a shell's background jobs ignore Ctrl-C, goes on ignoring it.
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def note(number: int, frame: Any) -> None:
            self.number = number
            restore()
            if _is_main_process():
                # A signal may arrive inside a print, which a second print would break.
                os.write(2, _NOTED.encode())

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            restore()

    def received(self, arguments: DistillationArguments) -> bool:
        """All ranks call this together, and all of them get the same answer."""
        if arguments.world_size > 1:
            import torch

            highest = torch.tensor(self.number, device=arguments.device)
            torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
            self.number = int(highest)
        return self.number != 0


def resumable(command: Callable[..., None]) -> Callable[..., None]:
    """The command, which says when it is interrupted, or loses another rank, how its run in `output` goes on."""

    @functools.wraps(command)
    def run(**options: Any) -> None:
        output: Path = options["output"]
        try:
            command(**options)
        except Stopped as stopped:
            _end(stopped.number, f"Stopped after step {stopped.step}, whose checkpoint is written.")
        except RankLostError as lost:
            what = f"{str(lost).rstrip('.')}. What is on disk is kept, and this continues the run:"
            typer.echo(f"{what}\n  {_continuing()}", err=True)
            raise typer.Exit(1) from lost
        except KeyboardInterrupt:
            # Until then nothing was written, and there is nothing to resume.
            if not (output / "options.json").exists():
                raise
            _end(signal.SIGINT, "Stopped at once.")

    return run


def _end(number: int, what: str) -> None:
    if _is_main_process():
        typer.echo(f"{what} This continues the run:\n  {_continuing()}", err=True)
    raise typer.Exit(128 + number)


def _continuing() -> str:
    """This process's command with --resume."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        program = "torchrun … -m kldiv_kernels.cli"
    else:
        program = "kldiv" if Path(sys.argv[0]).stem == "kldiv" else "python -m kldiv_kernels.cli"
    options = sys.argv[1:] if "--resume" in sys.argv else [*sys.argv[1:], "--resume"]
    return f"{program} {shlex.join(options)}"


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
