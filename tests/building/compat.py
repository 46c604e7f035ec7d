"""One wheel under every Python and PyTorch: `make compat`, or `python tests/building/compat.py [--wheel FILE]`.

For each pair a fresh environment gets PyTorch from the package index, what it needs to be imported, the wheel, and
nothing else: no NumPy, no Triton, no compiler is asked. compat_suite.py runs in it. Results go into docs/compat.json,
which the page on installing shows; a pair that is not run keeps what was seen last.

An environment takes 1.5 GB and goes when its pair is done. PyTorch's wheel for GPUs finds stand-ins for the libraries
of CUDA (standins.py), which are gigabytes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import standins

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TABLE = ROOT / "docs" / "compat.json"
SUITE = HERE / "compat_suite.py"
PYTHONS = ("python3.10", "python3.11", "python3.12", "python3.13", "python3.14")
# The last of each minor version on the package index.
TORCH = ("2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1")
NEEDED = ("filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec", "mpmath", "MarkupSafe")
SUITE_SECONDS = 600


class FailedError(Exception):
    """A pair does not work; its text is the last of what was printed."""


def run(*command: str | Path, seconds: float | None = None, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, check=False, timeout=seconds, cwd=os.sep,
            env={**inherited, **environment},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise FailedError(f"not done after {seconds:.0f} s") from None
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise FailedError(said[-1] if said else f"exit status {done.returncode}")
    return done.stdout


def interpreters(names: list[str]) -> list[str]:
    """Those that are here: a name in PATH may only say that the version is not chosen."""
    found = [path for name in names if (path := shutil.which(name))]
    return [path for path in found if subprocess.run([path, "-c", ""], capture_output=True).returncode == 0]


def environment(python: str, torch: str, wheel: Path, folder: Path) -> Path:
    """The interpreter of a fresh one in `folder`, with PyTorch and the wheel; stand-ins lie beside it."""
    run(python, "-m", "venv", "--without-pip", folder)
    inside = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", inside, "install", "--quiet", "--no-deps", "--no-cache-dir")
    run(*pip, f"torch=={torch}", *NEEDED)
    run(*pip, wheel)
    site = Path(run(inside, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))").strip())
    standins.make(site / "torch" / "lib", folder / "standins")
    return inside


def suite(inside: Path) -> dict[str, Any]:
    """What compat_suite.py says of itself there."""
    try:
        said = run(inside, SUITE, seconds=SUITE_SECONDS, LD_LIBRARY_PATH=str(inside.parents[1] / "standins"))
    except FailedError as error:
        return {"result": f"failed: {error}"}
    return {"result": "passed", **json.loads(said.splitlines()[-1])}


def pair(row: dict[str, Any]) -> list[tuple[int, ...]]:
    """Minor versions of Python and PyTorch: what a row is about."""
    return [tuple(int(part) for part in re.findall(r"\d+", row[name])[:2]) for name in ("python", "torch")]


def kept(table: Path, new: dict[str, Any]) -> None:
    rows = json.loads(table.read_text())["rows"] if table.exists() else []
    rows = sorted([row for row in rows if pair(row) != pair(new)] + [new], key=pair)
    lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    table.write_text(f'{{\n  "suite": "{SUITE.relative_to(ROOT)}",\n  "rows": [\n{lines}\n  ]\n}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help="default: the newest py3-none-manylinux in dist")
    parser.add_argument("--pythons", nargs="+", default=list(PYTHONS), help="names or paths; default: those here")
    parser.add_argument("--torch", nargs="+", default=list(TORCH), help=f"default: {' '.join(TORCH)}")
    parser.add_argument("--output", type=Path, default=TABLE, help="default: docs/compat.json")
    options = parser.parse_args()
    made = sorted((ROOT / "dist").glob("*-py3-none-manylinux*.whl"), key=lambda path: path.stat().st_mtime)
    if options.wheel is None and not made:
        parser.error("there is no py3-none-manylinux wheel in dist; run: make wheel")
    wheel, failed = (options.wheel or made[-1]).resolve(), 0
    for torch in options.torch:
        for python in interpreters(options.pythons):
            version = run(python, "-c", "import platform; print(platform.python_version())").strip()
            row = {"python": version, "torch": torch, "date": datetime.date.today().isoformat(), "wheel": wheel.name}
            with tempfile.TemporaryDirectory() as folder:
                try:
                    inside = environment(python, torch, wheel, Path(folder, "env"))
                except FailedError as error:
                    # Nothing was seen of this pair.
                    print(f"Python {version} with PyTorch {torch} was not installed: {error}", flush=True)
                    failed += 1
                    continue
                row |= suite(inside)
            failed += row["result"] != "passed"
            print(json.dumps(row), flush=True)
            kept(options.output, row)
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
