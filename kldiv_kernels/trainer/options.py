"""What the training commands check and load alike: an error is the option's, not a traceback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    from kldiv_kernels import backends

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


def load_tokenizer(source: str, option: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = _loaded(AutoTokenizer, source, option)
    return tokenizer


def load_model(source: str, option: str, dtype: str = "float32") -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = _loaded(AutoModelForCausalLM, source, option, dtype=dtype)
    return model


def _loaded(loader: Any, source: str, option: str, **options: Any) -> Any:
    try:
        return loader.from_pretrained(source, **options)
    # OSError where there is nothing, ValueError where it is something else than asked for.
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{source}: {error}", param_hint=option) from error
