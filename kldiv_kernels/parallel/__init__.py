"""Logits whose columns are spread over the processes of a group (tensor parallel).

A row is swept where its columns are. What each process says of its columns is gathered, a few numbers a row, and merged
by each of them in the same order; statistics that need the softmaxes sweep once more with these, and gather their sums.
Then every process knows the row, has the same values, and can make the gradient of its own columns by itself.

shard.py       which columns are here, and a call as it is seen from here
agreement.py   whether all processes make the same call
statistics.py  the sweeps and what is gathered between them, with autograd
whole.py       whole rows, for backends that cannot share one
source.py      such logits as the source of every loss
"""

from __future__ import annotations

from kldiv_kernels.parallel.agreement import CHECK_BYTES, agree, together
from kldiv_kernels.parallel.shard import Group, Shard, all_reduce, checked_shard
from kldiv_kernels.parallel.source import SharedLogits, largest_of_shards, logits_or_shared
from kldiv_kernels.parallel.statistics import backward, forward
from kldiv_kernels.parallel.whole import whole

__all__ = [
    "CHECK_BYTES",
    "Group",
    "Shard",
    "SharedLogits",
    "agree",
    "all_reduce",
    "backward",
    "checked_shard",
    "forward",
    "largest_of_shards",
    "logits_or_shared",
    "together",
    "whole",
]
