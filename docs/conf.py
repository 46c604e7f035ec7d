"""How the documentation is built: `make docs`, then docs/_build/html/index.html."""

from __future__ import annotations

import sys
from pathlib import Path

from kldiv_kernels.version import __version__

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "kldiv_kernels"
author = "kldiv_kernels contributors"
copyright = "kldiv_kernels contributors"
release = version = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "plain_docstrings",
    "package_tables",
    "benchmark_tables",
    "compat_table",
    "command_help",
]
exclude_patterns = ["_build"]
nitpicky = False

html_theme = "furo"
html_title = "kldiv_kernels"
html_static_path = ["_static"]
html_css_files = ["wide.css"]

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

# What stands in single backticks in a docstring is code.
default_role = "code"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
# A longer signature has one argument a line.
python_maximum_signature_line_length = 72
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
