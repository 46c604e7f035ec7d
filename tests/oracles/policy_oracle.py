"""The policy losses in float64, sequence by sequence on its valid tokens only: no masks, no NaN to keep out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kldiv_kernels as kk

LOW, HIGH = 0.2, 0.28
Term = Callable[[Tensor, Tensor, Tensor], Tensor]


def _ratio(lp: Tensor, old: Tensor) -> Tensor:
    return (lp - old).exp()


def _clipped(r: Tensor, a: Tensor, low: float = 1 - LOW, high: float = 1 + HIGH) -> Tensor:
    return torch.where(a >= 0, -a * r.clamp(max=high), -a * r.clamp(min=low))


def _two_sided(r: Tensor, a: Tensor, delta: float) -> Tensor:
    capped = r.clamp(max=delta)
    return torch.where(a >= 0, -a * capped.clamp(max=1 + HIGH), -a * torch.max(capped, r.clamp(1 - LOW, 1 + HIGH)))


def _mean(x: Tensor) -> Tensor:
    return x.mean().expand(x.shape)


def _sapo(r: Tensor, a: Tensor, positive: float, negative: float) -> Tensor:
    tau = torch.tensor([positive if x > 0 else negative for x in a.tolist()], dtype=torch.float64)
    return -4 / tau / (1 + (-tau * (r - 1)).exp()) * a


def _vespo(lp: Tensor, old: Tensor, a: Tensor, up: tuple[float, float], down: tuple[float, float]) -> Tensor:
    w = (lp - old).sum().detach().exp()
    phi = torch.stack([w**k * (rate * (1 - w)).exp() for k, rate in (up if x >= 0 else down for x in a.tolist())])
    return -phi * a * lp


def _gmpo(lp: Tensor, old: Tensor, a: Tensor) -> Tensor:
    d = lp - old
    d = torch.where(a > 0, d.clamp(max=HIGH), d.clamp(min=-LOW))
    return -a * d.mean().exp()


def _dppo(lp: Tensor, old: Tensor, a: Tensor, kind: str, low: float, high: float, cap: float = 20.0) -> Tensor:
    now, before = lp.detach().exp(), old.exp()
    distance = (now - before).abs()
    if kind == "kl":
        distance = before * (before / now).log() + (1 - before) * ((1 - before) / (1 - now)).log()
    away = torch.where(a > 0, (now > before) & (distance > high), (now < before) & (distance > low))
    return torch.where(away, 0.0, -_ratio(lp, old).detach().clamp(max=cap) * a * lp)


# Name: (loss type, options, the term of one sequence from log π, log π_old and A of its tokens).
TERMS: dict[str, tuple[str, dict[str, object], Term]] = {
    **{
        name: (name, {"clip_high": HIGH}, lambda lp, old, a: _clipped(_ratio(lp, old), a))
        for name in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
    },
    "absolute clip": (
        "grpo", {"clip_low": 0.7, "clip_high": 1.1, "clip_absolute": True},
        lambda lp, old, a: _clipped(_ratio(lp, old), a, 0.7, 1.1),
    ),
    "dual clip": (
        "grpo", {"clip_high": HIGH, "dual_clip": 1.4},
        lambda lp, old, a: torch.where(
            a < 0, torch.min(_clipped(_ratio(lp, old), a), -1.4 * a), _clipped(_ratio(lp, old), a)
        ),
    ),
    "delta": ("grpo", {"clip_high": HIGH, "delta": 1.4}, lambda lp, old, a: _two_sided(_ratio(lp, old), a, 1.4)),
    "small delta": ("grpo", {"clip_high": HIGH, "delta": 0.9}, lambda lp, old, a: _two_sided(_ratio(lp, old), a, 0.9)),
    "log-ratio clamp": (
        "dapo", {"clip_low": 5.0, "clip_high": 9.0, "log_ratio_clamp": 0.4},
        lambda lp, old, a: -a * (lp - old).clamp(-0.4, 0.4).exp(),
    ),
    "one-sided clamp": (
        "dapo", {"clip_low": 5.0, "clip_high": 9.0, "log_ratio_clamp": (-float("inf"), 0.3)},
        lambda lp, old, a: -a * (lp - old).clamp(max=0.3).exp(),
    ),
    "gspo": ("gspo", {"clip_high": HIGH}, lambda lp, old, a: _clipped(_mean(lp - old).exp(), a)),
    "sequence level": (
        "dapo", {"clip_high": HIGH, "importance_level": "sequence"},
        lambda lp, old, a: _clipped(_mean(lp - old).exp(), a),
    ),
    "sum level": (
        "dapo", {"clip_high": HIGH, "importance_level": "sequence_sum"},
        lambda lp, old, a: _clipped((lp - old).sum().exp().expand(lp.shape), a),
    ),
    "cispo": (
        "cispo", {"clip_high": HIGH}, lambda lp, old, a: -_ratio(lp, old).detach().clamp(1 - LOW, 1 + HIGH) * a * lp,
    ),
    "absolute cispo": (
        "cispo", {"clip_low": 0.0, "clip_high": 1.5, "clip_absolute": True},
        lambda lp, old, a: -_ratio(lp, old).detach().clamp(max=1.5) * a * lp,
    ),
    "sapo": ("sapo", {}, lambda lp, old, a: _sapo(_ratio(lp, old), a, 1.0, 1.05)),
    "sapo temperatures": (
        "sapo", {"sapo_temperatures": (0.7, 2.1)}, lambda lp, old, a: _sapo(_ratio(lp, old), a, 0.7, 2.1),
    ),
    "vespo": ("vespo", {}, lambda lp, old, a: _vespo(lp, old, a, (2, 3), (3, 2))),
    "vespo shapes": (
        "vespo", {"vespo_positive": (1.1, 1.3), "vespo_negative": (0.7, 2.3)},
        lambda lp, old, a: _vespo(lp, old, a, (1.1, 1.3), (0.7, 2.3)),
    ),
    "gmpo": ("gmpo", {"clip_high": HIGH}, _gmpo),
    "reinforce": ("reinforce", {}, lambda lp, old, a: -a * lp),
    "topr": (
        "topr", {},
        lambda lp, old, a: -torch.where(a >= 0, 1.0, (lp - old).sum().exp().detach().clamp(max=1)) * a * lp,
    ),
    "topr as in verl": (
        "topr", {"importance_level": "sequence"},
        lambda lp, old, a: -torch.where(a >= 0, 1.0, _mean(lp - old).exp().detach().clamp(max=1)) * a * lp,
    ),
    "dppo_tv": ("dppo_tv", {"clip_low": 0.01, "clip_high": 0.02},
                lambda lp, old, a: _dppo(lp, old, a, "tv", 0.01, 0.02)),
    "dppo_kl": ("dppo_kl", {"clip_low": 0.003, "clip_high": 0.004},
                lambda lp, old, a: _dppo(lp, old, a, "kl", 0.003, 0.004)),
    "dppo weight": ("dppo_tv", {"delta": 1.1}, lambda lp, old, a: _dppo(lp, old, a, "tv", 0.2, 0.2, 1.1)),
}  # fmt: skip
AGGREGATION = {
    "sapo": "seq-mean-token-mean", "grpo": "seq-mean-token-mean", "gspo": "seq-mean-token-mean",
    "gmpo": "seq-mean-token-mean", "luspo": "seq-mean-token-sum", "dr_grpo": "token-sum",
}  # fmt: skip


def arguments_of(name: str) -> dict[str, Any]:
    """What policy_loss is given for the loss of TERMS of that name."""
    loss_type, options, _ = TERMS[name]
    needs = {"normalizer": 30.0} if loss_type == "dr_grpo" else {}
    return {"loss_type": loss_type, **options, **needs}


def aggregate(sequences: list[Tensor], how: str, normalizer: float | None, count_empty: bool = True) -> Tensor:
    """The scalar of a list of sequences, each the values of its valid tokens."""
    tokens = sum(len(x) for x in sequences)
    counted = len(sequences) if count_empty else sum(len(x) > 0 for x in sequences)
    empty = torch.zeros((), dtype=torch.float64)
    sums, means = ([f(x) if len(x) else empty for x in sequences] for f in (torch.sum, torch.mean))
    total, own = {
        "token-mean": (sums, tokens),
        "token-sum": (sums, 1),
        "seq-mean-token-sum": (sums, counted),
        "seq-mean-token-mean": (means, counted),
    }[how]
    return torch.stack(total).sum() / (normalizer or own)


@dataclass
class Batch:
    """Sequences with different lengths and gaps, one empty; float64."""

    logits: Tensor
    token_ids: Tensor
    advantages: Tensor
    old: Tensor
    reference_logits: Tensor
    sampling: Tensor
    mask: Tensor

    @property
    def reference(self) -> Tensor:
        return self.gathered(self.reference_logits)

    def gathered(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        log_q = (logits / temperature).log_softmax(-1)
        return log_q.gather(-1, self.token_ids[..., None])[..., 0]

    def split(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """For each sequence, each [B, T] tensor at its valid tokens."""
        return [tuple(x[b][self.mask[b]] for x in tensors) for b in range(len(self.mask))]


def batch(spread: float = 0.5, vocab: int = 9) -> Batch:
    shape = (5, 6)
    logits = 1.5 * torch.randn(*shape, vocab, dtype=torch.float64)
    token_ids = torch.randint(vocab, shape)
    mask = torch.rand(shape) < 0.75
    mask[0], mask[3], mask[4, 0], mask[4, 1:] = True, False, True, False
    out = Batch(logits, token_ids, torch.randn(shape).double(), logits, logits, logits, mask)
    now = out.gathered(logits)
    out.old = (now + spread * torch.randn_like(now)).clamp_max(-1e-3)
    out.sampling = out.old + 0.3 * torch.randn_like(now)
    out.reference_logits = logits + 0.7 * torch.randn_like(logits)
    return out


def check(batch: Batch, expected: Tensor, logits: Tensor, out: kk.PolicyLoss, again: Tensor) -> None:
    """Loss and gradient: `expected` is a function of `logits`, `out.loss` of `again`, equal logits."""
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-10, abs=1e-12)
    (wanted,) = torch.autograd.grad(expected, logits)
    (got,) = torch.autograd.grad(out.loss, again)
    assert wanted.abs().max() > 1e-3
    assert torch.allclose(got, wanted, rtol=0, atol=1e-10 * wanted.abs().max())
    assert not got[~batch.mask].any()


def leaves(batch: Batch) -> tuple[Tensor, Tensor]:
    return batch.logits.clone().requires_grad_(), batch.logits.clone().requires_grad_()


def nan_where_masked(batch: Batch, tensor: Tensor) -> Tensor:
    return tensor.masked_fill(~batch.mask, torch.nan)


class NoHostValue(TorchDispatchMode):
    """Fails where a value on the device would be needed on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.name() not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"), func
        return func(*args, **(kwargs or {}))
