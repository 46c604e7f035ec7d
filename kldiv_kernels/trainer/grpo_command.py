"""The command `kldiv train grpo`: options checked here, work done in `grpo.py`.

TRL takes seconds to import: it loads inside the function, after the options were checked.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from kldiv_kernels.choices import KLEstimator, LossType
from kldiv_kernels.trainer.options import (
    load_model,
    load_tokenizer,
    require,
    require_backend,
    require_model,
    require_same_tokens,
)
from kldiv_kernels.trainer.recipe_options import parsed_options
from kldiv_kernels.trainer.shared_options import BackendName, EvalEvery, LogEvery, PeakLearningRate
from kldiv_kernels.trainer.threads import one_thread


def grpo(
    output: Annotated[Path, typer.Option(help="Folder of the run; must be new or empty.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Local folder or hub id of a causal language model, used as it is.",
            show_default="a small one, warmed up first",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 800,
    group_size: Annotated[int, typer.Option(min=2, help="Completions a prompt.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts a step.")] = 32,
    updates: Annotated[
        int, typer.Option(min=1, help="Steps on the same completions. Clips have an effect from 2 on.")
    ] = 2,
    lr: PeakLearningRate = 5e-4,
    loss_type: Annotated[str, typer.Option(help=f"{', '.join(get_args(LossType))}.", metavar="NAME")] = "dapo",
    clip_low: Annotated[
        float | None, typer.Option(help="Lower clip of the loss type.", show_default="the loss type's")
    ] = None,
    clip_high: Annotated[
        float | None, typer.Option(help="Upper clip of the loss type.", show_default="the loss type's")
    ] = None,
    kl_coef: Annotated[float, typer.Option(help="Coefficient of the KL to the model at the start.")] = 0.0,
    kl_estimator: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(get_args(KLEstimator))}: sampled, and from forward_kl on exact.", metavar="NAME"
        ),
    ] = "k3",
    entropy_coef: Annotated[float, typer.Option(help="Coefficient of the entropy bonus.")] = 0.0,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A paper's method beside the loss: clip_cov, kl_cov, dgpo (its reference is the model at the start), "
            "kdrl (needs --teacher); kldiv recipes says what each is.",
            metavar="NAME",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="An option of the --recipe: percent=0.02. May be repeated.", metavar="NAME=VALUE"),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Teacher of kdrl: local folder or hub id, of the model's vocabulary.")
    ] = None,
    backend: BackendName = "auto",
    warm_up_accuracy: Annotated[
        float, typer.Option(help="Fraction of sums right at which the small model's warm-up by cross-entropy ends.")
    ] = 0.5,
    warm_up_steps: Annotated[int, typer.Option(min=1, help="Steps after which it ends anyhow.")] = 400,
    seed: Annotated[int, typer.Option(min=0, help="Of the small model's weights, the data order and sampling.")] = 0,
    log_every: LogEvery = 10,
    eval_every: EvalEvery = 100,
) -> None:
    """Train a model by rewards: on sums such as 12+7=, which a program checks.

    TRL's GRPOTrainer with this library's policy_loss. Leaves in --output: the
    model and its tokenizer, metrics.jsonl, summary.json and reward.png, and in
    start/ the small model as it was warmed up. Without --model it runs on one
    thread. Ctrl-C ends it for good: it writes no checkpoints.

    [bold]Examples[/bold]

      $ kldiv train grpo --output runs/grpo

      $ kldiv train grpo --model runs/grpo/start --loss-type gspo
        --kl-coef 0.01 --kl-estimator reverse_kl --output runs/gspo

      $ kldiv train grpo --model runs/grpo/start --recipe kl_cov --set percent=2
        --output runs/kl_cov

      $ kldiv train grpo --model Qwen/Qwen3-0.6B-Base --lr 1e-6 --batch-size 8
        --output runs/qwen
    """
    loss: dict[str, Any] = {"loss_type": loss_type, "clip_low": clip_low, "clip_high": clip_high}
    loss["kl_estimator"] = kl_estimator
    _check_loss({**loss, "kl_coef": kl_coef, "entropy_coef": entropy_coef})
    options = parsed_options(settings, recipe)
    if recipe is not None:
        loss = _with_recipe(recipe, options, loss, kl_coef)
    require((teacher is not None) == (recipe == "kdrl"), "--teacher", "missing; kdrl distils it" if recipe == "kdrl"
            else "only with --recipe kdrl")  # fmt: skip
    require(kl_coef >= 0, "--kl-coef", f"{kl_coef} is below 0")
    require(0 < lr < float("inf"), "--lr", f"{lr} is not above 0 and finite")
    require(0 < warm_up_accuracy <= 1, "--warm-up-accuracy", f"{warm_up_accuracy} is not above 0 and at most 1")
    require_backend(backend)
    require_model(model, "--model")
    require_model(teacher, "--teacher")
    require(not output.exists() or output.is_dir(), "--output", f"{output} is a file")
    require(
        not output.exists() or not any(output.iterdir()), "--output", f"{output} is not empty; choose another folder"
    )

    from rich.console import Console

    with _known_trl():
        from kldiv_kernels.trainer import grpo as runs
    console = Console()
    chosen = runs.Settings(
        loss={**loss, "backend": backend}, recipe=recipe, recipe_options=options, steps=steps, group_size=group_size,
        batch_size=batch_size, updates=updates, learning_rate=lr, kl_coef=kl_coef, entropy_coef=entropy_coef, seed=seed,
        log_every=log_every, eval_every=eval_every,
    )  # fmt: skip
    if model is not None:
        start = model, "--model"
        fresh = load_model(*start), load_tokenizer(*start)
        summary = runs.fit(output, *fresh, chosen, console, recipe_model=_other(recipe, teacher, *start, fresh[1]))
    else:
        folder = output / runs.START
        with one_thread():
            console.rule("1/2 warm-up: cross-entropy")
            runs.warm_up(folder, runs.WarmUp(warm_up_accuracy, warm_up_steps, seed, backend), console)
            console.rule(f"2/2 rewards: {loss_type}")
            start = str(folder), "--output"
            fresh = load_model(*start), load_tokenizer(*start)
            summary = runs.fit(output, *fresh, chosen, console, recipe_model=_other(recipe, teacher, *start, fresh[1]))
    _print_summary(summary, output, console)


def _with_recipe(recipe: str, options: dict[str, Any], loss: dict[str, Any], kl_coef: float) -> dict[str, Any]:
    """The loss's options without those that the recipe sets, which must not be given beside it; all checked."""
    from kldiv_kernels.adapters.trl import recipe_of

    try:
        own = recipe_of(recipe, options).options
    except ValueError as error:
        where, message = "--set", str(error)
        if message.startswith("recipe: "):
            where, message = "--recipe", message.removeprefix("recipe: ")
        raise typer.BadParameter(message, param_hint=where) from None
    for name in own:
        default = "k3" if name == "kl_estimator" else None
        require(
            loss.get(name, default) == default,
            f"--{name.replace('_', '-')}",
            f"not with --recipe {recipe}, which sets it",
        )
    require(kl_coef == 0 or recipe != "kdrl", "--kl-coef", "not with --recipe kdrl, whose KL is to the teacher")
    from kldiv_kernels.policy import resolve

    try:
        resolve("grpo", "trl", {**loss, **own})
    except ValueError as error:
        message = str(error).removeprefix("grpo: ")
        raise typer.BadParameter(
            f"{recipe} with --loss-type {loss['loss_type']}: {message}", param_hint="--recipe"
        ) from None
    return {name: value for name, value in loss.items() if name not in own}


