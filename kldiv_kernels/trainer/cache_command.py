"""The command `kldiv cache-teacher`: options checked here, work done in `caching.py`.

Every rank of the launcher runs all of this. What one refuses all refuse, at the end of a `ranks.together()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kldiv_kernels.trainer.interrupts import resumable
from kldiv_kernels.trainer.options import (
    load_model,
    load_tokenizer,
    option_errors,
    require,
    require_model,
    require_source,
)
from kldiv_kernels.trainer.ranks import Ranks, launched
from kldiv_kernels.trainer.shared_options import BlockSize, DataConfig, TextColumn

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from kldiv_kernels.teacher_cache import CacheInfo, ParallelCacheWriter, TeacherCache

_DTYPES = {"fp32": "float32", "fp16": "float16"}
_DEVICE_MAPS = ("auto", "sequential")
_NOT_OF_THE_RUN = ("output", "resume", "device_map", "tensor_parallel")


@resumable
def cache_teacher(
    teacher: Annotated[str, typer.Option(help="Teacher: local folder or hub id of a causal language model.")],
    data: Annotated[
        list[str],
        typer.Option(
            help="Text, JSON, CSV or Parquet file, folder of them, or hub data set id, of which the train split is "
            "taken. May be repeated."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the cache; must be new or empty unless --resume.")],
    k: Annotated[int, typer.Option("--k", min=1, help="Log-probs a token.")] = 64,
    dtype: Annotated[
        str, typer.Option(help="Of the stored log-probs: fp32, or fp16, which rounds them by up to 0.05 %.")
    ] = "fp32",
    temperature: Annotated[float, typer.Option(help="Divides the teacher's logits.")] = 1.0,
    vocab_size: Annotated[
        int | None, typer.Option(help="Columns from here on are padding. Default: the teacher's width.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Blocks a call of the teacher.")] = 8,
    block_size: BlockSize = 512,
    bf16: Annotated[bool, typer.Option("--bf16", help="The teacher's weights in bfloat16.")] = False,
    shard_rows: Annotated[int, typer.Option(min=1, help="Rows of a shard: what a kill can lose.")] = 65_536,
    data_config: DataConfig = None,
    text_column: TextColumn = "text",
    device_map: Annotated[
        str | None,
        typer.Option(
            help="Spreads the teacher over several devices of a process: auto (evenly), sequential (the first ones "
            "full). Processes of one machine have as many each.",
            metavar="NAME",
        ),
    ] = None,
    tensor_parallel: Annotated[
        bool,
        typer.Option(
            "--tensor-parallel",
            help="Spreads every layer of the teacher over the devices of all processes, by transformers' plan.",
        ),
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the cache in --output, exactly.")] = False,
) -> None:
    """Write a teacher's k most probable tokens at each position of a text.

    Leaves in --output: shards of safetensors with ids, exact log-probs and
    the text's tokens, cache.json, and the teacher's tokenizer. Ctrl-C stops
    it at once and loses the shard that is being filled. A run that was
    stopped or killed continues with the same command and --resume; its shards
    are then those of a run that did not stop. kldiv_kernels.teacher_cache
    reads them.

    Under torchrun or accelerate launch each process has a teacher on its own
    device and writes its share of the shards. --resume may be run with
    another number of processes, or with one.

    [bold]Examples[/bold]

      $ kldiv cache-teacher --teacher Qwen/Qwen3-4B-Base --data notes/
        --k 64 --bf16 --output runs/qwen_cache

      $ kldiv cache-teacher --teacher runs/demo/teacher --data book.txt
        --k 16 --dtype fp16 --block-size 128 --output runs/cache --resume

      $ torchrun --nproc-per-node 8 -m kldiv_kernels.cli cache-teacher --bf16
        --teacher … --data … --output …

      $ torchrun --nproc-per-node 2 -m kldiv_kernels.cli cache-teacher --bf16
        --device-map auto --teacher … --data … --output …
    """
    given = dict(locals())
    # Every option of this function but where it writes and how it computes: a resumed run must have the same.
    options = {name: value for name, value in given.items() if name not in _NOT_OF_THE_RUN}
    with launched(tensor_parallel=tensor_parallel) as ranks:
        with ranks.together():
            ranks.require_same(given)
            require(dtype in _DTYPES, "--dtype", f"{dtype!r}; expected {' or '.join(_DTYPES)}")
            require(0 < temperature < float("inf"), "--temperature", f"{temperature} is not above 0 and finite")
            _check_spread(ranks, device_map, tensor_parallel)
            require_model(teacher, "--teacher")
            for source in data:
                require_source(source, "--data")

        from kldiv_kernels.distillation import shared_vocab_size
        from kldiv_kernels.teacher_cache import CacheInfo, TeacherCache
        from kldiv_kernels.teacher_cache.info import RECORD, read_record
        from kldiv_kernels.trainer import placement, run
        from kldiv_kernels.trainer.caching import data_checksum, weights_checksum
        from kldiv_kernels.trainer.data import load_documents, pack
        from kldiv_kernels.trainer.quiet import quiet

        with ranks.together(), option_errors():
            run.check_run(output, options, resume=resume)
            begun = (output / RECORD).exists()
            finished = begun and read_record(output)[1] is not None
        if not finished:
            with ranks.together():
                tokenizer = load_tokenizer(teacher, "--teacher")
                placed = placement.load_options(ranks, device_map, tensor_parallel)
            # Tensor parallel loading has collectives, in which the others would wait for a rank that waits for them.
            with nullcontext() if tensor_parallel else ranks.together():
                model = load_model(teacher, "--teacher", "bfloat16" if bf16 else "float32", **placed)
            with ranks.together():
                with option_errors("--tensor-parallel" if tensor_parallel else "--device-map"):
                    placement.check_placed(model, ranks, tensor_parallel)
                with option_errors("--vocab-size"):
                    width = shared_vocab_size(model, None, vocab_size)
                require(
                    len(tokenizer) <= width, "--vocab-size", f"{width} is below the tokenizer's {len(tokenizer)} tokens"
                )
                require(k <= width, "--k", f"{k} is above the {width} columns of the teacher")
            with ranks.together(), option_errors("--data"), quiet(), ranks.one_a_machine_first():
                blocks = pack(load_documents(data, config=data_config, column=text_column).train, tokenizer, block_size)
                require(len(blocks) > 0, "--data", f"the text has fewer than {block_size} tokens, one block")
            info = CacheInfo(
                teacher=teacher, vocab_size=width, k=k, temperature=temperature, dtype=_DTYPES[dtype],
                weights=weights_checksum(model), shard_rows=shard_rows,
            )  # fmt: skip

            with ranks.together():
                for option, what, mine in (
                    ("--data", "texts", data_checksum(blocks)), ("--teacher", "weights", info.weights)
                ):  # fmt: skip
                    found = ranks.gather(mine)
                    require(len(set(found)) == 1, option, f"the ranks have different {what}: {', '.join(found)}")

            def begin() -> None:
                if not begun:
                    run.begin_run(output, options)
                    tokenizer.save_pretrained(output)

            with _writer(ranks, output, info, blocks, begin) as writer:
                _check_shards(ranks, writer, blocks)
                # A ValueError here is about its weights, or about the log-probs that it gives.
                with option_errors("--teacher"), _disk_errors():
                    _fill(ranks, model, blocks, writer, batch_size=batch_size, everywhere=tensor_parallel)
                    if ranks.main:
                        writer.finish()
        if ranks.main:
            _print_summary(TeacherCache(output))


def _check_spread(ranks: Ranks, device_map: str | None, tensor_parallel: bool) -> None:
    require(
        device_map is None or device_map in _DEVICE_MAPS,
        "--device-map", f"{device_map!r}; expected {' or '.join(_DEVICE_MAPS)}",
    )  # fmt: skip
    if tensor_parallel:
        require(device_map is None, "--device-map", "not with --tensor-parallel, which spreads the teacher too")
        require(ranks.count > 1, "--tensor-parallel", "1 process; expected at least 2 (torchrun --nproc-per-node 2 …)")


@contextmanager
def _disk_errors() -> Iterator[None]:
    """A full disk as an error of --output: the cache that is there so far stays, and --resume goes on with it."""
    try:
        yield
    except OSError as error:
        raise typer.BadParameter(error.strerror or str(error), param_hint="--output") from error


@contextmanager
def _writer(
    ranks: Ranks, output: Path, info: CacheInfo, blocks: Dataset, begin: Callable[[], None]
) -> Iterator[ParallelCacheWriter]:
    """The main rank begins the cache, or sees that nobody else writes to it; then the others come in."""
    from kldiv_kernels.teacher_cache import ParallelCacheWriter

    opened = partial(ParallelCacheWriter, output, info, sequences=len(blocks), rows=len(blocks[0]["input_ids"]) - 1)
    with ranks.together(), option_errors("--teacher"), _disk_errors():
        if ranks.main:
            begin()
            writer = opened(resume=True)
    with ranks.together(), option_errors("--output"), _disk_errors():
        if not ranks.main:
            writer = opened(join=True)
    with writer:
        yield writer


def _check_shards(ranks: Ranks, writer: ParallelCacheWriter, blocks: Dataset) -> None:
    """Those of earlier runs, whoever wrote them: each rank reads its part of them."""
    from kldiv_kernels.trainer.caching import check_same_data

    with ranks.together():
        for number in writer.present()[ranks.number :: ranks.count]:
            require(
                number < writer.shards, "--data", f"it makes {len(blocks)} blocks, which are {writer.shards} shards; "
                f"the cache has shard {number} already, of other data",
            )  # fmt: skip
            with option_errors("--output"):
                sequences = writer.verify(number)
            with option_errors("--data"):
                check_same_data(writer.sequences_of(number).start, sequences, blocks)


def _fill(
    ranks: Ranks, model: PreTrainedModel, blocks: Dataset, writer: ParallelCacheWriter, *, batch_size: int,
    everywhere: bool,
) -> None:  # fmt: skip
    """Write the shards that are missing: dealt out to the ranks, or, `everywhere`, computed by all of them together."""
    from kldiv_kernels.trainer.caching import cache_blocks

    missing = ranks.gather(writer.missing())[0]
    left = sum(len(writer.sequences_of(number)) for number in missing)
    tokens, writes = len(blocks[0]["input_ids"]), ranks.main or not everywhere
    if ranks.main and not everywhere and 0 < len(missing) < ranks.count:
        typer.echo(
            f"{len(missing)} shards are left for {ranks.count} processes, and the others only wait; a smaller "
            "--shard-rows makes more shards", err=True,
        )  # fmt: skip
    with _progress(len(blocks), len(blocks) - left, tokens) if ranks.main else nullcontext(lambda new: None) as show:
        cache_blocks(
            model, blocks, writer, missing if everywhere else ranks.dealt(missing), batch_size=batch_size,
            write=writes, on_progress=lambda new: show(ranks.add("blocks", new if writes else 0)),
        )  # fmt: skip
        ranks.wait(lambda: show(ranks.add("blocks", 0)))


@contextmanager
def _progress(total: int, before: int, tokens: int) -> Iterator[Callable[[int], None]]:
    """Of all ranks: a function of how many blocks, of this many tokens, came to those of earlier runs."""
    from rich.console import Console

    from kldiv_kernels.trainer.progress import Lines, bar

    console = Console()
    if not console.is_terminal:
        lines = Lines(console, "block", total, before, before * tokens)
        yield lambda new: lines.show(before + new, (before + new) * tokens)
        return
    with bar(console) as shown:
        task = shown.add_task("caching blocks", total=total, completed=before, note="")

        def show(new: int) -> None:
            speed = shown.tasks[task].speed
            shown.update(task, completed=before + new, note=f"{speed * tokens:,.0f} tokens/s" if speed else "")

        yield show


def _print_summary(cache: TeacherCache) -> None:
    from rich.console import Console
    from rich.table import Table

    totals, mass = cache.totals, cache.captured_mass
    table = Table(title=str(cache.folder), show_header=False)
    for name in ("sequences", "tokens", "rows", "shards"):
        table.add_row(name, f"{getattr(totals, name):,}")
    table.add_row("bytes", f"{cache.bytes:,} ({cache.bytes / totals.tokens:,.0f} a token)")
    table.add_row("captured mass", f"mean {mass.mean:.6f}, min {mass.min:.6f}")
    Console().print(table)
