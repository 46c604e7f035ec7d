"""verl's signatures: its policy losses, against their formulas sequence by sequence in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import policy_oracle as oracle
import pytest
import torch
import verl_modules
from torch import Tensor
from verl_formulas import LOSSES, Parts, config_with, ppo

from kldiv_kernels.adapters import verl

MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]


def _aggregated(sequences: list[Tensor], mode: str, info: dict[str, Any], width: int) -> Tensor:
    how = mode.removesuffix("-norm")
    normalizer = {"token-mean": info.get("batch_num_tokens"), "token-sum": None}.get(how, info.get("global_batch_size"))
    total = oracle.aggregate(sequences, how, normalizer, count_empty=False) * info.get("dp_size", 1)
    return total / info.get("loss_scale_factor", width) if mode != how else total


def _check(loss: Tensor, expected: Tensor, ours: Tensor, exact: Tensor, mask: Tensor) -> None:
    assert loss.item() == pytest.approx(expected.item(), rel=1e-7, abs=1e-9)
    (got,), (wanted,) = torch.autograd.grad(loss, ours), torch.autograd.grad(expected, exact)
    assert wanted.abs().max() > 1e-3
    assert torch.allclose(got, wanted, rtol=0, atol=1e-7 * wanted.abs().max().item())
    assert not got[~mask].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", list(LOSSES))
def test_policy_losses(name: str, mode: str, ranks: bool, weighted: bool) -> None:
    entries, term = LOSSES[name]
    batch = oracle.batch()
    now = batch.gathered(batch.logits)
    ours, exact = (now.clone().requires_grad_() for _ in range(2))
    # geo_mean has one advantage a sequence; the others have their own at every token.
    advantages = batch.advantages[:, :1].expand(now.shape) if name == "geo_mean" else batch.advantages
    weights = torch.rand_like(now) + 0.5 if weighted else torch.ones_like(now)
    info = {"dp_size": 2, "batch_num_tokens": 41, "global_batch_size": 9, "loss_scale_factor": 7} if ranks else {}

    losses: list[Tensor] = []
    logged: list[dict[str, Tensor]] = []
    for lp, old, a, w in batch.split(exact, batch.old, advantages, weights):
        if not len(lp):
            losses.append(lp)
            continue
        loss, metrics = term(lp - old, lp, old, a)
        losses.append(loss * (w.log().mean().exp() if name == "geo_mean" else w))
        logged.append(metrics)
    if name == "geo_mean":
        expected = oracle.aggregate(losses, "seq-mean-token-mean", None)
    else:
        used = "seq-mean-token-mean" if name == "sapo" else mode
        expected = _aggregated(losses, used, info, now.shape[1])

    hidden = [oracle.nan_where_masked(batch, x) for x in (batch.old, ours, advantages)]
    got, metrics = verl.POLICY_LOSSES[name](
        *hidden, batch.mask.int(), mode, config_with(global_batch_info=info, **entries), weights if weighted else None
    )
    _check(got, expected, ours, exact, batch.mask)
    means = {
        f"actor/{key}": torch.cat([x[key].double() for x in logged]).mean().item()
        for key in (logged[0] if logged else {})
    }
    assert metrics == pytest.approx(means, rel=1e-6, abs=1e-7)
    assert all(type(x) is float for x in metrics.values())
    if name not in ("gpg", "sapo", "dro"):
        assert metrics["actor/pg_clipfrac"] > 0


def test_gspo_has_the_aggregation_of_the_configuration() -> None:
    """Four tokens in two sequences: verl's trainer passes its configuration's token-mean."""
    old = torch.tensor([[-1.0, -2.0, -3.0]] * 2, dtype=torch.float64)
    new = old + torch.tensor([[0.1, -0.1, 0.05], [0.02, 0.1, -0.3]], dtype=torch.float64)
    advantages, mask = torch.tensor([[1.0] * 3, [-2.0] * 3]).double(), torch.tensor([[1, 1, 1], [1, 0, 0]])
    first, second = -math.exp(0.05 / 3), 2 * math.exp(0.02)
    call = verl.POLICY_LOSSES["gspo"], (old, new, advantages, mask), {"config": config_with()}
    for mode, expected in (("token-mean", (3 * first + second) / 4), ("token-sum", 3 * first + second)):
        assert call[0](*call[1], mode, **call[2])[0].item() == pytest.approx(expected, rel=1e-12)
    assert call[0](*call[1], **call[2])[0].item() == pytest.approx((first + second) / 2, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "value", "slope"),
    [
        ("vanilla", -math.exp(20), 0.0),  # the gradient of a clamp is 0 outside of it
        ("cispo", math.exp(20), -math.exp(20)),  # −r A log π at log π = −1, with the ratio as a constant
        ("gspo", -math.exp(10), 0.0),
    ],
)
def test_log_ratios_beyond_the_clamp(name: str, value: float, slope: float) -> None:
    old, ones = torch.tensor([[-60.0]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    log_prob = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    config = config_with(clip_ratio_low=1.0, clip_ratio_high=math.inf, clip_ratio_c=math.inf)
    loss, _ = verl.POLICY_LOSSES[name](old, log_prob, ones, ones, config=config)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    assert loss.item() == pytest.approx(value, rel=1e-9)
    assert gradient.item() == pytest.approx(slope, rel=1e-9)


def test_clip_cov_and_kl_cov() -> None:
    """Fractions and bounds that leave clip_cov no choice: all candidates, and the largest third for kl_cov."""
    batch = oracle.batch()
    now, mask = batch.gathered(batch.logits), batch.mask
    lp, old, a = now[mask], batch.old[mask], batch.advantages[mask]
    cov = (a - a.mean()) * (lp - lp.mean())
    bounds = cov.quantile(0.3).item(), cov.quantile(0.9).item()
    settings = SimpleNamespace(
        clip_cov_ratio=1.0, clip_cov_lb=bounds[0], clip_cov_ub=bounds[1], kl_cov_ratio=0.34, ppo_kl_coef=0.7
    )
    loss_of: dict[str, Callable[[Tensor], Parts]] = {}

    def clip_cov(x: Tensor) -> Parts:
        loss, clipped = ppo((x - old).exp(), a)
        chosen = ~clipped & (cov > bounds[0]) & (cov < bounds[1])
        assert 0 < chosen.sum() < len(chosen)
        return torch.where(chosen, 0.0, loss), {"pg_clipfrac": chosen, "ppo_kl": old - x}

    def kl_cov(x: Tensor) -> Parts:
        count = int(len(x) * 0.34)
        chosen = torch.zeros_like(x).index_fill(0, cov.topk(count).indices, 1.0)
        return -a * (x - old).exp() + 0.7 * chosen * (x - old).abs(), {"ppo_kl": (x - old).abs()}

    loss_of |= {"clip_cov": clip_cov, "kl_cov": kl_cov}
    for name, definition in loss_of.items():
        ours, exact = (now.clone().requires_grad_() for _ in range(2))
        loss, logged = definition(exact[mask])
        got, metrics = verl.POLICY_LOSSES[name](
            batch.old, ours, batch.advantages, mask, "token-mean", config_with(policy_loss=settings)
        )
        _check(got, loss.mean(), ours, exact, mask)
        assert metrics == pytest.approx({f"actor/{k}": x.double().mean().item() for k, x in logged.items()}, rel=1e-6)


def test_no_valid_token_is_zero() -> None:
    zeros = torch.zeros(2, 3)
    settings = SimpleNamespace(dro_beta=0.5, rollout_correction={"loss_type": "reinforce", "rollout_is": "token"})
    for name, loss in verl.POLICY_LOSSES.items():
        log_prob = torch.full((2, 3), torch.nan, requires_grad=True)
        if name == "bypass_mode":  # verl makes its correction
            verl_modules.verl("verl.trainer.ppo.rollout_corr_helper")
        value, metrics = loss(zeros, log_prob, zeros + 1, zeros, config=config_with(policy_loss=settings))
        (gradient,) = torch.autograd.grad(value, log_prob)
        assert (name, value.item(), gradient.abs().sum().item()) == (name, 0.0, 0.0)
        assert not any(metrics.values())
