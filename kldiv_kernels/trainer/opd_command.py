"""The command `kldiv train opd`: options checked here, work done in `opd.py` and `run.py`."""

from __future__ import annotations

import functools
from typing import Annotated

import typer

from kldiv_kernels.trainer.interrupts import resumable
from kldiv_kernels.trainer.options import (
    load_model,
    load_tokenizer,
    option_errors,
    print_summary,
    require,
    require_backend,
    require_model,
    require_same_tokens,
    require_source,
)
from kldiv_kernels.trainer.recipe_options import ON_POLICY, on_policy_options
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
    TextColumn,
    VocabSize,
)

_NOT_OF_THE_RUN = ("output", "resume")


@resumable
def opd(
    student: Annotated[str, typer.Option(help="Student: local folder or hub id of a causal language model.")],
    teacher: Annotated[str, typer.Option(help="Teacher: local folder or hub id, of the same vocabulary.")],
    data: Annotated[
        list[str],
        typer.Option(
            help="Text, JSON, CSV or Parquet file, folder of them, or hub data set id: where prompts come from. May be "
            "repeated."
        ),
    ],
    output: Output,
    recipe: Annotated[
        str,
        typer.Option(
            help=f"The loss: {', '.join(ON_POLICY)}. opd: log-ratios of the sampled tokens; kldiv recipes says what "
            "the others are.",
            metavar="NAME",
        ),
    ] = "opd",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="An option of the recipe, such as k=20. May be repeated.", metavar="NAME=VALUE"),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Base model of gopd, local folder or hub id.", show_default="the student before training"),
    ] = None,
    prompt_length: Annotated[int, typer.Option(min=1, help="Tokens of a block that the student goes on from.")] = 32,
    completion_length: Annotated[int, typer.Option(min=1, help="Tokens that it writes at most.")] = 64,
    sampling_temperature: Annotated[float, typer.Option(help="Of the student as it writes.")] = 1.0,
    vocab_size: VocabSize = None,
    backend: BackendName = "auto",
    steps: Annotated[
        int, typer.Option(min=1, help="Optimiser steps. With --resume more than before extend a run.")
    ] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts a device and micro-batch.")] = 8,
    accumulation: Accumulation = 1,
    lr: PeakLearningRate = 5e-5,
    bf16: MixedPrecision = False,
    seed: Annotated[int, typer.Option(min=0, help="Of data order, held-out split and sampling.")] = 0,
    held_out: Annotated[
        float, typer.Option(help="Share of the blocks kept for evaluation, where the data has no validation split.")
    ] = 0.05,
    data_config: DataConfig = None,
    text_column: TextColumn = "text",
    log_every: LogEvery = 10,
    eval_every: EvalEvery = 50,
    save_every: SaveEvery = 50,
    resume: Resume = False,
) -> None:
    """Distil a teacher into a student on text that the student writes itself.

    The student goes on from the first tokens of each block of --data, the
    teacher scores what it wrote, and the recipe makes a loss of it. Leaves in
    --output what kldiv train distill leaves; in metrics.jsonl sampled_kl is
    KL(student ∥ teacher) on the completions. Ctrl-C stops it after the step,
    with a checkpoint.

    [bold]Examples[/bold]

      $ kldiv train opd --student runs/demo/student_ce --teacher runs/demo/teacher
        --data README.md --steps 40 --output runs/opd

      $ kldiv train opd --student runs/demo/student_ce --teacher runs/demo/teacher
        --data book.txt --recipe vopd --set baseline=top_k --set k=20 --output runs/vopd

      $ kldiv train opd --student Qwen/Qwen3-0.6B-Base --teacher Qwen/Qwen3-4B-Base
        --data notes/ --recipe gopd --set extrapolation=1.1 --bf16 --output runs/gopd
    """
    options = {name: value for name, value in locals().items() if name not in _NOT_OF_THE_RUN}
    set_to = on_policy_options(recipe, settings)
    require(base is None or recipe == "gopd", "--base", f"only with --recipe gopd, not {recipe}")
    require(lr > 0, "--lr", f"{lr} is not above 0")
    require(0 < held_out < 1, "--held-out", f"{held_out} is not between 0 and 1")
    require(
        0 < sampling_temperature < float("inf"), "--sampling-temperature", f"{sampling_temperature} is not above 0 and "
        "finite",
    )  # fmt: skip
    require_backend(backend)
    for option, model in (("--student", student), ("--teacher", teacher), ("--base", base)):
        require_model(model, option)
    for source in data:
        require_source(source, "--data")

    from kldiv_kernels.distillation import shared_vocab_size
    from kldiv_kernels.trainer import run
    from kldiv_kernels.trainer.data import load_blocks
    from kldiv_kernels.trainer.opd import OnPolicyArguments, OnPolicyTrainer
    from kldiv_kernels.trainer.quiet import quiet

    with option_errors():
        arguments = run.training_arguments(
            output, arguments=OnPolicyArguments, steps=steps, batch_size=batch_size, learning_rate=lr, seed=seed,
            log_every=log_every, eval_every=eval_every, save_every=save_every,
            gradient_accumulation_steps=accumulation, bf16=bf16, vocab_size=vocab_size, backend=backend, recipe=recipe,
            recipe_options=set_to, prompt_length=prompt_length, completion_length=completion_length,
            sampling_temperature=sampling_temperature,
        )  # fmt: skip
        extended = run.check_run(output, options, resume=resume, extendable="steps")
    if extended or not run.is_finished(output):
        tokenizer = load_tokenizer(student, "--student")
        for option, model in (("--teacher", teacher), ("--base", base)):
            if model is not None:
                require_same_tokens(tokenizer, load_tokenizer(model, option), option)
        student_model, dtype = load_model(student, "--student"), "bfloat16" if bf16 else "float32"
        teacher_model = load_model(teacher, "--teacher", dtype)
        base_model = load_model(base or student, "--base" if base else "--student", dtype) if recipe == "gopd" else None
        with option_errors("--vocab-size"):
            width = min(shared_vocab_size(student_model, other, vocab_size) for other in (teacher_model, base_model))
        require(len(tokenizer) <= width, "--vocab-size", f"{width} is below the tokenizer's {len(tokenizer)} tokens")
        with option_errors("--data"), arguments.main_process_first(), quiet():
            blocks = load_blocks(
                data, tokenizer, block_size=prompt_length + completion_length, held_out=held_out, seed=seed,
                config=data_config, column=text_column,
            )  # fmt: skip
        if arguments.process_index == 0:
            run.begin_run(output, options)
        run.fit(
            student_model, teacher_model, blocks, arguments, tokenizer=tokenizer,
            trainer=functools.partial(OnPolicyTrainer, base_model=base_model),
        )  # fmt: skip
    if arguments.process_index == 0:
        print_summary(run.read_json(output / run.SUMMARY), output)
