"""Hypothesis strategies for rows as users have them: masks of any value, offsets, peaks, converged students, ties.

randn alone hid a loss of 0.0 for 4.0: no row of it has a stretch of columns far below the others, on one side only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from checks import CUDA_ON_HOST, INTERPRETED
from hypothesis import strategies as st
from torch import Tensor

SLOW = INTERPRETED or CUDA_ON_HOST
# Around the tiles of 2,048 columns of the C++ kernels, and around nothing.
WIDTHS = [2, 3, 17, 64, 300, *([1031] if SLOW else [2047, 2048, 2049, 4096, 8192, 9001])]
# What people write for "not this token", down to what counts as -inf.
MASKS = [-20.0, -1e2, -720.0, -1e3, -1e4, -65504.0, -1e6, -1e9, -1e12, -1e20, -1e29, -1e30, -3.4e38, -torch.inf]
OFFSETS = [0.0, 0.0, 50.0, -50.0, 1e3, 1e4, -1e4]


@dataclass(frozen=True)
class Rows:
    """Logits and reference logits [rows, columns], and columns [rows] that are masked in neither."""

    logits: Tensor
    reference: Tensor
    labels: Tensor


@st.composite
def user_rows(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)) -> Rows:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31), "seed"))
    columns = draw(st.sampled_from(WIDTHS), "columns")

    def normal() -> Tensor:
        return torch.randn(2, columns, generator=generator)

    scale = draw(st.sampled_from([0.0, 0.1, 2.0, 6.0]), "scale")
    logits = scale * normal()
    relation = draw(st.sampled_from(["apart", "near", "equal", "tied"]), "relation")
    reference = {
        "apart": scale * normal(),
        "near": logits + draw(st.sampled_from([1e-3, 1e-2, 0.1]), "distance") * normal(),
        "equal": logits.clone(),
        "tied": (2 * normal()).round(),
    }[relation]
    labels = torch.randint(columns, (2,), generator=generator)
    for side in (logits, reference):
        if draw(st.booleans(), "peaked"):
            at = draw(st.sampled_from([0, columns // 2, columns - 1]), "peak")
            side[:, at] += draw(st.sampled_from([10.0, 30.0, 1000.0]), "height")
        side += draw(st.sampled_from(OFFSETS), "offset")
    for side in draw(st.sampled_from([(), (0,), (1,), (0, 1)]), "masked sides"):
        rows = (logits, reference)[side]
        value = draw(st.sampled_from(MASKS), "mask")
        first = draw(st.sampled_from([0, 1, columns // 3, max(0, columns - 2048)]), "from")
        count = draw(st.sampled_from([1, 2, 10, 2048, columns - 1]), "masked columns")
        hidden = torch.zeros(2, columns, dtype=torch.bool)
        hidden[:, first : first + count] = True
        hidden.scatter_(1, labels[:, None], False)
        rows.masked_fill_(hidden, value)
    dtype = draw(st.sampled_from(dtypes), "dtype")
    # Beyond the dtype's range a mask is -inf, as it is for its user.
    return Rows(logits.to(dtype), reference.to(dtype), labels)
