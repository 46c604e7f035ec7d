"""What is spread over the processes of a group: columns of logits, tokens of a sequence, samples of a batch.

A row of logits whose columns are spread (tensor parallel) is swept where its columns are. What each process says of
its columns is gathered, a few numbers a row, and merged by each of them in the same order; statistics that need the
softmaxes sweep once more with these, and gather their sums. Then every process knows the row, has the same values, and
can make the gradient of its own columns by itself.

shard.py       which columns are here, and a call as it is seen from here
agreement.py   whether all processes make the same call
statistics.py  the sweeps and what is gathered between them, with autograd
whole.py       whole rows, for backends that cannot share one
source.py      such logits as the source of every loss

Of the tokens of a sequence (context parallel) or a batch (data parallel) sums and counts are exchanged:

sums.py        sums with gradient, and tensors behind each other
ordering.py    the numbers at given places of an order, and the largest
"""

from __future__ import annotations

from kldiv_kernels.parallel.agreement import CHECK_BYTES, agree, agree_in, together
from kldiv_kernels.parallel.ordering import at_positions, largest
from kldiv_kernels.parallel.shard import Group, Shard, all_gather, all_reduce, checked_shard
from kldiv_kernels.parallel.source import SharedLogits, largest_of_shards, logits_or_shared
from kldiv_kernels.parallel.statistics import backward, forward
from kldiv_kernels.parallel.sums import concatenated, group_checked, summed, summed_shares
from kldiv_kernels.parallel.whole import whole

__all__ = [
    "CHECK_BYTES",
    "Group",
    "Shard",
    "SharedLogits",
    "agree",
    "agree_in",
    "all_gather",
    "all_reduce",
    "at_positions",
    "backward",
    "checked_shard",
    "concatenated",
    "forward",
    "group_checked",
    "largest",
    "largest_of_shards",
    "logits_or_shared",
    "summed",
    "summed_shares",
    "together",
    "whole",
]
