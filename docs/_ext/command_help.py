"""The directive `command-help`: what `kldiv COMMAND --help` prints, for every command, as the page is built."""

from __future__ import annotations

from collections.abc import Iterator

import click
import typer.main
from click.testing import CliRunner
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from kldiv_kernels.cli import app as commands

_COLUMNS = 88


def _walk(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from _walk(inner, (*path, name))


def help_of(path: tuple[str, ...]) -> str:
    """The text of `kldiv PATH --help`, without colours, at a fixed width."""
    environment = {"COLUMNS": str(_COLUMNS), "TERMINAL_WIDTH": str(_COLUMNS), "NO_COLOR": "1", "TERM": "dumb"}
    result = CliRunner().invoke(
        typer.main.get_command(commands), [*path, "--help"], prog_name="kldiv", env=environment, color=False
    )
    if result.exit_code != 0:
        raise RuntimeError(f"kldiv {' '.join(path)} --help: exit code {result.exit_code}: {result.output}")
    return "\n".join(line.rstrip() for line in result.output.strip("\n").splitlines())


class CommandHelp(SphinxDirective):
    """One section a command; the top is the command line itself."""

    def run(self) -> list[nodes.Node]:
        sections: list[nodes.Node] = []
        for path in _walk(typer.main.get_command(commands), ()):
            title = " ".join(("kldiv", *path))
            section = nodes.section(ids=[title.replace(" ", "-")], names=[title])
            text = help_of(path)
            block = nodes.literal_block(text, text, language="text")
            section += [nodes.title(title, "", nodes.literal(title, title)), block]
            self.state.document.note_explicit_target(section)
            sections.append(section)
        return sections


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}
