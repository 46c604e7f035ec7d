"""What docs/_ext makes of docstrings, of the registry and of the command line, without building the documentation."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("sphinx")
sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "_ext"))

import command_help
import package_tables
import plain_docstrings

import kldiv_kernels as kk
from kldiv_kernels import registry


def test_text_is_escaped_and_code_is_not() -> None:
    assert plain_docstrings.escaped("logits [*, V], |x| of `max_[*]`") == r"logits [\*, V], \|x\| of `max_[*]`"


def test_examples_and_indented_blocks_stay_as_they_are() -> None:
    docstring = [
        "Head, with:", "", "    a_b   [*]", "    c     |x|", "", "Text_.", "", ">>> f(x_y)", "{'x_y': 1}", "", "End_.",
    ]  # fmt: skip
    assert list(plain_docstrings.converted(docstring)) == [
        "Head, with:", "", ".. code-block:: text", "", "    a_b   [*]", "    c     |x|", "", r"Text\_.", "",
        ">>> f(x_y)", "{'x_y': 1}", "", r"End\_.",
    ]  # fmt: skip


def test_sections_are_as_napoleon_wants_them() -> None:
    assert list(plain_docstrings.with_sections(["Returns: a scalar,", "0 without tokens.", "", "Text."])) == [
        "Returns:", "    a scalar,", "    0 without tokens.", "", "Text.",
    ]  # fmt: skip
    assert list(plain_docstrings.with_sections(["Raises: as f."])) == ["Raises: as f."]
    errors = ["Raises:", "    ValueError: one thing", "    or another.", "", "Text."]
    assert list(plain_docstrings.with_whole_errors(errors))[1:3] == ["    ValueError: one thing or another.", ""]
    names = ["Args:", "    a, b,", "        c: see f.", "    d: other."]
    assert list(plain_docstrings.with_whole_names(names)) == ["Args:", "    a, b, c: see f.", "    d: other."]
    beside = ["Args:", "    a: [*]. b: [N]. C: no argument."]
    assert list(plain_docstrings.with_an_argument_a_line(beside, ["a", "b"])) == [
        "Args:", "    a: [*].", "    b: [N]. C: no argument.",
    ]  # fmt: skip


def test_every_divergence_has_a_function() -> None:
    assert package_tables.function_of("js") == "js_divergence"
    functions = [package_tables.function_of(kind) for kind in registry.divergence_names()]
    assert len(set(functions)) == len(functions)
    assert set(functions) <= set(kk.__all__)


def test_help_of_every_command() -> None:
    assert "--beta" in command_help.help_of(("train", "distill"))
    assert max(len(line) for line in command_help.help_of(()).splitlines()) <= 88
