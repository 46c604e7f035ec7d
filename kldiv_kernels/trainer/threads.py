"""How many threads a model of a few million parameters is trained with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_thread() -> Iterator[None]:
    """For models so small that threads which wait for each other cost more than they give, above all on shared cores.

    Measured on two cores of an Intel Xeon that other programs used too (load 7 to 14), one and two threads in turns of
    12 to 40 steps. Medians of the turns, seconds a step of the demo's models:

        teacher   one thread 0.68, 0.94, 1.12   two threads 8.45, 5.49, 6.73
        student   one thread 0.89, 0.83         two threads 8.11, 7.57

    Two threads took 2.4 to 2.6 s of processor time a step, one 0.3 to 0.4: OpenMP's threads spin while they wait, and
    keep the one that they wait for from its core. With OMP_WAIT_POLICY=PASSIVE, which must be set before PyTorch loads,
    two took 1.87 and 1.05 (teacher) and 0.77 (student): no clear gain over one. Steps of `kldiv train grpo` took 0.2 to
    0.4 s with one thread, and 1 to 6 s with two.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
