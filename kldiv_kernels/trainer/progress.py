"""How far a training is: a bar on a terminal, elsewhere a line about every ten seconds; and each held-out evaluation.

They stand in place of the dictionary that transformers prints each log step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState

_SECONDS = 10.0


def bar(console: Console) -> Progress:
    """A bar with a `note` behind it."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console,
    )  # fmt: skip


class Lines:
    """`step 120/400, loss 5.1234, 3,210 tokens/s, 0:01:20 left` about every ten seconds, for a log file.

    Speed and time left are means since this object was made, when `done` of `total` and `tokens` were.
    """

    def __init__(self, console: Console, unit: str, total: int, done: int, tokens: int) -> None:
        self.console, self.unit, self.total = console, unit, total
        self.first, self.first_tokens = done, tokens
        self.began = self.printed = time.monotonic()

    def show(self, done: int, tokens: int, note: str = "") -> None:
        now = time.monotonic()
        if now - self.printed < _SECONDS or done == self.first:
            return
        self.printed = now
        seconds = now - self.began
        left = timedelta(seconds=round(seconds / (done - self.first) * (self.total - done)))
        speed = f"{(tokens - self.first_tokens) / seconds:,.0f} tokens/s" if tokens > self.first_tokens else ""
        parts = (f"{self.unit} {done:,}/{self.total:,}", note, speed, f"{left} left")
        self.console.print(", ".join(filter(None, parts)), highlight=False, soft_wrap=True)


@contextmanager
def shown_for(trainer: Trainer, console: Console) -> Iterator[None]:
    """Progress of `trainer` on `console`, from its main process, for the length of the block."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if not trainer.is_world_process_zero():
        yield
    elif console.is_terminal:
        with bar(console) as shown:
            trainer.add_callback(_Bar(console, shown))
            yield
    else:
        trainer.add_callback(_Lines(console))
        yield


class _Shown(TrainerCallback):
    def __init__(self, console: Console) -> None:
        self.console, self.note = console, ""

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        logs = logs or {}
        # The loss of a policy gradient says nothing about how well it goes.
        if "reward" in logs:
            self.note = f"reward {logs['reward']:.3f}"
        elif "loss" in logs:
            self.note = f"loss {logs['loss']:.4f}"
        if "eval_accuracy" in logs:
            self.console.print(
                f"step {state.global_step}: {logs['eval_accuracy']:.1%} of the held-out pairs right, reward margin "
                f"{logs['eval_reward_margin']:.4f}, KL(policy ∥ reference) {logs['eval_policy_kl']:.4f}"
            )
        elif "eval_loss" in logs:
            kl = f", KL(teacher ∥ student) {logs['eval_kl']:.4f}" if "eval_kl" in logs else ""
            if "eval_topk_kl" in logs:
                kl = f", top-k KL(teacher ∥ student) {logs['eval_topk_kl']:.4f}"
            self.console.print(f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}{kl}")


class _Bar(_Shown):
    def __init__(self, console: Console, shown: Progress) -> None:
        super().__init__(console)
        self.bar = shown
        self.task = shown.add_task("training", total=None, note="")

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.update(self.task, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.update(self.task, completed=state.global_step, note=self.note)


class _Lines(_Shown):
    lines: Lines

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.lines = Lines(self.console, "step", state.max_steps, state.global_step, int(state.num_input_tokens_seen))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.lines.show(state.global_step, int(state.num_input_tokens_seen), self.note)
