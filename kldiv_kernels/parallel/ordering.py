"""Order statistics and the largest of numbers that lie on several ranks, without bringing them together.

A floating-point number is an integer key of the same order, and the key at a rank is found digit by digit, highest
first: each round counts how many keys have which digit, over all ranks. That is an all_reduce of 16 kB a rank and
number asked for, 3 rounds for float32 and 6 for float64, however many numbers there are and however unevenly they lie.
Nothing waits for the device, where gathering would: for the lengths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kldiv_kernels.parallel.shard import Group
from kldiv_kernels.parallel.sums import place_of, summed

_BITS = 11


def at_positions(values: Tensor, mask: Tensor, positions: Tensor, group: Group | None) -> Tensor:
    """[r], the numbers at the positions [r] (from 0) of the ascending order of all ranks' masked-in values.

    values: float32 or float64, mask: bool, of one shape on a rank. NaN is larger than every number. A position beyond
    the last gives a number of no meaning.

    >>> at_positions(torch.tensor([3.0, 9.0, 1.0]), torch.tensor([True, False, True]), torch.tensor([0, 1]), None)
    tensor([1., 3.])
    """
    keys = _keys(values).reshape(-1)
    return _values(_keys_at(keys, mask.reshape(-1), positions, _integers(values.dtype)[1], group), values.dtype)


def largest(values: Tensor, candidates: Tensor, count: Tensor, group: Group | None) -> Tensor:
    """Bool like `values`: the candidates with the `count` largest values over all ranks, or all if they are fewer.

    Of equal ones those of the first ranks count, and on a rank the first. Two small all_reduces beside `_keys_at`'s.

    >>> largest(torch.tensor([3.0, 9.0, 5.0]), torch.tensor([True, False, True]), torch.tensor(1), None)
    tensor([False, False,  True])
    """
    keys, chosen = _keys(values).reshape(-1), candidates.reshape(-1)
    there = summed(chosen.sum(), group)
    wanted = torch.minimum(count, there)
    least = _keys_at(keys, chosen, (there - wanted).reshape(1), _integers(values.dtype)[1], group)
    above, equal = chosen & (keys > least), chosen & (keys == least)
    mine = torch.stack([above.sum(), equal.sum()])
    everyone = mine[None] if group is None else summed(place_of(mine, group), group)
    of_equal = wanted - everyone[:, 0].sum()
    before = everyone[: 0 if group is None else group.rank(), 1].sum()
    first = equal & (before + equal.cumsum(0) <= of_equal)
    return ((above | first) & (wanted > 0)).reshape(values.shape)


def _integers(dtype: torch.dtype) -> tuple[torch.dtype, int]:
    return (torch.int64, 64) if dtype == torch.float64 else (torch.int32, 32)


def _keys(values: Tensor) -> Tensor:
    """int64 in the order of the values. −0 is 0, and every NaN is the same."""
    integers, bits = _integers(values.dtype)
    plain = torch.where(values.isnan(), torch.nan, values.detach() + 0.0).contiguous()
    raw = plain.view(integers).long()
    # Of negative numbers the bits rise as the number falls.
    return torch.where(raw < 0, raw ^ (2 ** (bits - 1) - 1), raw)


def _values(keys: Tensor, dtype: torch.dtype) -> Tensor:
    integers, bits = _integers(dtype)
    return torch.where(keys < 0, keys ^ (2 ** (bits - 1) - 1), keys).to(integers).view(dtype)


def _keys_at(keys: Tensor, mask: Tensor, positions: Tensor, bits: int, group: Group | None) -> Tensor:
    """[r], the keys at the positions [r]: what is known of each is `prefix`, its highest digits."""
    left, prefix = positions.clone(), torch.zeros_like(positions)
    end = bits
    while end > 0:
        shift = max(end - _BITS, 0)
        bins, first = 2 ** (end - shift), end == bits
        digits, inside = keys >> shift, mask.expand(len(positions), -1)
        if first:
            # The highest digit has the sign.
            digits = digits + bins // 2
        else:
            digits, inside = digits & (bins - 1), inside & (keys >> end == prefix[:, None])
        counts = torch.zeros(len(positions), bins, dtype=torch.int64, device=keys.device)
        counts = summed(counts.scatter_add(1, digits.expand(inside.shape), inside.long()), group)
        upto = counts.cumsum(1)
        digit = (upto <= left[:, None]).sum(1, keepdim=True).clamp_max(bins - 1)
        left = left - (upto - counts).gather(1, digit)[:, 0]
        prefix = digit[:, 0] - bins // 2 if first else (prefix << (end - shift)) | digit[:, 0]
        end = shift
    return prefix