def _other(recipe: str | None, teacher: str | None, start: str, option: str, tokenizer: Any) -> Any:
    """The model that the recipe reads beside the policy, or None."""
    if recipe == "dgpo":
        return load_model(start, option)
    if teacher is None:
        return None
    require_same_tokens(tokenizer, load_tokenizer(teacher, "--teacher"), "--teacher")
    return load_model(teacher, "--teacher")


def _check_loss(options: dict[str, Any]) -> None:
    """The messages of `policy_loss`, "…: clip_low is -1.0; expected …", as errors of the options of these names."""
    from kldiv_kernels.policy import resolve

    try:
        resolve("grpo", "trl", options)
    except ValueError as error:
        name, _, message = str(error).removeprefix("grpo: ").partition(" is ")
        raise typer.BadParameter(message, param_hint=f"--{name.replace('_', '-')}") from None


@contextmanager
def _known_trl() -> Iterator[None]:
    """One line in place of a traceback where TRL is of a version that the adapter does not know."""
    try:
        yield
    except ModuleNotFoundError:
        raise
    except ImportError as error:
        print(f"kldiv: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def _print_summary(summary: dict[str, Any], folder: Path, console: Any) -> None:
    from rich.table import Table

    table = Table(title=str(folder), show_header=False)
    for name in ("parameters", "steps", "completions"):
        table.add_row(name, f"{summary[name]:,}")
    accuracy, reward = summary["held_out_accuracy"], summary["reward"]
    table.add_row("held-out sums right", f"{accuracy['before']:.1%} before, {accuracy['after']:.1%} after")
    if reward is not None:
        table.add_row("reward", f"{reward['first']:.3f} at first, {reward['last']:.3f} at last")
    console.print(table)
    console.print(folder / "reward.png", highlight=False)
