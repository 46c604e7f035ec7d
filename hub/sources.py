"""The package's modules as a kernel has them, under any name: relative imports, and only what a kernel may import."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "kldiv_kernels"
# What a trainer, a command line or another package's code needs; and _ops.py, which is the builder's.
LEFT_OUT = (
    "_ops.py", "adapters", "benchmarking", "cli", "distillation.py", "extras.py", "machine.py", "teacher_cache",
    "trainer",
)  # fmt: skip
# PyTorch, what it installs itself, and Triton. A kernel may have other dependencies only from the Hub's own short list.
ALLOWED = {"torch", "triton", "typing_extensions"}


@functools.cache
def modules() -> dict[Path, str]:
    """The text of each module by its path in the package. ValueError where one imports what is not there."""
    package = ROOT / PACKAGE
    paths = [path.relative_to(package) for path in sorted(package.rglob("*.py"))]
    kept = [path for path in paths if path.parts[0] not in LEFT_OUT]
    texts = {path: (package / path).read_text(encoding="utf-8") for path in kept}
    missing = {_name(path) for path in paths if path not in texts} - {f"{PACKAGE}._ops"}
    for path, text in texts.items():
        for name in _imported(text):
            if name in missing or name.partition(".")[0] not in {PACKAGE, *ALLOWED, *sys.stdlib_module_names}:
                raise ValueError(f"{PACKAGE}/{path} imports {name}, which a kernel does not have (hub/sources.py)")
    return {path: relative(text, len(path.parts) - 1) for path, text in texts.items()}


def relative(text: str, folders: int) -> str:
    """The module's text with relative imports of this package; `folders` is how deep in the package it stands.

    >>> relative("from kldiv_kernels.policy import options", 1)
    'from ..policy import options'
    >>> relative("from kldiv_kernels import nn", 0)
    'from . import nn'
    """
    lines = text.splitlines(keepends=True)
    for node in _imports(text):
        if isinstance(node, ast.Import) and any(alias.name.partition(".")[0] == PACKAGE for alias in node.names):
            raise ValueError(f"line {node.lineno}: `import {PACKAGE}` has no relative form; import names from it")
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == PACKAGE:
            line = lines[node.lineno - 1].encode()
            inside = node.module.removeprefix(PACKAGE).removeprefix(".")
            was, new = f"from {node.module} import", f"from {'.' * (folders + 1)}{inside} import"
            assert line[node.col_offset :].startswith(was.encode()), lines[node.lineno - 1]
            changed = line[: node.col_offset] + new.encode() + line[node.col_offset + len(was) :]
            lines[node.lineno - 1] = changed.decode()
    return "".join(lines)


def _name(path: Path) -> str:
    return ".".join((PACKAGE, *path.with_suffix("").parts)).removesuffix(".__init__")


def _imports(text: str) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node


def _imported(text: str) -> Iterator[str]:
    for node in _imports(text):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            assert node.module is not None
            yield node.module
            # Each may be a module.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
