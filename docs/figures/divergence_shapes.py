"""Draws docs/_static/divergence_shapes.svg, for the guide to divergences: `python docs/figures/divergence_shapes.py`.

The curves are gradients of `kk.divergence_loss`, each divergence scaled so that all have the same curvature at p = q:
what is left to see is their shape.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from torch import Tensor

import kldiv_kernels as kk

OUTPUT = Path(__file__).parents[1] / "_static" / "divergence_shapes.svg"
# Name, kind, options of the kind, and one over its curvature f''(1).
SHAPES = (
    ("forward KL", "forward_kl", {}, 1.0),
    ("JS", "js", {}, 4.0),
    ("Hellinger", "hellinger", {}, 4.0),
    ("α = 0.3", "alpha", {"alpha": 0.3}, 1.0),
    ("reverse KL", "reverse_kl", {}, 1.0),
)
COLOURS = ("#1d4ed8", "#0891b2", "#15803d", "#b45309", "#b91c1c")
_RARE = 1e-7


def push(kind: str, options: dict[str, float], scale: float, ratio: Tensor) -> Tensor:
    """What descent does to the logit of a rare token with q/p = ratio, over its p: −u·(f'(u) − f'(1))."""
    p = torch.full_like(ratio, _RARE)
    q = ratio * p
    teacher, student = (torch.stack([x.log(), torch.log1p(-x)], -1) for x in (p, q))
    student.requires_grad_()
    kk.divergence_loss(student, teacher, kind, reduction="sum", **options).backward()
    assert student.grad is not None
    return -scale * student.grad[:, 0] / p


def fitted(kind: str, options: dict[str, float], teacher: Tensor, x: Tensor) -> Tensor:
    """The best Gaussian over x from several starts, by its probabilities."""
    starts = torch.cartesian_prod(torch.linspace(-4, 4, 5), torch.tensor([-0.3, 0.7])).double()
    mean, log_sigma = (start.clone().requires_grad_() for start in starts.unbind(-1))
    optimizer = torch.optim.Adam([mean, log_sigma], lr=0.06)
    for _ in range(250):
        logits = -0.5 * ((x - mean[:, None]) / log_sigma.exp()[:, None]) ** 2
        losses = kk.divergence_loss(logits, teacher.expand_as(logits), kind, reduction="none", **options)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    return logits[losses.argmin()].softmax(-1).detach()


def draw(path: Path) -> None:
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "shapes", "font.size": 11}):
        figure = Figure(figsize=(12.5, 4), layout="constrained")
        little, much, bumps = figure.subplots(1, 3)
        x = torch.linspace(-6, 6, 241).double()
        teacher = (0.65 * torch.exp(-0.5 * ((x + 2) / 0.7) ** 2) + 0.35 * torch.exp(-0.5 * ((x - 2) / 0.7) ** 2)).log()
        bumps.fill_between(x, teacher.softmax(-1), color="#cbd5e1", label="teacher p")
        for (name, kind, options, scale), colour in zip(SHAPES, COLOURS, strict=True):
            below, above = torch.logspace(-4, 0, 200).double(), torch.logspace(0, 4, 200).double()
            # Dashes, because some of the best Gaussians are nearly the same.
            style: dict[str, Any] = {"color": colour, "linestyle": "--" if name in ("JS", "α = 0.3") else "-"}
            little.plot(below, push(kind, options, scale, below), **style)
            much.plot(above, push(kind, options, scale, above) / above, **style)
            bumps.plot(x, fitted(kind, options, teacher, x), **style, label=name)
        _label(little, "too little: q below p", "push on the logit, over p")
        _label(much, "too much: q above p", "push on the logit, over q")
        bumps.set(title="the best single Gaussian", xlabel="outcome", ylabel="probability")
        figure.legend(loc="outside lower center", ncols=6, frameon=False)
        FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})


def _label(axis: Axes, title: str, pull: str) -> None:
    axis.set(xscale="log", title=title, xlabel="q/p of a token", ylabel=pull)
    axis.axhline(0, color="black", linewidth=0.8)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    draw(parser.parse_args().output)
