"""The command `kldiv demo`: options checked here, work done in `demo.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kldiv_kernels.trainer.interrupts import resumable
from kldiv_kernels.trainer.options import option_errors


@resumable
def demo(
    output: Annotated[Path, typer.Option(help="Folder for models, metrics, summary and plots.")] = Path("runs/demo"),
    steps: Annotated[
        int, typer.Option(min=1, help="Optimiser steps of each student; the teacher takes 5/2 as many.")
    ] = 400,
    seed: Annotated[int, typer.Option(min=0, help="Of the models' weights and the data order.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue: finished stages are skipped.")] = False,
) -> None:
    """Train a small teacher on the standard library's text, distil a student,
    and compare it with the same student trained by cross-entropy alone.

    Without --resume an earlier demo in --output is replaced; a folder that
    holds anything else is left alone. Ctrl-C stops it after the step, with a
    checkpoint. It runs on one thread.

    [bold]Examples[/bold]

      $ kldiv demo

      $ kldiv demo --output runs/short --steps 100

      $ kldiv demo --resume
    """
    from kldiv_kernels.trainer.demo import Settings, open_demo, run_demo
    from kldiv_kernels.trainer.threads import one_thread

    settings = Settings(steps=steps, seed=seed)
    with option_errors():
        open_demo(output, settings, resume=resume)
    with one_thread():
        run_demo(output, settings)
