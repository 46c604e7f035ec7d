"""A run in a folder: options, checkpoints, metrics, summary, plot; and its continuation after a kill.

Files that a reader or a resumed run relies on appear whole or not at all. `summary.json` comes last: a folder that
has one is finished.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    default_data_collator,
)
from transformers.trainer_utils import SaveStrategy

from kldiv_kernels.trainer.arguments import DistillationArguments
from kldiv_kernels.trainer.cached import CachedSequences, CachedSplit
from kldiv_kernels.trainer.data import Blocks
from kldiv_kernels.trainer.distillation import DistillationTrainer
from kldiv_kernels.trainer.interrupts import Request, Stopped
from kldiv_kernels.trainer.pairs import Pairs
from kldiv_kernels.trainer.plots import History, plot_run
from kldiv_kernels.trainer.progress import shown_for
from kldiv_kernels.trainer.quiet import quiet
from kldiv_kernels.version import __version__

METRICS, OPTIONS, SUMMARY, PLOT = "metrics.jsonl", "options.json", "summary.json", "loss.png"
_STATE = "trainer_state.json"  # the last file that the Trainer writes into a checkpoint


def write_whole(path: Path, content: str) -> None:
    """Write to a file beside `path` and rename it: a kill leaves the old content or the new."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(content, encoding="utf-8")
    os.replace(beside, path)


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def check_run(folder: Path, options: dict[str, Any], *, resume: bool, extendable: str | None = None) -> bool:
    """Whether a run that is to resume gets longer: it may have more of the option `extendable` than it began with.

    Raises ValueError, naming the command line's option, unless a run with these options can start, or resume, here.
    Writes nothing: a run whose models or data then fail to load leaves no trace.
    """
    stored = folder / OPTIONS
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output: {folder} is a file")
    if not resume:
        if folder.exists() and any(folder.iterdir()):
            what = "holds a run; pass --resume to continue it" if stored.exists() else "is not empty"
            raise ValueError(f"--output: {folder} {what}, or choose another folder")
        return False
    if not stored.exists():
        raise ValueError(f"--resume: {folder} holds no run (no {OPTIONS}); leave --resume out to start one")
    before = read_json(stored)
    extended = False
    for name in sorted(before.keys() | options.keys()):
        if before.get(name) == options.get(name):
            continue
        if name == extendable and options[name] > before[name]:
            extended = True
            continue
        keeps = "may have more of them, not fewer" if name == extendable else "keeps its options"
        raise ValueError(
            f"--resume: --{name.replace('_', '-')} is {options.get(name)!r}, but the run in {folder} began with "
            f"{before.get(name)!r}; a continued run {keeps}"
        )
    if extended and is_finished(folder) and last_checkpoint(folder) is None:
        raise ValueError(f"--resume: {folder} has no checkpoint from which its finished run could go on")
    return extended


def begin_run(folder: Path, options: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # A run that gets longer is no longer finished.
    (folder / SUMMARY).unlink(missing_ok=True)
    write_json(folder / OPTIONS, options)


def is_finished(folder: Path) -> bool:
    return (folder / SUMMARY).exists()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    numbered = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in numbered:
        try:
            read_json(path / _STATE)
        except (OSError, ValueError):
            continue
        return path
    return None


def training_arguments(
    folder: Path, *, steps: int, batch_size: int, learning_rate: float, seed: int,
    log_every: int, eval_every: int, save_every: int, arguments: Any = DistillationArguments, **options: Any,
) -> DistillationArguments:  # fmt: skip
    """Those of a run in `folder`; `options` are more fields of `arguments`, DistillationArguments or an heir."""
    made: DistillationArguments = arguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        seed=seed,
        logging_steps=log_every,
        eval_strategy="steps",
        eval_steps=eval_every,
        # A resumed run has the evaluations of its first part.
        eval_on_start=last_checkpoint(folder) is None,
        save_steps=save_every,
        # The last one and, should the machine stop while that is being written, the one before.
        save_total_limit=2,
        report_to="none",
        use_cpu=not torch.accelerator.is_available(),
        **{"include_num_input_tokens_seen": "all", **options},
    )
    return made


