"""Files that are there whole or not at all, whenever the writer or the machine stops."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, size: int, write: Callable[[Path], object]) -> None:
    """Let `write` make a file of about `size` bytes beside `path`, wait for the disk, rename it. `path` then outlives a
    loss of power.

    What a kill leaves beside it is written over by whoever writes `path` next. Whatever else goes wrong leaves nothing
    there; where the disk is full, or refuses otherwise, the OSError names the folder and the bytes.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        write(beside)
        _to_disk(beside)
        os.replace(beside, path)
        # The name is in the folder, which has a place of its own on the disk.
        _to_disk(path.parent)
    except Exception as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        code = _code_of(error)
        if code is None:
            raise
        raise OSError(
            code, f"{os.strerror(code)}: {path.name}, {size:,} bytes, cannot be written to {path.parent}, which has "
            f"{shutil.disk_usage(path.parent).free:,} bytes free; none of it is left there"
        ) from error  # fmt: skip


def _code_of(error: Exception) -> int | None:
    """The operating system's number of an error of the disk; safetensors has it in its text alone."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
