"""Files that are there whole or not at all, whenever the writer or the machine stops."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, wait for the disk, rename it. `path` then outlives a loss of power.

    What a kill leaves beside it is written over by whoever writes `path` next.
    """
    beside = path.with_name(f".{path.name}.part")
    write(beside)
    _to_disk(beside)
    os.replace(beside, path)
    # The name is in the folder, which has a place of its own on the disk.
    _to_disk(path.parent)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
