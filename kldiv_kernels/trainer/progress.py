"""One rich progress bar a training, and one line a held-out evaluation, in place of a printed dictionary a log step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging


@contextmanager
def shown_for(trainer: Trainer, console: Console) -> Iterator[None]:
    """Progress of `trainer` on `console`, from its main process, for the length of the block."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    # Saving a checkpoint would draw a bar of its own over this one.
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    try:
        with Progress(*columns, console=console, disable=not trainer.is_world_process_zero()) as bar:
            trainer.add_callback(_Bar(bar))
            yield
    finally:
        logging.enable_progress_bar()  # type: ignore[no-untyped-call]


class _Bar(TrainerCallback):
    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.task = bar.add_task("training", total=None, note="")

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.update(self.task, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        logs = logs or {}
        # The loss of a policy gradient says nothing about how well it goes.
        if "reward" in logs:
            self.bar.update(self.task, note=f"reward {logs['reward']:.3f}")
        elif "loss" in logs:
            self.bar.update(self.task, note=f"loss {logs['loss']:.4f}")
        if "eval_loss" in logs and not self.bar.disable:
            kl = f", KL(teacher ∥ student) {logs['eval_kl']:.4f}" if "eval_kl" in logs else ""
            if "eval_topk_kl" in logs:
                kl = f", top-k KL(teacher ∥ student) {logs['eval_topk_kl']:.4f}"
            self.bar.console.print(f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}{kl}")
