"""What transformers and datasets print of themselves, left out where it says nothing about the run.

Only their bars and two messages are: every other warning, as of weights that a checkpoint lacks, is still printed.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from huggingface_hub.utils import enable_progress_bars  # type: ignore[attr-defined]
from transformers.utils import logging as transformers_logging

_LEFT_OUT = (
    # The Trainer copies the ids of the tokenizer's special tokens into the model's configuration, as it should.
    "The tokenizer has new PAD/BOS/EOS tokens",
    # It tells the oldest checkpoint by the number of its step instead, which is what it should be told by.
    "mtime may not be reliable on this filesystem",
)


@contextmanager
def quiet() -> Iterator[None]:
    """No bar for each model that is read or written. Those of downloads and of a text's tokens on a terminal alone."""
    shown, data_shown = transformers_logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    trainer_utils = logging.getLogger("transformers.trainer_utils")
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    trainer_utils.addFilter(_says_something)
    if sys.stderr.isatty():
        # transformers has switched off downloads' bars with its own.
        enable_progress_bars()
    else:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        trainer_utils.removeFilter(_says_something)
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        if data_shown:
            datasets.enable_progress_bars()


def _says_something(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_LEFT_OUT)
