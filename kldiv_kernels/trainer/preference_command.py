"""The command `kldiv train preference`: options checked here, work done in `preference.py` and `run.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kldiv_kernels.trainer.interrupts import resumable
from kldiv_kernels.trainer.options import (
    load_model,
    load_tokenizer,
    option_errors,
    require,
    require_backend,
    require_model,
    require_same_tokens,
    require_source,
)
from kldiv_kernels.trainer.recipe_options import PREFERENCE, preference_options
from kldiv_kernels.trainer.shared_options import (
    Accumulation,
    BackendName,
    DataConfig,
    EvalEvery,
    LogEvery,
    MixedPrecision,
    Output,
    PeakLearningRate,
    Resume,
    SaveEvery,
    VocabSize,
)

_NOT_OF_THE_RUN = ("output", "resume")
_MAX_LENGTH = 512


@resumable
def preference(
    model: Annotated[str, typer.Option(help="Policy: local folder or hub id of a causal language model.")],
    data: Annotated[
        list[str],
        typer.Option(
            help="JSON, CSV or Parquet file, folder of them, or hub data set id, with TRL's columns prompt, chosen and "
            "rejected: texts or conversations. May be repeated."
        ),
    ],
    output: Output,
    recipe: Annotated[
        str,
        typer.Option(
            help=f"The loss: {', '.join(PREFERENCE)}. kldiv recipes says what each is; dpo is f_dpo with reverse_kl.",
            metavar="NAME",
        ),
    ] = "tdpo",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="An option of the recipe, such as beta=0.3. May be repeated.", metavar="NAME=VALUE"),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Reference: local folder or hub id, of the same vocabulary.", show_default="--model before training"
        ),
    ] = None,
    reset_reference: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="The reference becomes the policy after N held-out evaluations without a lower loss.",
            show_default="never",
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens of a prompt with its answer; more are cut at the end.",
            show_default=f"{_MAX_LENGTH}, or what the model takes",
        ),
    ] = None,
    completion_length: Annotated[
        int, typer.Option(min=1, help="Tokens at most of the answers that hypo and xpo have written.")
    ] = 64,
    vocab_size: VocabSize = None,
    backend: BackendName = "auto",
    steps: Annotated[
        int, typer.Option(min=1, help="Optimiser steps. With --resume more than before extend a run.")
    ] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs a device and micro-batch.")] = 8,
    accumulation: Accumulation = 1,
    lr: PeakLearningRate = 1e-6,
    bf16: MixedPrecision = False,
    seed: Annotated[int, typer.Option(min=0, help="Of data order, held-out split and sampling.")] = 0,
    held_out: Annotated[
        float, typer.Option(help="Share of the pairs kept for evaluation, where the data has no validation split.")
    ] = 0.1,
    data_config: DataConfig = None,
    log_every: LogEvery = 10,
    eval_every: EvalEvery = 50,
    save_every: SaveEvery = 50,
    resume: Resume = False,
) -> None:
    """Train a model to prefer the chosen of two answers, by DPO or a relative of it.

    --data has a prompt and two answers a row; kldiv demo writes a toy set.
    Leaves in --output what kldiv train distill leaves; in metrics.jsonl
    accuracy is the share of pairs where the chosen answer has become likelier
    than the other, relative to the reference. Ctrl-C stops it after the step,
    with a checkpoint.

    [bold]Examples[/bold]

      $ kldiv train preference --model runs/demo/student_ce
        --data runs/demo/pairs.jsonl --lr 3e-4 --steps 80 --output runs/tdpo

      $ kldiv train preference --model runs/demo/student_ce
        --data runs/demo/pairs.jsonl --recipe f_dpo --set divergence=js
        --set beta=0.3 --lr 3e-4 --steps 80 --output runs/f_dpo

      $ kldiv train preference --model Qwen/Qwen3-0.6B --data trl-lib/ultrafeedback_binarized
        --recipe hypo --bf16 --accumulation 8 --output runs/hypo
    """
    options = {name: value for name, value in locals().items() if name not in _NOT_OF_THE_RUN}
    set_to = preference_options(recipe, settings)
    require(lr > 0, "--lr", f"{lr} is not above 0")
    require(0 < held_out < 1, "--held-out", f"{held_out} is not between 0 and 1")
    require_backend(backend)
    for option, source in (("--model", model), ("--reference", reference)):
        require_model(source, option)
    for source in data:
        require_source(source, "--data")

    from kldiv_kernels.distillation import shared_vocab_size
    from kldiv_kernels.trainer import run
    from kldiv_kernels.trainer.distillation import max_positions
    from kldiv_kernels.trainer.pairs import load_pairs
    from kldiv_kernels.trainer.plots import plot_preferences
    from kldiv_kernels.trainer.preference import PreferenceArguments, PreferenceTrainer, measured
    from kldiv_kernels.trainer.quiet import quiet
    from kldiv_kernels.trainer.reference_reset import takes_weights

    with option_errors():
        arguments: Any = run.training_arguments(
            output, arguments=PreferenceArguments, steps=steps, batch_size=batch_size, learning_rate=lr, seed=seed,
            log_every=log_every, eval_every=eval_every, save_every=save_every,
            gradient_accumulation_steps=accumulation, bf16=bf16, vocab_size=vocab_size, backend=backend, recipe=recipe,
            recipe_options=set_to, completion_length=completion_length, reset_patience=reset_reference,
            include_num_input_tokens_seen="non_padding",
        )  # fmt: skip
        extended = run.check_run(output, options, resume=resume, extendable="steps")
    if extended or not run.is_finished(output):
        tokenizer = load_tokenizer(model, "--model")
        if reference is not None:
            require_same_tokens(tokenizer, load_tokenizer(reference, "--reference"), "--reference")
        policy, dtype = load_model(model, "--model"), "bfloat16" if bf16 else "float32"
        anchor = load_model(reference or model, "--reference" if reference else "--model", dtype)
        with option_errors("--vocab-size"):
            width = shared_vocab_size(policy, anchor, vocab_size)
        require(len(tokenizer) <= width, "--vocab-size", f"{width} is below the tokenizer's {len(tokenizer)} tokens")
        longest = min((n for n in map(max_positions, (policy, anchor)) if n is not None), default=None)
        require(
            longest is None or max_length is None or max_length <= longest, "--max-length",
            f"{max_length} is above the {longest} tokens that the model takes",
        )  # fmt: skip
        require(
            reset_reference is None or takes_weights(anchor, policy), "--reset-reference",
            "the reference is not of the model's architecture, and cannot take its weights",
        )  # fmt: skip
        with option_errors("--data"), arguments.main_process_first(), quiet():
            pairs = load_pairs(
                data, tokenizer, max_length=max_length or min(_MAX_LENGTH, longest or _MAX_LENGTH),
                phrases=arguments.pair_loss().has_phrases, held_out=held_out, seed=seed, config=data_config,
            )  # fmt: skip
        if arguments.pair_loss().writer is not None and longest is not None:
            prompt = max(map(len, pairs.train["prompt_ids"]))
            require(
                prompt + completion_length <= longest, "--completion-length",
                f"{completion_length} behind a prompt of {prompt} tokens is above the {longest} that the model takes",
            )  # fmt: skip
        if arguments.process_index == 0:
            run.begin_run(output, options)
        run.fit(
            policy, anchor, pairs, arguments, tokenizer=tokenizer, trainer=PreferenceTrainer, measured=measured,
            plot=plot_preferences,
        )  # fmt: skip
    if arguments.process_index == 0:
        _print_summary(run.read_json(output / run.SUMMARY), output)


def _print_summary(summary: dict[str, Any], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(folder), show_header=False)
    for name in ("parameters", "steps", "tokens"):
        table.add_row(name, f"{summary[name]:,}")
    accuracy = summary["held_out_accuracy"]
    table.add_row("held-out pairs right", f"{accuracy['before']:.1%} before, {accuracy['after']:.1%} after")
    table.add_row("held-out reward margin", f"{summary['held_out_reward_margin']:.4f} nats")
    table.add_row("KL(policy ∥ reference)", f"{summary['policy_reference_kl']:.4f} nats per token")
    Console().print(table)
