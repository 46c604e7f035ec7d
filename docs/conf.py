"""How the documentation is built: `make docs`, then docs/_build/html/index.html."""

from __future__ import annotations

import re

from sphinx.application import Sphinx

from kldiv_kernels.version import __version__

project = "kldiv_kernels"
author = "kldiv_kernels contributors"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx_copybutton"]
exclude_patterns = ["_build"]
nitpicky = False

html_theme = "furo"
html_title = "kldiv_kernels"
html_static_path = ["_static"]

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

# Docstrings are plain sentences with Google's sections; what stands in single backticks is code.
default_role = "code"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

_CODE = re.compile(r"(`+[^`]*`+)")


def _escaped(line: str) -> str:
    """The line with the `*` of shapes and the `|` of formulas as themselves, not as markup."""
    if line.lstrip().startswith((">>>", "...")):
        return line
    parts = _CODE.split(line)
    return "".join(part if part.startswith("`") else re.sub(r"([*|_])", r"\\\1", part) for part in parts)


def _plain_docstring(_app: Sphinx, _what: str, _name: str, _object: object, _options: object, lines: list[str]) -> None:
    lines[:] = [_escaped(line) for line in lines]


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", _plain_docstring, priority=400)
