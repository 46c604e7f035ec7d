"""The figures that scripts draw: their curves are what the page says of them."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shapes() -> dict[str, Any]:
    pytest.importorskip("matplotlib")
    return runpy.run_path(str(ROOT / "docs/figures/divergence_shapes.py"))


def test_pushes_are_those_of_the_formulas(shapes: dict[str, Any]) -> None:
    """−u·(f'(u) − f'(1))/f''(1) of each generator."""
    u = torch.tensor([1e-3, 0.1, 1.0, 10.0, 1e3], dtype=torch.float64)
    slopes = {
        "forward KL": 1 - 1 / u, "JS": 2 * (2 * u / (1 + u)).log(), "Hellinger": 2 * (1 - u**-0.5),
        "α = 0.3": (1 - u**-0.3) / 0.3, "reverse KL": u.log(),
    }  # fmt: skip
    assert set(slopes) == {shape[0] for shape in shapes["SHAPES"]}
    for name, kind, options, scale in shapes["SHAPES"]:
        got: Tensor = shapes["push"](kind, options, scale, u)
        torch.testing.assert_close(got, -u * slopes[name], rtol=2e-3, atol=1e-6)


def test_forward_kl_covers_both_bumps_and_reverse_kl_picks_one(shapes: dict[str, Any]) -> None:
    x = torch.linspace(-6, 6, 61).double()
    teacher = (0.65 * torch.exp(-0.5 * ((x + 2) / 0.7) ** 2) + 0.35 * torch.exp(-0.5 * ((x - 2) / 0.7) ** 2)).log()
    found = {kind: shapes["fitted"](kind, {}, teacher, x) for kind in ("forward_kl", "reverse_kl")}
    mean = {kind: (q @ x).item() for kind, q in found.items()}
    # Moments match under forward KL.
    assert mean["forward_kl"] == pytest.approx((teacher.softmax(-1) @ x).item(), abs=0.05)
    assert mean["reverse_kl"] == pytest.approx(-2, abs=0.1)


def test_the_figure_is_there(shapes: dict[str, Any]) -> None:
    text = shapes["OUTPUT"].read_text()
    assert all(name in text for name, *_ in shapes["SHAPES"])
