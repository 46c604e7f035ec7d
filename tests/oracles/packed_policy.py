"""A padded batch as packed tokens: the rows behind each other, cut to lengths, with padding at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import policy_oracle as oracle
import torch
from torch import Tensor

import kldiv_kernels as kk

# Of each row of `oracle.batch`, of which row 3 has no valid token: here none at all, or two that are masked.
CUT, MASKED = (6, 6, 6, 0, 1), (6, 6, 6, 2, 1)
PADDING = 3
TENSORS = ("old_logprobs", "reference_logprobs", "sampling_logprobs", "token_weights", "mask")
# All that looks at sequences beside the loss type, and some that does not.
EVERYTHING: dict[str, Any] = {
    "kl_coef": 0.1, "kl_bias_correction": True, "entropy_coef": 0.2, "off_policy_threshold": 0.1,
    "off_policy_min": 0.3, "off_policy_max": 2.5,
}  # fmt: skip


@dataclass
class Packed:
    """places [N] are those in the flat padded batch of each token; padding has any."""

    places: Tensor
    sequence_ids: Tensor
    cu_seqlens: Tensor

    def of(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)[self.places]


def pack(lengths: tuple[int, ...], width: int = 6) -> Packed:
    position = torch.arange(width)
    rows = [position[:n] + width * row for row, n in enumerate(lengths)]
    places = torch.cat([*rows, torch.zeros(PADDING, dtype=torch.int64)])
    ids = torch.cat([torch.full((n,), row) for row, n in enumerate(lengths)] + [torch.full((PADDING,), -1)])
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return Packed(places, ids, bounds.int())


def arguments_of(name: str, aggregation: str, count_empty: bool) -> dict[str, Any]:
    found = EVERYTHING | oracle.arguments_of(name) | {"aggregation": aggregation, "count_empty_sequences": count_empty}
    if found["loss_type"] != "vespo":
        found |= {"off_policy": "sequence_mask" if count_empty else "sequence_truncate"}
    if found["loss_type"] != "gmpo" and not count_empty:
        found |= {"entropy_quantile": 0.6}
    return found


def tensors_of(batch: oracle.Batch) -> dict[str, Tensor]:
    values = (batch.old, batch.reference, batch.sampling, 1 + batch.advantages.abs(), batch.mask)
    return dict(zip(TENSORS, values, strict=True))


def same(got: kk.PolicyLoss, wanted: kk.PolicyLoss, atol: float) -> None:
    assert torch.allclose(got.loss.double(), wanted.loss.double(), rtol=atol, atol=atol)
    assert got.metrics.keys() == wanted.metrics.keys()
    for name, value in wanted.metrics.items():
        assert torch.allclose(got.metrics[name].double(), value.double(), rtol=atol, atol=atol), name
