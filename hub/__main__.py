"""Both kernels, and their variants for this machine's CPU: `python -m hub --output build/hub`."""

from __future__ import annotations

import argparse
from pathlib import Path

from hub.layout import COMPILED, TRITON, lay_out
from hub.variant import assemble


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hub", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/hub"), help="default: build/hub")
    parser.add_argument("--owner", help="who uploads it: the repository OWNER/KERNEL goes into build.toml")
    parser.add_argument("--no-variants", action="store_true", help="compile nothing: the sources for kernel-builder")
    options = parser.parse_args()
    for kernel in (COMPILED, TRITON):
        folder = lay_out(kernel, options.output, options.owner)
        print(folder if options.no_variants else assemble(kernel, folder, objects=options.output / "objects"))


if __name__ == "__main__":
    main()
