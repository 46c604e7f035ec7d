"""Makes reStructuredText of the package's docstrings, which are plain sentences with Google's sections.

A docstring is written to be read by `help()`. Three things in it would be markup:

    the * of shapes, the | of formulas, the _ of names      are escaped, outside of code in backticks
    a block that is indented after an empty line            is kept as it stands: a table, a formula, code
    an example that starts with >>>                         is kept as it stands, its results too

The sections (Args, Returns, Raises) are left to Napoleon, which runs after this. One that says what it has to say on
its own line, as in "Returns: a scalar", becomes a section too.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from sphinx.application import Sphinx

_CODE = re.compile(r"(`+[^`]*`+)")
_SECTION = re.compile(r"(Returns|Raises): (.+)")
_NAMES = re.compile(r"    (\w+, )*\w+,")
_BEFORE_NAPOLEON, _AFTER_NAPOLEON = 400, 600


def escaped(line: str) -> str:
    parts = _CODE.split(line)
    return "".join(part if part.startswith("`") else re.sub(r"([*|_])", r"\\\1", part) for part in parts)


def with_sections(lines: list[str]) -> Iterator[str]:
    """The lines with "Returns: …" as the head of a section and its text below, indented."""
    inside = False
    for line in lines:
        found = _SECTION.fullmatch(line)
        # Napoleon takes what stands before the colon for the error.
        if found and (found[1] == "Returns" or ":" in found[2]):
            inside = True
            yield from (f"{found[1]}:", f"    {found[2]}")
            continue
        inside = inside and bool(line.strip())
        yield f"    {line}" if inside else line


def with_whole_errors(lines: list[str]) -> Iterator[str]:
    """The lines with what follows "Raises:" on one line, of which Napoleon would make an error each."""
    inside: list[str] | None = None
    for line in [*lines, ""]:
        if inside is None:
            yield line
            inside = [] if line == "Raises:" else None
        elif line.strip():
            inside.append(line.strip())
        else:
            yield from ("    " + " ".join(inside), line)
            inside = None


def with_whole_names(lines: list[str]) -> Iterator[str]:
    """The lines with a list of arguments, "a, b,", and its continuation on one line, as Napoleon wants them."""
    names = ""
    for line in lines:
        line = f"{names} {line.strip()}" if names else line
        names = line if _NAMES.fullmatch(line) else ""
        if not names:
            yield line


def converted(lines: list[str]) -> Iterator[str]:
    """The lines of a docstring as reStructuredText, which Napoleon may still turn the sections of."""
    example, verbatim, after_text = False, False, False
    for line in lines:
        if not line.strip():
            example, after_text = False, True
            yield line
            continue
        indented = line.startswith("    ")
        example = example or line.lstrip().startswith(">>>")
        if indented and not verbatim and after_text and not example:
            verbatim = True
            yield from (".. code-block:: text", "")
        verbatim = verbatim and indented
        after_text = False
        yield line if example or verbatim else escaped(line)


def with_an_argument_a_line(lines: list[str], names: list[str]) -> Iterator[str]:
    """The lines with each of the arguments `names` on a line of its own, where one stands behind another."""
    behind = re.compile(rf"(?<=\.) (?=(?:{'|'.join(names)}): )")
    for line in lines:
        if names and line.startswith("    ") and not line.startswith("     "):
            first, *others = behind.split(line)
            yield from (first, *(f"    {other}" for other in others))
        else:
            yield line


def _convert(_app: Sphinx, what: str, _name: str, described: object, _options: object, lines: list[str]) -> None:
    if what == "function" and callable(described):
        lines[:] = with_an_argument_a_line(list(lines), list(inspect.signature(described).parameters))
    for step in (with_whole_names, with_sections, with_whole_errors, converted):
        lines[:] = list(step(lines))


def _properties(_app: Sphinx, what: str, _name: str, described: object, _options: object, lines: list[str]) -> None:
    """Undoes what Napoleon did to a property: it takes what stands before a colon for its type."""
    if what == "property":
        lines[:] = converted([*(inspect.getdoc(described) or "").splitlines(), ""])


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", _convert, priority=_BEFORE_NAPOLEON)
    app.connect("autodoc-process-docstring", _properties, priority=_AFTER_NAPOLEON)
    return {"parallel_read_safe": True}
