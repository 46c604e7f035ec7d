"""A GRPO run on sums: a small model, warmed up by cross-entropy, whose answers a program rewards.

TRL generates, scores and steps; the loss is `policy_loss`, through `adapters.trl.GRPOTrainer`. `summary.json` comes
last: a folder that has one is finished.
"""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from trl.trainer.grpo_config import GRPOConfig

from kldiv_kernels.adapters.trl import GRPOTrainer, recipe_of
from kldiv_kernels.trainer import arithmetic, run
from kldiv_kernels.trainer.arithmetic import Problem, Problems
from kldiv_kernels.trainer.data import Blocks
from kldiv_kernels.trainer.demo import Size
from kldiv_kernels.trainer.plots import plot_reward
from kldiv_kernels.trainer.progress import shown_for
from kldiv_kernels.trainer.quiet import quiet
from kldiv_kernels.version import __version__

START, PLOT = "start", "reward.png"
# Sums by which the warm-up tells its accuracy, to 3 points.
_SAMPLE = 256


@dataclass(frozen=True)
class Settings:
    """Options of a run; `loss` are those of `policy_loss` by its names, None for the default of `preset="trl"`.

    recipe, recipe_options: of `adapters.trl.recipe_of`.
    """

    loss: dict[str, Any]
    steps: int
    group_size: int
    batch_size: int
    updates: int
    learning_rate: float
    kl_coef: float
    entropy_coef: float
    seed: int
    log_every: int
    eval_every: int
    recipe: str | None = None
    recipe_options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WarmUp:
    """The model that a run without one begins with, and its training by cross-entropy.

    How far it comes in a number of steps differs from seed to seed, from a twentieth of the sums right to half of them
    after 80: so it ends at an accuracy, of greedy answers to sums that it trains on, or after `steps`.
    """

    accuracy: float
    steps: int
    seed: int
    backend: str
    size: Size = field(default_factory=lambda: Size(96, 2, 4))
    batch_size: int = 256
    learning_rate: float = 3e-3


def warm_up(folder: Path, settings: WarmUp, console: Console) -> None:
    """Train a new model on sums into `folder`, a finished run as `kldiv train distill` leaves it."""
    tokenizer, sums = arithmetic.character_tokenizer(), arithmetic.problems()
    model = settings.size.build(tokenizer, arithmetic.LONGEST, settings.seed)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    run.fit(
        model,
        None,
        Blocks(arithmetic.supervised(sums.train, tokenizer), arithmetic.supervised(sums.held_out, tokenizer)),
        run.training_arguments(
            folder,
            steps=settings.steps,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            seed=settings.seed,
            log_every=max(1, settings.steps // 20),
            eval_every=settings.steps,
            save_every=settings.steps,
            save_strategy="no",
            ce_weight=1.0,
            backend=settings.backend,
        ),
        tokenizer=tokenizer,
        callbacks=[_UntilAccurate(settings.accuracy, sums.train[:_SAMPLE])],
        console=console,
    )


def fit(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, console: Console,
    *, recipe_model: PreTrainedModel | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train to `settings.steps`; return the summary. `recipe_model`: see `adapters.trl.GRPOTrainer`.

    Leaves in `folder`: the model and tokenizer (`from_pretrained` reads them), metrics.jsonl, reward.png and
    summary.json. A KL penalty has TRL load the reference from where `model` was loaded from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sums = arithmetic.problems()
    record = _Record(folder / run.METRICS, sums.held_out, settings.eval_every, console)
    began = time.monotonic()
    with warnings.catch_warnings(), quiet():
        # TRL 1.16 knows this option by the name that transformers 5.23 gave it before.
        warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=arithmetic.exact_match,
            args=_arguments(folder, sums, tokenizer, settings),
            train_dataset=Dataset.from_list([problem._asdict() for problem in sums.train]),
            processing_class=tokenizer,
            callbacks=[record],
            policy_loss_options={name: value for name, value in settings.loss.items() if value is not None},
            recipe=None if settings.recipe is None else recipe_of(settings.recipe, settings.recipe_options),
            recipe_model=recipe_model,
        )
        with shown_for(trainer, console):
            trainer.train()
            trainer.save_model()
    summary = _summary(trainer, record, settings, time.monotonic() - began)
    plot_reward(folder / PLOT, record.history, title=folder.name)
    run.write_json(folder / run.SUMMARY, summary)
    return summary


def _arguments(folder: Path, sums: Problems, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size * settings.group_size,
        num_generations=settings.group_size,
        num_iterations=settings.updates,
        max_completion_length=arithmetic.answer_length([*sums.train, *sums.held_out], tokenizer),
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, settings.steps // 20),
        beta=settings.kl_coef,
        entropy_coef=settings.entropy_coef,
        # luspo is defined on the ratio of the sequence; TRL leaves that to its user.
        importance_sampling_level="sequence" if settings.loss["loss_type"] == "luspo" else "token",
        seed=settings.seed,
        logging_steps=settings.log_every,
        save_strategy="no",
        report_to="none",
        # TRL would train in bfloat16, and save memory that a small model does not need.
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.accelerator.is_available(),
    )


class _UntilAccurate(TrainerCallback):
    def __init__(self, accuracy: float, sums: list[Problem]) -> None:
        self.accuracy, self.sums = accuracy, sums

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        if state.global_step % 10 == 0:
            reached = arithmetic.accuracy(given["model"], given["processing_class"], self.sums)
            control.should_training_stop = control.should_training_stop or reached >= self.accuracy


class _Record(TrainerCallback):
    """One JSON object a log step, and one a held-out evaluation: at the start, every `every` steps and at the end."""

    def __init__(self, path: Path, held_out: list[Problem], every: int, console: Console) -> None:
        self.path, self.held_out, self.every, self.console = path, held_out, every, console
        self.history: list[dict[str, Any]] = []

    @property
    def accuracies(self) -> list[float]:
        return [entry["held_out_accuracy"] for entry in self.history if "held_out_accuracy" in entry]

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self._evaluate(state, given)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._evaluate(state, given)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._write(state.log_history[-1])

    def _evaluate(self, state: TrainerState, given: dict[str, Any]) -> None:
        value = arithmetic.accuracy(given["model"], given["processing_class"], self.held_out)
        self._write({"step": state.global_step, "held_out_accuracy": value})
        self.console.print(f"step {state.global_step}: {value:.1%} of the held-out sums right")

    def _write(self, entry: dict[str, Any]) -> None:
        self.history.append(entry)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def _summary(trainer: Any, record: _Record, settings: Settings, seconds: float) -> dict[str, Any]:
    rewards = [entry["reward"] for entry in record.history if "reward" in entry]
    generations = -(-settings.steps // settings.updates)
    return {
        "parameters": trainer.model.num_parameters(),
        "steps": trainer.state.global_step,
        "completions": generations * settings.batch_size * settings.group_size,
        "held_out_accuracy": {"before": record.accuracies[0], "after": record.accuracies[-1]},
        # Of the first and the last line of metrics.jsonl that has one.
        "reward": {"first": rewards[0], "last": rewards[-1]} if rewards else None,
        "loss": {**settings.loss, "kl_coef": settings.kl_coef, "entropy_coef": settings.entropy_coef},
        "recipe": None if settings.recipe is None else {"name": settings.recipe, **settings.recipe_options},
        "seconds": round(seconds, 1),
        "seed": settings.seed,
        "versions": {
            "kldiv_kernels": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "trl": metadata.version("trl"),
        },
    }
