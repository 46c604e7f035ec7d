"""The command `kldiv cache-teacher`: options checked here, work done in `caching.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from kldiv_kernels.teacher_cache import CacheInfo, TeacherCache, TeacherCacheWriter

_DTYPES = {"fp32": "float32", "fp16": "float16"}


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
    block_size: Annotated[int, typer.Option(min=2, help="Tokens a block.")] = 512,
    bf16: Annotated[bool, typer.Option("--bf16", help="The teacher's weights in bfloat16.")] = False,
    shard_rows: Annotated[int, typer.Option(min=1, help="Rows of a shard: what a kill can lose.")] = 65_536,
    data_config: Annotated[str | None, typer.Option(help="Configuration of a hub data set.")] = None,
    text_column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    resume: Annotated[bool, typer.Option("--resume", help="Continue the cache in --output, exactly.")] = False,
) -> None:
    """Write a teacher's k most probable tokens at each position of a text.

    Leaves in --output: shards of safetensors with ids, exact log-probs and
    the text's tokens, cache.json, and the teacher's tokenizer. Ctrl-C stops
    it at once and loses the shard that is being filled. A run that was
    stopped or killed continues with the same command and --resume; its shards
    are then those of a run that did not stop. kldiv_kernels.teacher_cache
    reads them.

    [bold]Examples[/bold]

      $ kldiv cache-teacher --teacher Qwen/Qwen3-4B-Base --data notes/
        --k 64 --bf16 --output runs/qwen_cache

      $ kldiv cache-teacher --teacher runs/demo/teacher --data book.txt
        --k 16 --dtype fp16 --block-size 128 --output runs/cache --resume
    """
    # Every option of this function but where it writes: a resumed run must have the same.
    options = {name: value for name, value in locals().items() if name not in ("output", "resume")}
    require(dtype in _DTYPES, "--dtype", f"{dtype!r}; expected {' or '.join(_DTYPES)}")
    require(0 < temperature < float("inf"), "--temperature", f"{temperature} is not above 0 and finite")
    require_model(teacher, "--teacher")
    for source in data:
        require_source(source, "--data")

    from kldiv_kernels.distillation import shared_vocab_size
    from kldiv_kernels.teacher_cache import CacheInfo, TeacherCache
    from kldiv_kernels.teacher_cache.info import RECORD, read_record
    from kldiv_kernels.trainer import run
    from kldiv_kernels.trainer.caching import check_same_data, weights_checksum
    from kldiv_kernels.trainer.data import load_documents, pack
    from kldiv_kernels.trainer.quiet import quiet

    with option_errors():
        run.check_run(output, options, resume=resume)
        begun = (output / RECORD).exists()
        finished = begun and read_record(output)[1] is not None
    if not finished:
        tokenizer = load_tokenizer(teacher, "--teacher")
        model = load_model(teacher, "--teacher", "bfloat16" if bf16 else "float32")
        with option_errors("--vocab-size"):
            width = shared_vocab_size(model, None, vocab_size)
        require(len(tokenizer) <= width, "--vocab-size", f"{width} is below the tokenizer's {len(tokenizer)} tokens")
        require(k <= width, "--k", f"{k} is above the {width} columns of the teacher")
        with option_errors("--data"), quiet():
            blocks = pack(load_documents(data, config=data_config, column=text_column).train, tokenizer, block_size)
        require(len(blocks) > 0, "--data", f"the text has fewer than {block_size} tokens, one block")
        if begun:
            with option_errors("--output"):
                have = TeacherCache(output, partial=True, check=False)
                have.verify()
            with option_errors("--data"):
                check_same_data(have, blocks)
        info = CacheInfo(
            teacher=teacher, vocab_size=width, k=k, temperature=temperature, dtype=_DTYPES[dtype],
            weights=weights_checksum(model), shard_rows=shard_rows,
        )  # fmt: skip
        with _disk_errors():
            run.begin_run(output, options)
            tokenizer.save_pretrained(output)
        # A ValueError here is about its weights, or about the log-probs that it gives.
        with option_errors("--teacher"), _disk_errors(), _writer(output, info) as writer:
            _fill(model, blocks, writer, batch_size=batch_size, block_size=block_size)
    _print_summary(TeacherCache(output))


@contextmanager
def _disk_errors() -> Iterator[None]:
    """A full disk as an error of --output: the cache that is there so far stays, and --resume goes on with it."""
    try:
        yield
    except OSError as error:
        raise typer.BadParameter(error.strerror or str(error), param_hint="--output") from error


def _writer(output: Path, info: CacheInfo) -> TeacherCacheWriter:
    from kldiv_kernels.teacher_cache import TeacherCacheWriter

    try:
        return TeacherCacheWriter(output, info, resume=True)
    except BlockingIOError as error:
        raise typer.BadParameter(str(error.strerror), param_hint="--output") from error


def _fill(
    model: PreTrainedModel, blocks: Dataset, writer: TeacherCacheWriter, *, batch_size: int, block_size: int
) -> None:
    import torch
    from rich.console import Console

    from kldiv_kernels.trainer.caching import cache_blocks
    from kldiv_kernels.trainer.progress import Lines, bar

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    model.to(device or "cpu")  # type: ignore[arg-type]
    console, total = Console(), len(blocks)
    if not console.is_terminal:
        lines = Lines(console, "block", total, writer.sequences, writer.sequences * block_size)
        cache_blocks(
            model, blocks, writer, batch_size=batch_size, on_progress=lambda done: lines.show(done, done * block_size)
        )
        return
    with bar(console) as shown:
        task = shown.add_task("caching blocks", total=total, note="")

        def show(done: int) -> None:
            speed = shown.tasks[task].speed
            shown.update(task, completed=done, note=f"{speed * block_size:,.0f} tokens/s" if speed else "")

        cache_blocks(model, blocks, writer, batch_size=batch_size, on_progress=show)


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
