"""DTensors whose rows are spread over a mesh: a process has some sequences, or a part of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kldiv_kernels.dtensors import Layout, mean_of_rows
from kldiv_kernels.policy.options import OPTION_NAMES, resolve


def of_spread_rows(layout: Layout, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options with which each process has its share of the loss; raises where there are none."""
    where = layout.where
    options = resolve(where, given["preset"], {name: given[name] for name in OPTION_NAMES})
    if options.aggregation != "token-sum":
        mean_of_rows(layout, {**given, "reduction": "mean"})
    if options.entropy_coef and options.entropy_aggregation == "token-mean":
        raise ValueError(
            f"{where}: entropy_aggregation is 'token-mean', but rows are spread over the mesh, {layout.placements}, "
            f"and nothing says how many tokens there are; expected 'loss', which divides by the normalizer"
        )
    return {}
