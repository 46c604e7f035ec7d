"""Runs commands of the command line inside the test's process, without the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import typer
from typer.testing import CliRunner


def stay_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    # The variable is read at import; what it sets is set too.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def invoke(app: typer.Typer, *words: str) -> tuple[int, str]:
    """Exit status and what was printed, on one line. An error that is no error of the command line is raised."""
    result = CliRunner().invoke(app, list(words), env={"COLUMNS": "400"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


def run(command: Callable[..., Any], given: dict[str, str], *flags: str) -> tuple[int, str]:
    """`invoke` of one command by itself, with options and their values, and flags."""
    app = typer.Typer(rich_markup_mode="rich")
    app.command()(command)
    return invoke(app, *(word for pair in given.items() for word in pair), *flags)
