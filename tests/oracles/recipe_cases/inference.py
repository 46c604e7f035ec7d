"""Papers 38, 67, 88: golden rows, and definitions token by token."""

from __future__ import annotations

import torch
from recipe_case import B, Case, S, T, row
from torch import Tensor


def rows() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    # Sharp and flat ones, so that some contexts confuse and others do not.
    own = randn(3, 4, 30) * torch.tensor([0.3, 1.0, 3.0, 5.0], dtype=torch.float64)[:, None]
    return {"parametric_logits": own, "context_logits": 2 * randn(3, 4, 30), "third": own + randn(3, 4, 30),
            "weight": randn(3, 4)}  # fmt: skip


ALL = rows()
SIDES = {name: ALL[name] for name in ("parametric_logits", "context_logits")}
MODELS = {"logits": ALL["context_logits"], "small_logits": ALL["parametric_logits"], "tuned_logits": ALL["third"]}
GUIDED = {"base": ALL["parametric_logits"], "tuned": ALL["third"]}


def entropy(logprobs: Tensor) -> Tensor:
    p = logprobs.exp()
    return -(p * torch.where(p > 0, logprobs, 0.0)).sum(-1)


def kl(first: Tensor, second: Tensor) -> Tensor:
    return (first.softmax(-1) * (first.log_softmax(-1) - second.log_softmax(-1))).sum(-1)


def gain(parametric_logits: Tensor, context_logits: Tensor) -> Tensor:
    return entropy(parametric_logits.log_softmax(-1)) - entropy(context_logits.log_softmax(-1))


def ck_plug(parametric_logits: Tensor, context_logits: Tensor, alpha: float | None = None, threshold: float = 0.0,
            k: int = 10, relative: float = 0.01, form: str = "paper") -> Tensor:  # fmt: skip
    vocab = parametric_logits.shape[-1]
    out = []
    for own, context in zip(parametric_logits.reshape(-1, vocab), context_logits.reshape(-1, vocab), strict=True):
        kept = torch.zeros(vocab, dtype=torch.bool)
        for side in (own.softmax(-1), context.softmax(-1)):
            kept |= (side >= side.sort(descending=True).values[min(k, vocab) - 1]) | (side >= relative * side.max())
        seen = [torch.where(kept, x, -1e10) if form == "code" else x for x in (own, context)]
        h_p, h_c = (entropy(x.log_softmax(-1)) for x in seen)
        conflict = h_p - h_c < threshold if form == "paper" else h_p - h_c - h_c.abs() < 0
        contrast = context - own
        if alpha is not None or form == "paper":
            a = h_c / (h_p + h_c) if alpha is None else alpha
            mixed = a * own + (1 - a) * contrast
        else:
            n = 1 + (h_c - h_p).abs() / (h_c + h_p)
            mixed = (2 * h_c * own + 2 * h_p * contrast) / (h_c + n * h_p)
        out.append(torch.where(kept, mixed, -torch.inf) if conflict else context)
    return torch.stack(out).reshape(parametric_logits.shape)


def guided(base: Tensor, tuned: Tensor, weight: float | Tensor) -> Tensor:
    w = weight[..., None] if isinstance(weight, Tensor) else weight
    return (1 - w) * base + w * tuned


def fused(logits: Tensor, small_logits: Tensor, tuned_logits: Tensor,
          grid: tuple[float, ...] = tuple(i / 10 for i in range(21))) -> Tensor:  # fmt: skip
    vocab = logits.shape[-1]
    weights, out = [], []
    for large, small, tuned in zip(*(x.reshape(-1, vocab) for x in (logits, small_logits, tuned_logits)), strict=True):
        errors = []
        for a in grid:
            moved = large + a * (tuned - small)
            errors.append((kl(large, moved) - kl(small, tuned)) ** 2 + (kl(moved, large) - kl(tuned, small)) ** 2)
        a = grid[min(range(len(grid)), key=lambda i: errors[i])]
        weights.append(a)
        out.append(large + a * (tuned - small))
    return torch.cat([torch.tensor(weights, dtype=torch.float64), torch.cat(out)])


GOLDEN = {"parametric_logits": row(S), "context_logits": row(T)}
EVERY = {"relative": 0.0}
BOTH = ("parametric_logits", "context_logits")
CASES = [
    Case("guided_logits", GUIDED, {"weight": 1.5}, expected=guided, trained=(), roles=("base", "tuned")),
    Case("guided_logits", GUIDED | {"weight": ALL["weight"]}, expected=guided, trained=(), name="each-its-own"),
    Case("knowledge_gain", SIDES, expected=gain, trained=(), roles=BOTH),
    Case("knowledge_gain", GOLDEN, value=[[-0.2596177070]], trained=(), name="golden"),
    Case("ck_plug_logits", SIDES, EVERY, expected=ck_plug, trained=(), roles=BOTH),
    Case("ck_plug_logits", SIDES, EVERY | {"alpha": 0.7, "threshold": -0.5}, expected=ck_plug, trained=(),
         name="threshold"),
    Case("ck_plug_logits", SIDES, EVERY | {"form": "code"}, expected=ck_plug, trained=(), name="code"),
    Case("ck_plug_logits", SIDES, EVERY | {"form": "code", "alpha": 0.2}, expected=ck_plug, trained=(),
         name="code-alpha"),
    Case("fused_logits", MODELS, expected=fused, trained=(), roles=("small_logits", "tuned_logits")),
    Case("fused_logits", MODELS, {"grid": (1.5, 0.5, 1.0)}, expected=fused, trained=(), name="grid"),
    Case("fused_logits", {"logits": row(B), "small_logits": row(S), "tuned_logits": row(T)},
         value=[1.2, *(b + 1.2 * (t - s) for b, s, t in zip(B, S, T, strict=True))], trained=(), name="golden"),
]  # fmt: skip
