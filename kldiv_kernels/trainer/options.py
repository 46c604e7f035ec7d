"""What the training commands check and load alike: an error is the option's, not a traceback."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kldiv_kernels.teacher_cache import TeacherCache
    from kldiv_kernels.trainer.arguments import DistillationArguments
    from kldiv_kernels.trainer.cached import CachedSplit

# The hub answers in less than one.
_HUB_SECONDS = 5.0


def require(condition: bool, option: str, message: str) -> None:
    if not condition:
        raise typer.BadParameter(message, param_hint=option)


@contextmanager
def option_errors(option: str | None = None) -> Iterator[None]:
    """A ValueError about the arguments, as an error of the command line instead of a traceback."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def require_backend(backend: str) -> None:
    from kldiv_kernels.backends import backends

    known = {"auto": "available", **backends()}
    require(backend in known, "--backend", f"unknown {backend!r}; expected one of {', '.join(known)}")
    require(known[backend] == "available", "--backend", f"{backend}: {known[backend]}")


def require_source(source: str | None, option: str) -> None:
    """Written as a path and not there: told at once, and not asked of the hub."""
    if source is None:
        return
    looks_local = source.startswith((".", "~", os.sep)) or source.endswith(os.sep) or source.count("/") > 1
    looks_local = looks_local or Path(source).suffix in (".txt", ".md", ".json", ".jsonl", ".csv", ".parquet")
    require(not looks_local or Path(source).expanduser().exists(), option, f"{source} does not exist")


def require_model(source: str | None, option: str) -> None:
    """A folder, or a model that the hub has: told after one question to it, where loading would ask for minutes."""
    require_source(source, option)
    if source is None or Path(source).expanduser().exists():
        return
    first = Path(source).parts[0]
    here = f"; {first} is a folder here, without {source[len(first) + 1 :]}" if Path(first).is_dir() else ""
    why = _why_not_on_hub(source)
    require(why is None, option, f"{source} is no folder, {why}{here}")


def _why_not_on_hub(source: str) -> str | None:
    from huggingface_hub import HfApi, is_offline_mode, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        if isinstance(try_to_load_from_cache(source, "config.json"), str):
            return None
    except HFValidationError:
        return "and no hub id (expected org/name)"
    if is_offline_mode():
        return "it is not in the hub's cache, and HF_HUB_OFFLINE forbids to ask the hub"
    try:
        HfApi().model_info(source, timeout=_HUB_SECONDS)
    except RepositoryNotFoundError:
        return "and the hub shows no such model (a private one needs hf auth login)"
    # Proxies, names and sockets fail in ways of their own.
    except Exception as error:
        return f"and the hub cannot be asked for it: {error}"
    return None


def require_same_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, option: str) -> None:
    """A divergence compares columns: the same id must mean the same token. Extra tokens at the end are padding."""
    theirs = {index: token for token, index in teacher.get_vocab().items()}
    for token, index in student.get_vocab().items():
        if theirs.get(index, token) != token:
            raise typer.BadParameter(
                f"its tokenizer has {theirs[index]!r} where the student's has {token!r} (id {index}); "
                "expected one vocabulary",
                param_hint=option,
            )


def load_tokenizer(source: str, option: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = _loaded(AutoTokenizer, source, option)
    return tokenizer


def load_model(source: str, option: str, dtype: str = "float32", **options: Any) -> PreTrainedModel:
    """`options` are more of `from_pretrained`."""
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = _loaded(AutoModelForCausalLM, source, option, dtype=dtype, **options)
    return model


def open_cache(folder: str, temperature: float) -> TeacherCache:
    from kldiv_kernels.teacher_cache import TeacherCache

    with option_errors("--teacher-cache"):
        # Its checksums are compared once, by `cached_sequences`, and not by every worker again.
        cache = TeacherCache(folder, check=False)
    taken_at = cache.info.temperature
    require(
        temperature == taken_at, "--temperature",
        f"{temperature}; the log-probs in {folder} were taken at {taken_at} (pass --temperature {taken_at})",
    )  # fmt: skip
    return cache


def cached_sequences(
    cache: TeacherCache, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    arguments: DistillationArguments, held_out: float,
) -> CachedSplit:  # fmt: skip
    """The sequences of a cache, checked against the student and read once for their checksums."""
    from rich.progress import Progress

    from kldiv_kernels.distillation import shared_vocab_size
    from kldiv_kernels.trainer.cached import CachedSequences
    from kldiv_kernels.trainer.distillation import max_positions

    if any((cache.folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        theirs = load_tokenizer(str(cache.folder), "--teacher-cache")
        require_same_tokens(tokenizer, theirs, "--teacher-cache")
    with option_errors("--vocab-size"):
        width = shared_vocab_size(student, None, arguments.vocab_size, cached=cache.info.vocab_size)
    require(
        len(tokenizer) <= width, "--teacher-cache" if arguments.vocab_size is None else "--vocab-size",
        f"{width} columns are shared with {cache.folder}; the student's tokenizer has {len(tokenizer)} tokens",
    )  # fmt: skip
    with option_errors("--teacher-cache"), arguments.main_process_first():
        if arguments.local_process_index == 0:
            with Progress(transient=True) as bar:
                task = bar.add_task("comparing checksums")
                cache.verify(lambda done, shards: bar.update(task, completed=done, total=shards))
        sequences = CachedSequences(cache, vocab_size=width)
        sequences.check_for(vocab_size=width, temperature=arguments.temperature, positions=max_positions(student))
        return sequences.split(held_out, arguments.seed)


def print_summary(summary: dict[str, Any], folder: Path) -> None:
    """Of a finished run."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(folder), show_header=False)
    for name in ("parameters", "steps", "tokens"):
        table.add_row(name, f"{summary[name]:,}")
    table.add_row("held-out loss", f"{summary['held_out_loss']:.4f} nats per token")
    if summary["teacher_student_kl"] is not None:
        table.add_row("KL(teacher ∥ student)", f"{summary['teacher_student_kl']:.4f} nats per token")
    if summary["teacher_student_topk_kl"] is not None:
        table.add_row(
            f"top-{summary['loss']['k']} KL(teacher ∥ student)",
            f"{summary['teacher_student_topk_kl']:.4f} nats per token, at most the full KL",
        )
    Console().print(table)


def _loaded(loader: Any, source: str, option: str, **options: Any) -> Any:
    from kldiv_kernels.trainer.quiet import quiet

    try:
        with quiet():
            return loader.from_pretrained(source, **options)
    except ImportError:
        raise
    except pickle.UnpicklingError as error:
        raise typer.BadParameter(
            f"{source}: its weights are no pickle of tensors alone; any other could run code and is not loaded "
            "(expected safetensors, or a pickled state_dict)",
            param_hint=option,
        ) from error
    # OSError where there is nothing, ValueError where it is something else than asked for; of a damaged file whatever
    # its reader stumbles over: SafetensorError, KeyError, EOFError, RecursionError, TypeError.
    except Exception as error:
        known = isinstance(error, (OSError, ValueError))
        told = str(error) if known else f"it cannot be loaded, a file in it is damaged or of another kind: {error!r}"
        raise typer.BadParameter(f"{source}: {told}", param_hint=option) from error