class _MetricsFile(TrainerCallback):
    """One JSON object a log step. A resumed run first drops the lines that came after its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def restart(self, state: TrainerState) -> None:
        if state.is_world_process_zero:
            write_whole(self.path, "".join(json.dumps(entry) + "\n" for entry in state.log_history))

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.restart(state)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


class _Schedule(TrainerCallback):
    """The learning rate of a resumed run's first step. The checkpoint has that of the old schedule, which ends at 0 if
    the run has more steps now; the later steps' come from the new one."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        schedule = given["lr_scheduler"]
        rates = [
            base * factor(schedule.last_epoch)
            for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(given["optimizer"].param_groups, rates, strict=True):
            group["lr"] = rate
        # What the Trainer logs of that step.
        schedule._last_lr = rates


class _StopAtStep(TrainerCallback):
    """Where a signal asked for it, ends the training after a step, with its line of metrics and its checkpoint."""

    def __init__(self, request: Request) -> None:
        self.request = request

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.request.received(args):
            control.should_log = control.should_save = control.should_training_stop = True


def distilled(history: History) -> dict[str, Any]:
    """What a summary has of the last held-out evaluation."""
    final = next(entry for entry in reversed(history) if "eval_loss" in entry)
    return {
        "held_out_loss": final["eval_loss"],
        "held_out_perplexity": math.exp(min(final["eval_loss"], 700.0)),
        "teacher_student_kl": final.get("eval_kl"),
        "teacher_student_topk_kl": final.get("eval_topk_kl"),
    }


def fit(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    blocks: Blocks | CachedSplit | Pairs,
    arguments: DistillationArguments,
    *,
    tokenizer: PreTrainedTokenizerBase,
    callbacks: Sequence[TrainerCallback] = (),
    console: Console | None = None,
    trainer: Callable[..., DistillationTrainer] = DistillationTrainer,
    measured: Callable[[History], dict[str, Any]] = distilled,
    plot: Callable[..., None] = plot_run,
) -> dict[str, Any]:
    """Train to `max_steps`, from the last checkpoint in `output_dir` if it has one; return the summary.

    `trainer` makes the DistillationTrainer, `measured` what the summary has of the log, `plot` the plot of it. Without
    a teacher the blocks have it, unless the loss is cross-entropy alone.

    Leaves in `output_dir`: the model and tokenizer (`from_pretrained` reads them), metrics.jsonl, loss.png and
    summary.json. Raises Stopped after a Ctrl-C or SIGTERM, with a checkpoint, unless the run saves none.
    """
    folder = Path(str(arguments.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    metrics, request = _MetricsFile(folder / METRICS), Request()
    saves = arguments.save_strategy != SaveStrategy.NO
    with quiet():
        made = trainer(
            model, teacher, arguments, train_dataset=blocks.train, eval_dataset=blocks.held_out,
            # Blocks are of one length; for the others the trainer knows how to pad.
            data_collator=default_data_collator if isinstance(blocks, Blocks) else None,
            processing_class=tokenizer,
            callbacks=[metrics, _Schedule(), *([_StopAtStep(request)] if saves else []), *callbacks],
        )  # fmt: skip
        with shown_for(made, console or Console()):
            with request.listening() if saves else nullcontext():
                _train(made, metrics, last_checkpoint(folder))
            if request.received(arguments):
                raise Stopped(request.number, made.state.global_step)
            history = made.state.log_history
            if not any("eval_loss" in entry and entry["step"] == made.state.global_step for entry in history):
                made.evaluate()
            made.save_model()
    summary = _summary(made, model, arguments, measured(made.state.log_history))
    if made.is_world_process_zero():
        plot(folder / PLOT, history, title=folder.name)
        write_json(folder / SUMMARY, summary)
    return summary


def _train(trainer: DistillationTrainer, metrics: _MetricsFile, checkpoint: Path | None) -> None:
    state = None if checkpoint is None else TrainerState.load_from_json(str(checkpoint / _STATE))
    if state is not None and state.global_step >= trainer.args.max_steps:
        # Trainer.train would take one step more from a checkpoint that has none left.
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = state
        metrics.restart(state)
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def _summary(
    trainer: DistillationTrainer, model: PreTrainedModel, arguments: DistillationArguments, held_out: dict[str, Any]
) -> dict[str, Any]:
    data = trainer.train_dataset
    from_cache = {"tail": arguments.tail, "k": data.cache.info.k} if isinstance(data, CachedSequences) else {}
    return {
        "parameters": model.num_parameters(),
        "steps": trainer.state.global_step,
        "tokens": trainer.state.num_input_tokens_seen,
        **held_out,
        "loss": {"recipe": arguments.recipe, **arguments.recipe_options}
        if arguments.recipe is not None
        else {
            "kind": arguments.kind,
            "ce_weight": arguments.ce_weight,
            **arguments.loss_options().divergence_options(),
            **from_cache,
        },
        "fused_linear": trainer.fused_linear,
        "seed": arguments.seed,
        "versions": {
            "kldiv_kernels": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
    }
