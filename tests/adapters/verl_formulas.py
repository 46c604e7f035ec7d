"""verl's policy losses, sequence by sequence in float64, and a configuration like verl's."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

LOW, HIGH = 0.15, 0.3
Parts = tuple[Tensor, dict[str, Tensor]]


def config_with(**entries: Any) -> Any:
    """Like verl's dataclasses, with attributes and get."""
    given = {"clip_ratio": 0.2, "clip_ratio_low": LOW, "clip_ratio_high": HIGH, "global_batch_info": {}, **entries}
    given["get"] = lambda name, default=None: given.get(name, default)
    return SimpleNamespace(**given)


def ppo(r: Tensor, a: Tensor, low: float = LOW, high: float = HIGH) -> tuple[Tensor, Tensor]:
    plain, clipped = -a * r, -a * r.clamp(1 - low, 1 + high)
    return torch.max(plain, clipped), clipped > plain


def _vanilla(d: Tensor, lp: Tensor, old: Tensor, a: Tensor) -> Parts:
    loss, clipped = ppo(d.exp(), a)
    dual = (a < 0) & (loss > -1.3 * a)
    loss = torch.where(dual, -1.3 * a, loss)
    return loss, {"pg_clipfrac": clipped, "ppo_kl": -d, "pg_clipfrac_lower": dual}


def _gspo(d: Tensor, lp: Tensor, old: Tensor, a: Tensor) -> Parts:
    s = d.mean().detach().exp() * (lp - lp.detach()).exp()
    loss, clipped = ppo(s, a, LOW / 10, HIGH / 10)
    return loss, {"pg_clipfrac": clipped, "ppo_kl": -d, "pg_clipfrac_lower": 0 * d}


def _sapo(d: Tensor, lp: Tensor, old: Tensor, a: Tensor) -> Parts:
    tau = torch.where(a > 0, 0.8, 1.2)
    loss = -4 / tau / (1 + (-tau * (d.exp() - 1)).exp()) * a
    return loss, {"pg_clipfrac": 0 * d, "ppo_kl": -d, "pg_clipfrac_lower": 0 * d}


def _cispo(d: Tensor, lp: Tensor, old: Tensor, a: Tensor) -> Parts:
    r = d.detach().exp()
    kept = r.clamp(1 - LOW, 1 + HIGH)
    return -kept * a * lp, {"pg_clipfrac": r != kept, "ppo_kl": -d, "pg_clipfrac_lower": 0 * d}


def _geo_mean(d: Tensor, lp: Tensor, old: Tensor, a: Tensor) -> Parts:
    inside = d.clamp(-LOW, HIGH)
    pessimistic = a.sign() * torch.min(a.sign() * d, a.sign() * inside)
    out = inside != d
    loss = (-a.mean() * pessimistic.mean().exp()).expand(d.shape)
    return loss, {"pg_clipfrac": out & (a > 0), "ppo_kl": -d, "pg_clipfrac_lower": out & (a < 0)}


def _dppo(d: Tensor, lp: Tensor, old: Tensor, a: Tensor, kind: str) -> Parts:
    now, before = lp.detach().exp(), old.exp()
    if kind == "tv":
        kept = torch.where(a > 0, now - before <= HIGH / 10, before - now <= LOW / 10)
    else:
        kl = before * (before / now).log() + (1 - before) * ((1 - before) / (1 - now)).log()
        kept = torch.where(a > 0, (kl <= HIGH / 100) | (now <= before), (kl <= LOW / 100) | (now >= before))
    r = d.detach().exp()
    loss = torch.where(kept, -r.clamp(max=1.3) * a * lp, 0.0)
    return loss, {"pg_clipfrac": ~kept, "ppo_kl": -d, "pg_clipfrac_lower": kept & (r > 1.3)}


def _gpg(d: Tensor, lp: Tensor, old: Tensor, a: Tensor) -> Parts:
    return -a * lp, {}


def _dro(d: Tensor, lp: Tensor, old: Tensor, a: Tensor) -> Parts:
    return -a * lp + 0.35 * d**2, {"ppo_kl": -d}


LOSSES: dict[str, tuple[dict[str, Any], Callable[..., Parts]]] = {
    "vanilla": ({"clip_ratio_c": 1.3}, _vanilla),
    "gspo": ({"clip_ratio_low": LOW / 10, "clip_ratio_high": HIGH / 10}, _gspo),
    "sapo": ({"tau_pos": 0.8, "tau_neg": 1.2}, _sapo),
    "cispo": ({}, _cispo),
    "geo_mean": ({}, _geo_mean),
    "dppo_tv": (
        {"clip_ratio_low": LOW / 10, "clip_ratio_high": HIGH / 10, "clip_ratio_c": 1.3},
        lambda *x: _dppo(*x, "tv"),
    ),
    "dppo_kl": (
        {"clip_ratio_low": LOW / 100, "clip_ratio_high": HIGH / 100, "clip_ratio_c": 1.3},
        lambda *x: _dppo(*x, "kl"),
    ),
    "gpg": ({}, _gpg),
    "dro": ({"policy_loss": SimpleNamespace(dro_beta=0.7)}, _dro),
}
