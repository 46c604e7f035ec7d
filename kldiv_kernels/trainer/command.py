"""The command `kldiv train distill`: options checked here, work done in `run.py`.

transformers and datasets take seconds to import: they load inside the functions, after the options were checked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from kldiv_kernels.choices import DivergenceKind, Tail
from kldiv_kernels.trainer.interrupts import resumable
from kldiv_kernels.trainer.options import (
    cached_sequences,
    load_model,
    load_tokenizer,
    open_cache,
    option_errors,
    print_summary,
    require,
    require_backend,
    require_model,
    require_same_tokens,
    require_source,
)
from kldiv_kernels.trainer.recipe_options import DISTILLATION, recipe_options, short_name
from kldiv_kernels.trainer.shared_options import (
    Accumulation,
    BackendName,
    BlockSize,
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

if TYPE_CHECKING:
    from kldiv_kernels.trainer.cached import CachedSplit

_KINDS = ", ".join(get_args(DivergenceKind))
_TAILS = get_args(Tail)
# Options of a run on text, and of one from a cache: those of the other kind are refused, and not stored.
_OF_TEXT = ("teacher", "data", "block_size", "data_config", "text_column")
_OF_CACHE = ("teacher_cache", "tail")
# What a recipe takes the place of.
_OF_LOSS = ("kind", "ce_weight", "temperature", "temperature_squared", "alpha", "beta", "tail", "teacher_cache")
_NOT_OF_THE_RUN = ("context", "output", "resume", "fused_linear")


@resumable
def distill(
    context: typer.Context,
    student: Annotated[str, typer.Option(help="Student: local folder or hub id of a causal language model.")],
    output: Output,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text, JSON, CSV or Parquet file, folder of them, or hub data set id. May be repeated. "
            "Not with --teacher-cache."
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Teacher: local folder or hub id. Not needed with --ce-weight 1 or --teacher-cache."),
    ] = None,
    teacher_cache: Annotated[
        str | None,
        typer.Option(
            help="Folder that kldiv cache-teacher wrote: its sequences are the data, its log-probs the teacher, at "
            "its temperature. In place of --teacher, --data and --block-size.",
            metavar="FOLDER",
        ),
    ] = None,
    kind: Annotated[str, typer.Option(help=f"Divergence: {_KINDS}.", metavar="NAME")] = "forward_kl",
    ce_weight: Annotated[float, typer.Option(help="w in (1 − w)·divergence + w·cross-entropy.")] = 0.0,
    temperature: Annotated[float, typer.Option(help="Divides both logits in the divergence.")] = 1.0,
    temperature_squared: Annotated[
        bool, typer.Option("--temperature-squared", help="Multiply the divergence by temperature².")
    ] = False,
    alpha: Annotated[
        float | None,
        typer.Option(help="Parameter of skew_kl, skew_reverse_kl, renyi, alpha, alpha_beta. Default: 0.5."),
    ] = None,
    beta: Annotated[float | None, typer.Option(help="Parameter of js and alpha_beta. Default: 0.5.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help=f"A paper's method in place of --kind and its options: {', '.join(map(short_name, DISTILLATION))}; "
            "kldiv recipes says what each is.",
            metavar="NAME",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="An option of the --recipe, such as kl_coef=0.1. May be repeated.", metavar="NAME=VALUE"
        ),
    ] = None,
    tail: Annotated[
        str,
        typer.Option(
            help="What the tokens are that a --teacher-cache does not have: bucket (all of them one outcome), "
            "renormalize (left out of both), renormalize_teacher (impossible for the teacher), none (raw sums).",
            metavar="NAME",
        ),
    ] = "bucket",
    vocab_size: VocabSize = None,
    fused_linear: Annotated[
        bool | None,
        typer.Option(
            "--fused-linear/--no-fused-linear",
            help="Loss from hidden states, without the logits in memory. Default: where both models have a plain head.",
        ),
    ] = None,
    backend: BackendName = "auto",
    steps: Annotated[
        int,
        typer.Option(
            min=1,
            help="Optimiser steps. With --resume more than before extend a run: the learning rate goes on as in a run "
            "of the new number from the start.",
        ),
    ] = 1000,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Blocks, or sequences of a cache, a device and micro-batch.")
    ] = 8,
    accumulation: Accumulation = 1,
    block_size: BlockSize = 512,
    lr: PeakLearningRate = 5e-5,
    bf16: MixedPrecision = False,
    seed: Annotated[int, typer.Option(min=0, help="Of data order and held-out split.")] = 0,
    held_out: Annotated[
        float,
        typer.Option(
            help="Share of the blocks kept for evaluation, where the data has no validation split; of a cache, "
            "neighbouring sequences from a place that --seed chooses."
        ),
    ] = 0.05,
    data_config: DataConfig = None,
    text_column: TextColumn = "text",
    log_every: LogEvery = 10,
    eval_every: EvalEvery = 100,
    save_every: SaveEvery = 100,
    resume: Resume = False,
) -> None:
    """Distil a teacher into a student on text, or from a teacher's log-probs on disk.

    Leaves in --output: the student and its tokenizer, metrics.jsonl,
    summary.json, loss.png and the last two checkpoints. Ctrl-C stops it after
    the step, with a checkpoint; a second one stops it at once. A run that was
    stopped or killed continues with the same command and --resume, as if it
    had not stopped.

    [bold]Examples[/bold]

      $ kldiv train distill --student Qwen/Qwen3-0.6B-Base --teacher Qwen/Qwen3-4B-Base
        --data notes/ --output runs/notes

      $ kldiv train distill --student runs/demo/student_ce --teacher runs/demo/teacher
        --data book.txt --kind js --beta 0.9 --block-size 128 --output runs/js

      $ kldiv train distill --student runs/demo/student_ce --teacher-cache runs/teacher_cache
        --tail bucket --output runs/cached

      $ kldiv train distill --student runs/demo/student_ce --teacher runs/demo/student_ce
        --data book.txt --recipe asft --set kl_coef=0.1 --block-size 128 --output runs/asft

      $ torchrun --nproc-per-node 8 -m kldiv_kernels.cli train distill --bf16
        --student … --teacher … --data … --output …
    """
    # Every option of this function but where it writes and how it computes: a resumed run must have the same.
    options = {name: value for name, value in locals().items() if name not in _NOT_OF_THE_RUN}
    options = _of_this_run(options, context)
    _check_loss(kind, ce_weight, temperature, alpha, beta, backend)
    function, set_to = recipe_options(recipe, settings, DISTILLATION)
    require(tail in _TAILS, "--tail", f"{tail!r}; expected {', '.join(_TAILS[:-1])} or {_TAILS[-1]}")
    if teacher_cache is None:
        require(bool(data), "--data", "missing; only --teacher-cache has data of its own")
        alone = ce_weight == 1.0 or function == "dft_loss"
        require(
            teacher is not None or alone,
            "--teacher", "missing; only --ce-weight 1, --teacher-cache and --recipe dft train without one",
        )  # fmt: skip
    require(lr > 0, "--lr", f"{lr} is not above 0")
    require(0 < held_out < 1, "--held-out", f"{held_out} is not between 0 and 1")
    sources = data or []
    for option, model in (("--student", student), ("--teacher", teacher)):
        require_model(model, option)
    for source in sources:
        require_source(source, "--data")

    from kldiv_kernels.adapters import headless
    from kldiv_kernels.distillation import shared_vocab_size
    from kldiv_kernels.trainer import run
    from kldiv_kernels.trainer.data import Blocks, load_blocks
    from kldiv_kernels.trainer.quiet import quiet

    with option_errors():
        arguments = run.training_arguments(
            output, steps=steps, batch_size=batch_size, learning_rate=lr, seed=seed, log_every=log_every,
            eval_every=eval_every, save_every=save_every, gradient_accumulation_steps=accumulation, bf16=bf16,
            kind=kind, ce_weight=ce_weight, temperature=temperature, temperature_squared=temperature_squared,
            alpha=alpha, beta=beta, tail=tail, vocab_size=vocab_size, fused_linear=fused_linear, backend=backend,
            recipe=function, recipe_options=set_to,
            # Blocks have no padding, and their end-of-text tokens may be the tokenizer's padding token.
            include_num_input_tokens_seen="all" if teacher_cache is None else "non_padding",
        )  # fmt: skip
        extended = run.check_run(output, options, resume=resume, extendable="steps")
    if extended or not run.is_finished(output):
        cache = None if teacher_cache is None else open_cache(teacher_cache, temperature)
        tokenizer = load_tokenizer(student, "--student")
        if teacher is not None:
            require_same_tokens(tokenizer, load_tokenizer(teacher, "--teacher"), "--teacher")
        student_model = load_model(student, "--student")
        # Autocast needs the student's weights in float32 for the optimiser; the teacher's are only read.
        teacher_model = None if teacher is None else load_model(teacher, "--teacher", "bfloat16" if bf16 else "float32")
        if fused_linear:
            reason = headless.why_not(student=student_model, teacher=teacher_model)
            require(reason is None, "--fused-linear", f"impossible here: {reason}")
        blocks: Blocks | CachedSplit
        if cache is not None:
            blocks = cached_sequences(cache, student_model, tokenizer, arguments, held_out)
        else:
            with option_errors("--vocab-size"):
                width = shared_vocab_size(student_model, teacher_model, vocab_size)
            require(
                len(tokenizer) <= width, "--vocab-size", f"{width} is below the tokenizer's {len(tokenizer)} tokens"
            )
            with option_errors("--data"), arguments.main_process_first(), quiet():
                blocks = load_blocks(
                    sources, tokenizer, block_size=block_size, held_out=held_out, seed=seed,
                    config=data_config, column=text_column,
                )  # fmt: skip
        # The other ranks have passed their check: main_process_first holds all of them together.
        if arguments.process_index == 0:
            run.begin_run(output, options)
        run.fit(student_model, teacher_model, blocks, arguments, tokenizer=tokenizer)
    if arguments.process_index == 0:
        print_summary(run.read_json(output / run.SUMMARY), output)


def _of_this_run(options: dict[str, Any], context: typer.Context) -> dict[str, Any]:
    """Without those that do not apply, to a run on text or to one from a cache; an error for one that was given."""
    cached = options["teacher_cache"] is not None
    others, why = (_OF_TEXT, "not with --teacher-cache") if cached else (_OF_CACHE, "only with --teacher-cache")
    for name in others:
        require(
            not _is_given(context, name), _option(name), f"{why}, whose sequences and log-probs are the data and the "
            "teacher",
        )  # fmt: skip
    if options["recipe"] is not None:
        for name in _OF_LOSS:
            require(
                not _is_given(context, name), _option(name), "not with --recipe, which is the loss; options of its own "
                "go to --set",
            )  # fmt: skip
        others = (*others, *_OF_LOSS)
    return {name: value for name, value in options.items() if name not in others}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _check_loss(
    kind: str, ce_weight: float, temperature: float, alpha: float | None, beta: float | None, backend: str
) -> None:
    from kldiv_kernels import registry

    try:
        statistic = registry.get(kind, "kind", registry.divergence_names())
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix("kind: "), param_hint="--kind") from None
    require(0 <= ce_weight <= 1, "--ce-weight", f"{ce_weight} is not between 0 and 1")
    require(0 < temperature < float("inf"), "--temperature", f"{temperature} is not above 0 and finite")
    for name, value in (("alpha", alpha), ("beta", beta)):
        if value is None:
            continue
        bound = getattr(statistic, name)
        if bound is None:
            kinds = ", ".join(registry.kinds_with(name))
            raise typer.BadParameter(f"{kind} has no use for it; it is for {kinds}", param_hint=f"--{name}")
        require(bool(bound.allows(value)), f"--{name}", f"{value} is not {bound.text}, for {kind}")
    require_backend(backend)
