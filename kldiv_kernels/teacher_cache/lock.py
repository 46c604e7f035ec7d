"""Who may write into a cache: one process alone, or several that belong together."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

_LOCK = ".lock"


class Lock:
    """On `folder`, until `close` or the end of the process, however that ends.

    Args:
        shared: with others that ask for the same. Without it, alone.

    Raises BlockingIOError where another writer has one that does not go together with it.
    """

    def __init__(self, folder: Path, *, shared: bool = False) -> None:
        self._folder = folder
        self._descriptor: int | None = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            self._take(fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        except OSError:
            self.close()
            raise

    def share(self) -> None:
        """From here on together with others. A stranger may come in between: BlockingIOError, and nothing is held."""
        self._take(fcntl.LOCK_SH)

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def close(self) -> None:
        """Let go, if it is held still."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _take(self, kind: int) -> None:
        assert self._descriptor is not None
        try:
            fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, f"another writer has the cache in {self._folder} open") from None
