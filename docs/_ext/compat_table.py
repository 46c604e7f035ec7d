"""The directive `compat-table`: docs/compat.json, which `make compat` writes. A row a PyTorch, a column a Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from docutils import nodes
from package_tables import table
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

_TABLE = Path(__file__).parents[1] / "compat.json"


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def cells(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows. A pair that was not run is empty."""
    pythons = sorted({_minor(row["python"]) for row in rows})
    torches = sorted({_minor(row["torch"]) for row in rows})
    found = {(_minor(row["torch"]), _minor(row["python"])): f"{row['result']}, {row['date']}" for row in rows}
    header = ["", *(f"Python {major}.{minor}" for major, minor in pythons)]
    return header, [
        [f"PyTorch {torch[0]}.{torch[1]}", *(found.get((torch, python), "") for python in pythons)] for torch in torches
    ]


class CompatTable(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(str(_TABLE))
        return [table(*cells(json.loads(_TABLE.read_text())["rows"]))]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("compat-table", CompatTable)
    return {"parallel_read_safe": True}
