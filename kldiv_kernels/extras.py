"""The optional packages, and one sentence for all that are missing. Without PyTorch, for the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Package(NamedTuple):
    """Who needs it, and the extra of this package that installs it."""

    needed_by: str
    extra: str


_TRAINING = "kldiv train, kldiv demo, kldiv cache-teacher, kldiv_kernels.trainer"
_CACHES = "kldiv cache-teacher, kldiv_kernels.teacher_cache"
OPTIONAL = {
    "typer": Package("kldiv, but for kldiv doctor", "cli"),
    "rich": Package("kldiv, but for kldiv doctor", "cli"),
    "matplotlib": Package("kldiv bench, kldiv train, kldiv demo", "cli"),
    "safetensors": Package(_CACHES, "cache"),
    "numpy": Package(_CACHES, "cache"),
    "transformers": Package(_TRAINING, "train"),
    "accelerate": Package(_TRAINING, "train"),
    "datasets": Package(_TRAINING, "train"),
    "tokenizers": Package(_TRAINING, "train"),
    "trl": Package("kldiv train grpo, kldiv_kernels.adapters.trl; kldiv bench, as a peer", "trl"),
}


def not_installed(where: str, package: str) -> str:
    return f"{where}: {package} is not installed; run: pip install kldiv_kernels[{OPTIONAL[package].extra}]"


def missing(where: str, error: ModuleNotFoundError) -> str | None:
    """What to say of it; None where it is no optional package that is missing."""
    package = (error.name or "").partition(".")[0]
    return not_installed(where, package) if package in OPTIONAL else None


@contextmanager
def needed_by(where: str) -> Iterator[None]:
    """A ModuleNotFoundError of an optional package says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        said = missing(where, error)
        if said is None:
            raise
        raise ModuleNotFoundError(said, name=error.name, path=error.path) from None
