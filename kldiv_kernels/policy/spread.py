"""DTensors whose rows are spread over a mesh: a process has some sequences, or a part of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kldiv_kernels.dtensors import Layout, mean_of_rows
from kldiv_kernels.parallel import Group
from kldiv_kernels.policy.options import OPTION_NAMES, looks_at_the_batch, resolve


def of_spread_rows(layout: Layout, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options with which each process has its share of the loss: groups, where they are not given.

    Raises ValueError where nothing says how many tokens or sequences there are, or which processes have them.
    """
    where = layout.where
    options = resolve(where, given["preset"], {name: given[name] for name in OPTION_NAMES})
    if given["cu_seqlens"] is not None:
        raise ValueError(
            f"{where}: cu_seqlens is given, but tokens are spread over the mesh, {layout.placements}; expected "
            f"sequence_ids, which say of each token whose it is"
        )
    # Tokens of packed sequences are wherever they are; the others stand in the second dimension.
    packed = given["sequence_ids"] is not None
    parts = [i for i, dim in layout.rows.items() if packed or dim == 1]
    found: dict[str, Any] = {}
    if parts and given["sequence_group"] is None:
        found["sequence_group"] = _group(layout, parts, "sequence_group")
    if looks_at_the_batch(options) and given["batch_group"] is None:
        found["batch_group"] = _group(layout, list(layout.rows), "batch_group")
    if len(parts) == len(layout.rows):
        return found
    if options.aggregation != "token-sum":
        mean_of_rows(layout, {**given, "reduction": "mean"})
    if options.entropy_coef and options.entropy_aggregation == "token-mean":
        raise ValueError(
            f"{where}: entropy_aggregation is 'token-mean', but rows are spread over the mesh, {layout.placements}, "
            f"and nothing says how many tokens there are; expected 'loss', which divides by the normalizer"
        )
    return found


def _group(layout: Layout, dims: list[int], name: str) -> Group:
    if len(dims) > 1:
        raise ValueError(
            f"{layout.where}: {name} is None, but rows are spread over {len(dims)} dimensions of the mesh, "
            f"{layout.placements}; expected the group of the processes of these dimensions together"
        )
    return layout.mesh.get_group(dims[0])
