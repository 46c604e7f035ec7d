"""The commands of `kldiv`, their options and what they print."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from kldiv_kernels.benchmarking.defaults import DEFAULT_HIDDEN, DEFAULT_KINDS, DEFAULT_ROWS, DEFAULT_VOCAB
from kldiv_kernels.cli.recipes import recipes
from kldiv_kernels.extras import missing
from kldiv_kernels.trainer.cache_command import cache_teacher
from kldiv_kernels.trainer.command import distill
from kldiv_kernels.trainer.demo_command import demo
from kldiv_kernels.trainer.grpo_command import grpo
from kldiv_kernels.trainer.opd_command import opd
from kldiv_kernels.trainer.preference_command import preference
from kldiv_kernels.version import __version__

if TYPE_CHECKING:
    import torch

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kldiv {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Exact divergences, entropy and log-probabilities over the full vocabulary."""


class _DistillByDefault(typer.core.TyperGroup):
    """Options without a command before them go to `distill`, which `train` was before there was another."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ctx.help_option_names:
            args = ["distill", *args]
        return super().parse_args(ctx, args)


train = typer.Typer(cls=_DistillByDefault, no_args_is_help=True, rich_markup_mode="rich")


@train.callback()
def _train() -> None:
    """Train a model: distil a teacher into it, on texts or on what it writes, reward its answers, or show it
    which of two answers is preferred.

    Options without a command are those of distill, whose help is
    `kldiv train distill --help`.

    [bold]Examples[/bold]

      $ kldiv train --student … --teacher … --data … --output …

      $ kldiv train distill --student … --teacher … --data … --output …

      $ kldiv train opd --student … --teacher … --data … --output …

      $ kldiv train grpo --output runs/grpo

      $ kldiv train preference --model … --data … --output …
    """


_STATUS_STYLE = {"ok": "green", "missing": "red", "note": "yellow"}


def _bad_option(error: ValueError, *options: str) -> typer.BadParameter:
    """The API's message "plan: rows is 0; expected …" as an error of the option --rows."""
    found = re.match(r"(?:\w+: )?(\w+)(?: is |: )(.*)", str(error), re.DOTALL)
    if found is None or found[1] not in options:
        return typer.BadParameter(str(error))
    return typer.BadParameter(found[2], param_hint=f"--{found[1].replace('_', '-')}")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _dtype(name: str, option: str) -> torch.dtype:
    from kldiv_kernels.benchmarking import cases

    try:
        return cases.dtype(name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def _needs_extra(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with one line that says what to install in place of a traceback where an extra is missing."""

    @functools.wraps(command)
    def run(**options: Any) -> None:
        try:
            command(**options)
        except ModuleNotFoundError as error:
            said = missing("kldiv", error)
            if said is None:
                raise
            print(said, file=sys.stderr)
            raise typer.Exit(2) from None

    return run


@app.command()
def doctor() -> None:
    """What works here, why something does not, and how to mend it.

    [bold]Examples[/bold]

      $ kldiv doctor
    """
    from kldiv_kernels.cli.doctor import as_text, checks

    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ModuleNotFoundError:
        print(as_text(checks()))
        return

    table = Table("what", "status", "detail", "to do")
    for check in checks():
        style = _STATUS_STYLE[check.status]
        table.add_row(check.name, f"[{style}]{check.status}[/{style}]", escape(check.detail), escape(check.hint))
    Console().print(table)


def plan(
    rows: Annotated[int, typer.Option(help="Tokens, N.")],
    vocab: Annotated[int, typer.Option(help="Columns, V.")],
    dtype: Annotated[str, typer.Option(help="Of the logits: bf16, fp16 or fp32.")] = "bf16",
    kind: Annotated[str | None, typer.Option(help="Divergence of a loss.", show_default="forward_kl")] = None,
    stats: Annotated[str | None, typer.Option(help="Statistics of token_stats, comma-separated.")] = None,
    gradient: Annotated[bool, typer.Option(help="Count the gradient of the logits.")] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda, or an architecture such as sm_90.")] = "cpu",
) -> None:
    """Which kernel a call would run and the bytes that it would move, without running it.

    [bold]Examples[/bold]

      $ kldiv plan --rows 256 --vocab 151936 --kind js

      $ kldiv plan --rows 4096 --vocab 32000 --dtype fp32 --stats logprob,entropy

      $ kldiv plan --rows 8192 --vocab 151936 --kind reverse_kl --device sm_90
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    import kldiv_kernels as kk

    try:
        chosen = kk.plan(
            rows=rows, vocab=vocab, dtype=_dtype(dtype, "--dtype"), kind=kind,
            stats=None if stats is None else _names(stats), gradient=gradient, device=device,
        )  # fmt: skip
    except ValueError as error:
        raise _bad_option(error, "rows", "vocab", "kind", "stats", "device") from None
    table = Table(show_header=False)
    for name, value in dataclasses.asdict(chosen).items():
        if name == "bytes":
            table.add_row(name, f"{value:,}" + (f" ({value / 1e6:,.1f} MB)" if value >= 1e6 else ""))
        elif value is not None:
            table.add_row(name, escape(str(value)))
    Console().print(table)


def bench(
    rows: Annotated[int, typer.Option(help="Tokens, N.")] = DEFAULT_ROWS,
    vocab: Annotated[int, typer.Option(help="Columns, V.")] = DEFAULT_VOCAB,
    hidden_size: Annotated[
        int | None, typer.Option(help="Width of hidden states, for linear_ kinds.", show_default=str(DEFAULT_HIDDEN))
    ] = None,
    kinds: Annotated[
        str,
        typer.Option(
            help="Comma-separated divergences, logprob_entropy, grpo, topk, topk_from_logits; from hidden states "
            "linear_forward_kl, linear_reverse_kl, linear_js, linear_logprob_entropy, linear_grpo; of columns in two "
            "processes parallel_forward_kl, parallel_js, parallel_logprob_entropy, parallel_grpo, or parallel for all."
        ),
    ] = ",".join(DEFAULT_KINDS),
    dtypes: Annotated[str, typer.Option(help="Comma-separated: bf16, fp32, fp16.")] = "bf16,fp32",
    peers: Annotated[str, typer.Option(help="Comma-separated: eager, compile, trl; or none.")] = "eager,compile,trl",
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each; the median counts.")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads.", show_default="PyTorch's")] = None,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too, in a process per line.")] = True,
    output: Annotated[Path, typer.Option(help="Folder for results.json and times.png.")] = Path("runs/bench"),
) -> None:
    """Times loss + gradients against PyTorch eager, torch.compile, TRL and a copy, all in one run.

    [bold]Examples[/bold]

      $ kldiv bench

      $ kldiv bench --kinds forward_kl,js --dtypes bf16 --rows 64 --repeats 5

      $ kldiv bench --kinds grpo --dtypes bf16 --rows 1024 --repeats 3

      $ kldiv bench --kinds linear_js,linear_grpo --dtypes bf16 --rows 1024 --hidden-size 512 --repeats 3

      $ kldiv bench --kinds parallel --dtypes bf16

      $ kldiv bench --peers none --no-memory --output runs/ours
    """
    import torch
    from rich import progress
    from rich.console import Console

    from kldiv_kernels.benchmarking import cases, report
    from kldiv_kernels.benchmarking.peers import OURS, PEERS
    from kldiv_kernels.benchmarking.plot import save
    from kldiv_kernels.benchmarking.run import PLOT, RESULTS, Settings, run

    asked = [] if peers == "none" else _names(peers)
    unknown = [name for name in asked if name not in PEERS]
    if unknown:
        raise typer.BadParameter(
            f"unknown {', '.join(unknown)}; expected none or {', '.join(PEERS)}", param_hint="--peers"
        )
    try:
        chosen = cases.cases(
            tuple(_names(kinds)), tuple(_dtype(name, "--dtypes") for name in _names(dtypes)), rows, vocab, hidden_size
        )
    except ValueError as error:
        raise _bad_option(error, "rows", "vocab", "kinds", "hidden_size") from None
    if not chosen:
        raise typer.BadParameter("no case: both need at least one name", param_hint="--kinds, --dtypes")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{output}: {error.strerror}", param_hint="--output") from None
    if threads is not None:
        torch.set_num_threads(threads)
    settings = Settings(chosen, output, tuple(asked), repeats, memory)
    console = Console()
    with progress.Progress(console=console) as bar:
        task = bar.add_task("", total=settings.steps)
        started = False

        def step(what: str) -> None:
            # The step announced before this one is done.
            nonlocal started
            bar.update(task, description=what, advance=int(started))
            started = True

        results = run(settings, step)
        bar.update(task, description="done", completed=settings.steps)
    save(json.loads((output / RESULTS).read_text(encoding="utf-8")), output / PLOT)
    console.print(report.times_table(results))
    targets = report.targets_table(results)
    if targets is not None:
        console.print()
        console.print(targets)
    for line in report.problems(results):
        console.print(line)
    console.print(f"{output / RESULTS}\n{output / PLOT}", highlight=False)
    if any(result[OURS] is None for result in results):
        raise typer.Exit(1)


for _group, _command in (
    (app, plan), (app, bench), (app, recipes), (train, distill), (train, opd), (train, grpo),
    (train, preference), (app, demo), (app, cache_teacher),
):  # fmt: skip
    _group.command()(_needs_extra(_command))
app.add_typer(train, name="train")
