"""Builds CUDA sources for the host, on the machine of this folder: an executable, or a library of PyTorch operators.

An object is compiled again only where its source, a header that it read or its flags differ, and what is linked from
the same objects keeps its path: a process that has loaded it is not disturbed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FOLDER = ROOT / "build" / "cuda_host"
MODEL = [HERE / f"{name}.cpp" for name in ("barriers", "copies", "device", "fiber", "machine", "report")]
# PyTorch 2.10, as in setup.py.
TORCH_TARGET = "0x020a000000000000"
JOBS = 2
_KEPT_SECONDS = 3 * 24 * 3600


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def _cxx(*arguments: str | Path) -> None:
    found = compiler()
    if found is None:
        raise RuntimeError("no C++ compiler")
    command = [found, *(str(argument) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    if done.stderr:
        print(done.stderr, file=sys.stderr)


def _digest(parts: Iterable[bytes]) -> str:
    sums = hashlib.sha256()
    for part in parts:
        sums.update(hashlib.sha256(part).digest())
    return sums.hexdigest()[:24]


def _contents(dependencies: Path) -> str | None:
    """The sum of the files that a Makefile rule names behind its colon; None where one of them is gone."""
    names = dependencies.read_text().split(":", 1)[1].replace("\\\n", " ").split()
    try:
        return _digest(Path(name).read_bytes() for name in names)
    except FileNotFoundError:
        return None


def _compile(source: Path, flags: Sequence[str]) -> tuple[Path, str]:
    """The object, and what tells its contents from those of other versions of it."""
    key = _digest([str(source).encode(), "\0".join(flags).encode()])
    found, rule, made_from = (FOLDER / "objects" / f"{key}.{suffix}" for suffix in ("o", "d", "sum"))
    if not (found.exists() and made_from.exists() and made_from.read_text() == _contents(rule)):
        made_from.unlink(missing_ok=True)
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        _cxx(*flags, "-MMD", "-MF", rule, "-c", *language, source, "-o", found)
        made_from.write_text(_contents(rule) or "")
    for path in (found, rule, made_from):
        os.utime(path)
    return found, key + made_from.read_text()


def _forget_old() -> None:
    for path in [*FOLDER.glob("objects/*"), *FOLDER.glob("linked/*/*")]:
        if time.time() - path.stat().st_mtime > _KEPT_SECONDS:
            path.unlink()


def build(
    target: str,
    sources: Iterable[Path | str],
    *,
    sanitize: bool = False,
    torch: bool = False,
    defines: Sequence[str] = (),
    optimise: str = "-O2",
    extra_includes: Sequence[Path | str] = (),
) -> Path:
    """The executable `target`, or the shared library if it ends in ``.so``, from `sources` and the machine.

    `sanitize` adds AddressSanitizer and UndefinedBehaviorSanitizer; a library made so can only be loaded where their
    runtimes are preloaded. `torch` adds PyTorch's headers and libraries. `defines` are ``NAME`` or ``NAME=VALUE``.
    `extra_includes` come before the repository's own: a copy of ``csrc`` may take its place.
    """
    library = target.endswith(".so")
    flags = ["-std=c++17", optimise, "-g1", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"]
    if platform.machine() == "x86_64":
        flags.append("-mfma")
    link: list[str] = []
    if library:
        flags += ["-fPIC", "-fvisibility=hidden"]
        link.append("-shared")
    if sanitize:
        both = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        flags += [*both, "-fno-omit-frame-pointer"]
        link += both
    flags += ["-DKLDIV_CUDA_HOST", *(f"-D{define}" for define in defines)]
    flags += [f"-I{path}" for path in (*extra_includes, HERE, ROOT / "csrc")]
    if torch:
        from torch.utils.cpp_extension import include_paths, library_paths

        flags.append(f"-DTORCH_TARGET_VERSION={TORCH_TARGET}")
        flags += [f"-isystem{path}" for path in include_paths()]
        for path in library_paths():
            link += [f"-L{path}", f"-Wl,-rpath,{path}"]
        link += ["-ltorch", "-ltorch_cpu", "-lc10"]

    (FOLDER / "objects").mkdir(parents=True, exist_ok=True)
    everything = [*(Path(source).resolve() for source in sources), *MODEL]
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _forget_old()
        with ThreadPoolExecutor(JOBS) as pool:
            objects = list(pool.map(lambda source: _compile(source, flags), everything))
        output = FOLDER / "linked" / _digest([target.encode(), repr(link).encode(), repr(objects).encode()]) / target
        if not output.exists():
            output.parent.mkdir(parents=True, exist_ok=True)
            unfinished = output.with_name(target + ".new")
            _cxx(*(path for path, _ in objects), *link, "-o", unfinished)
            unfinished.rename(output)
        os.utime(output)
    return output
