"""The processes of one command, as torchrun and accelerate start them: which one this is, what they tell each other.

Nothing of it is on a device: gloo for what all must agree on, and the launcher's store, in which any rank can count
without waiting for the others.

    one rank refuses an option, in `together`    all end, one tells why
    one rank raises anywhere else                it leaves why in the store; the others end at their next `add`,
                                                 or where a collective breaks off, and tell that
    one rank is killed                           the others end where a collective breaks off
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from kldiv_kernels.trainer.options import require

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

# A rank that ends closes its connections, and the others know at once. This is for one that hangs: longer than a rank
# may wait for the others to load their models, or for the last shard of the slowest.
_PATIENCE = timedelta(hours=2)
_SECONDS_BETWEEN_LOOKS = 0.2
# In the store: why the first rank ended that did.
_ENDED = "ended"


class RankLostError(RuntimeError):
    """Another rank has ended, or does not answer."""


def _told(error: BaseException) -> str:
    if isinstance(error, typer.BadParameter):
        return error.format_message()
    return f"{type(error).__name__}: {error}".removesuffix(": ")


class Ranks:
    """Rank `number` of `count`, and rank `local` of the `local_count` on this machine. One process alone by default."""

    def __init__(
        self, number: int = 0, count: int = 1, local: int = 0, local_count: int = 1, store: Store | None = None,
        group: ProcessGroup | None = None,
    ) -> None:  # fmt: skip
        self.number, self.count, self.local, self.local_count = number, count, local, local_count
        self._store, self._group, self._store_lost = store, group, False
        self._counts: dict[str, int] = {}

    @property
    def main(self) -> bool:
        """Whether this is the one that writes what there is one of, and that prints."""
        return self.number == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is wrong for one rank ends all of them, and is told by one. All ranks come here."""
        wrong: typer.BadParameter | None = None
        try:
            yield
        except typer.BadParameter as error:
            wrong = error
        failed = [number for number, found in enumerate(self.gather(wrong is not None)) if found]
        if failed:
            if wrong is not None and self.number == failed[0]:
                raise wrong
            raise typer.Exit(2)

    def require_same(self, options: dict[str, Any]) -> None:
        """Raises typer.BadParameter, on every rank, unless all have these. All ranks come here.

        Machines are started by a command each.
        """
        given = self.gather(options)
        for number, theirs in enumerate(given):
            for name, value in theirs.items():
                require(
                    value == given[0][name], f"--{name.replace('_', '-')}",
                    f"rank {number} has {value!r}, rank 0 has {given[0][name]!r}; expected the same for all",
                )  # fmt: skip

    @contextmanager
    def one_a_machine_first(self) -> Iterator[None]:
        """The first rank of each machine alone, then its others, which find in a cache what it has made."""
        if self.local > 0:
            self.gather(None)
        try:
            yield
        finally:
            if self.local == 0:
                self.gather(None)

    def gather(self, value: T) -> list[T]:
        """Each rank's `value`, in the order of their numbers. All ranks come here."""
        if self.count == 1:
            return [value]
        import torch.distributed

        found: list[Any] = [None] * self.count
        with self._hearing():
            torch.distributed.all_gather_object(found, value, group=self._group)
        return found

    def add(self, name: str, amount: int) -> int:
        """What all ranks have added under this name so far, this one's `amount` included. Nobody waits.

        Raises RankLostError where a rank has said that it ends.
        """
        if self._store is None:
            self._counts[name] = self._counts.get(name, 0) + amount
            return self._counts[name]
        with self._hearing():
            total: int = self._store.add(name, amount)
        why = self._why_one_ended()
        if why is not None:
            raise RankLostError(why)
        return total

    def dealt(self, items: Sequence[T]) -> Iterator[T]:
        """Of `items`, the same on all ranks, each to the rank that asks first: a slow one gets fewer."""
        while (turn := self.add("dealt", 1)) <= len(items):
            yield items[turn - 1]

    def wait(self, meanwhile: Callable[[], object]) -> None:
        """Until all ranks are here; `meanwhile` is called five times a second."""
        if self.count == 1:
            return
        import torch.distributed

        with self._hearing():
            work = torch.distributed.barrier(group=self._group, async_op=True)
            while not work.is_completed():
                meanwhile()
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            work.wait()

    @contextmanager
    def telling(self) -> Iterator[None]:
        """What ends this rank inside of the block is left for the others, and what ended another is told here."""
        try:
            yield
        except (typer.Exit, RankLostError):
            raise
        except BaseException as error:
            why = self._why_one_ended()
            # The model's own collectives break off too.
            if why is not None and isinstance(error, RuntimeError):
                raise RankLostError(why) from error
            if self._store is not None:
                # Without the rank that has the store nobody can be told.
                with suppress(RuntimeError):
                    self._store.compare_set(_ENDED, "", f"rank {self.number} of {self.count} has ended: {_told(error)}")
            raise

    @contextmanager
    def _hearing(self) -> Iterator[None]:
        try:
            yield
        except RankLostError:
            raise
        # Of gloo, and DistError, which is one.
        except RuntimeError as error:
            raise RankLostError(self._why_one_ended() or self._unreachable) from error

    def _why_one_ended(self) -> str | None:
        """What it has left in the store, or that the store is gone with its process; None where none has ended."""
        if self._store is None:
            return self._unreachable if self._store_lost else None
        try:
            return self._store.get(_ENDED).decode() if self._store.check([_ENDED]) else None
        except RuntimeError:
            # Each time that it is asked again it prints a stack trace.
            self._store, self._store_lost = None, True
            return self._unreachable

    @property
    def _unreachable(self) -> str:
        return f"rank {self.number} of {self.count} cannot reach the others, one of which has ended"


@contextmanager
def launched(*, tensor_parallel: bool = False) -> Iterator[Ranks]:
    """The ranks of the launcher that started this process; one where none did.

    With `tensor_parallel` the ranks' devices get a process group too.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks()
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise typer.BadParameter(
            f"the environment has WORLD_SIZE={count} and no {', '.join(missing)}; expected all or none of them, as "
            "torchrun and accelerate launch set them"
        )
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    local = int(os.environ["LOCAL_RANK"])
    store, number, count = next(rendezvous("env://", timeout=_PATIENCE))
    # Without a name every device has its own backend.
    backend = None if tensor_parallel else "gloo"
    distributed.init_process_group(backend, store=store, rank=number, world_size=count, timeout=_PATIENCE)
    try:
        group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
        ranks = Ranks(number, count, local, int(os.environ.get("LOCAL_WORLD_SIZE", count)), store, group)
        with ranks.telling():
            yield ranks
    finally:
        distributed.destroy_process_group()
