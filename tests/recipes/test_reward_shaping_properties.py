"""Papers 18, 39, 41, 52, 108: what their rewards and advantages must be in the limits and special cases."""

from __future__ import annotations

import math

import pytest
import torch
from recipe_case import batch
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.recipes.reductions import reverse_cumsum

BATCH = batch(sequences=6, seed=2)
MASK, REWARDS = BATCH["mask"], BATCH["rewards"]
SCORES = torch.linspace(-3, 3, 25, dtype=torch.float64)


def shaped(reference: Tensor, kl_coef: float = 0.2, mask: Tensor = MASK) -> Tensor:
    return kk.recipes.kl_shaped_rewards(REWARDS, BATCH["old_logprobs"], reference, mask, kl_coef=kl_coef)


def test_one_reward_model_is_itself() -> None:
    rewards = torch.tensor([[1.0, -2.0]])
    for how in ("mean", "min", "uwo"):
        assert (kk.recipes.ensemble_rewards(rewards, how=how) == rewards[0]).all()


def test_ensemble_limits() -> None:
    rewards = torch.tensor([[1.0, -2.0], [3.0, 0.0]])
    mean = kk.recipes.ensemble_rewards(rewards)
    assert (kk.recipes.ensemble_rewards(rewards, how="uwo", variance_coef=0.0) == mean).all()
    assert (kk.recipes.ensemble_rewards(rewards, how="min") <= mean).all()


def test_reward_at_the_last_token_alone() -> None:
    """At the reference, and with κ = 0: no shaping; every token's return is the reward."""
    for out in (shaped(BATCH["old_logprobs"]), shaped(BATCH["base_logprobs"], kl_coef=0.0)):
        assert ((out != 0).sum(-1) == (REWARDS != 0)).all()
        torch.testing.assert_close(reverse_cumsum(out, MASK)[MASK], REWARDS[:, None].expand(MASK.shape)[MASK])


def test_the_return_is_reward_less_kl() -> None:
    out, kl = shaped(BATCH["base_logprobs"]), (BATCH["old_logprobs"] - BATCH["base_logprobs"]) * MASK
    torch.testing.assert_close(out.sum(-1), REWARDS - 0.2 * kl.sum(-1))


def test_difficulty_bands() -> None:
    """Prompts that are all right or all wrong drop out; the whole band keeps all; both ends belong to it."""
    rewards, groups = torch.tensor([1.0, 1, 0, 0, 1, 0, 0, 0, 0]), torch.tensor([0, 0, 1, 1, 2, 2, 2, 2, 2])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert kk.recipes.difficulty_mask(rewards.to(dtype), groups).tolist() == [False] * 4 + [True] * 5
    assert kk.recipes.difficulty_mask(rewards, groups, low=0.0, high=1.0).all()


def test_learnability_of_a_pass_rate() -> None:
    """KL(π‖π*) of binary rewards is log(1 − p + p·e^{1/β}) − p/β."""
    p, beta = 0.3, 0.5
    start = torch.tensor([[math.log(1 - p), math.log(p)]], dtype=torch.float64)
    optimum = start + torch.tensor([[0.0, 1 / beta]], dtype=torch.float64)
    assert kk.forward_kl(optimum, start).item() == pytest.approx(0.4704586103, abs=1e-9)


def test_calibration_is_uniform_under_the_reference() -> None:
    """Over the reference's own samples: mean ½ with any ties, variance 1/12·(1 − 1/K²) without; monotone maps do not
    change it."""
    reference = torch.tensor([0.3, -1.0, 2.0, 5.0, 0.1], dtype=torch.float64)
    many = reference.expand(5, 5)
    out = kk.recipes.calibrated_rewards(reference, many)
    assert out.mean().item() == pytest.approx(0.5)
    assert out.var(correction=0).item() == pytest.approx((1 - 1 / 25) / 12)
    assert (kk.recipes.calibrated_rewards(reference.exp(), many.exp()) == out).all()
    tied = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    assert kk.recipes.calibrated_rewards(tied, tied.expand(4, 4)).mean().item() == pytest.approx(0.5)


def test_win_transforms() -> None:
    """(e^{tu} − 1)/t goes to u from both sides, and both transforms increase."""
    u = torch.linspace(0, 1, 9, dtype=torch.float64)
    assert (kk.recipes.win_transform(u) == u).all()
    for t in (1e-6, -1e-6):
        near = kk.recipes.win_transform(u, exponent=t)
        torch.testing.assert_close((near - math.copysign(1, t)) / abs(t), u, atol=1e-5, rtol=0)
    for t in (4.0, -4.0):
        assert (kk.recipes.win_transform(u, exponent=t).diff() > 0).all()


def test_mvar_is_negative_and_flat_above() -> None:
    low, high, alpha, beta = -1.0, 1.5, 0.2, 0.9
    out = kk.recipes.mvar_advantages(SCORES, low, high, alpha=alpha, beta=beta)
    assert (out <= 0).all()
    assert (out.diff() >= 0).all()
    assert (out[high <= SCORES] == 0).all()
    middle = kk.recipes.mvar_advantages(SCORES, low, high, alpha=alpha, beta=beta, weight=0.0)
    torch.testing.assert_close(
        middle[low >= SCORES], torch.full_like(SCORES[low >= SCORES], -(high - low) / (beta - alpha))
    )


def test_mvar_of_the_whole_range_is_the_mean_reward() -> None:
    low, high = SCORES.amin(), SCORES.amax()
    out = kk.recipes.mvar_advantages(SCORES, low, high, alpha=0.1, beta=0.9, weight=0.0)
    torch.testing.assert_close(out, (SCORES - high) / 0.8)


def test_numbers_or_tensors_as_quantiles() -> None:
    expected = kk.recipes.mvar_advantages(SCORES, -1.0, 1.0)
    for low, high in ((torch.tensor(-1.0), 1.0), (torch.tensor([-1.0]).double(), torch.tensor([1.0]).double())):
        torch.testing.assert_close(kk.recipes.mvar_advantages(SCORES, low, high), expected)


def test_sum_mean_shares_sum_to_the_paper() -> None:
    rewards = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    uniform = kk.recipes.bundle_advantages(rewards, -1.0, 1.0, credit="uniform")
    shared = kk.recipes.bundle_advantages(rewards, -1.0, 1.0, credit="sum-mean")
    torch.testing.assert_close(shared.sum(1), uniform[:, 0])
    assert not kk.recipes.bundle_advantages(rewards.requires_grad_(), -1.0, 1.0, credit="uniform").requires_grad


def test_errors() -> None:
    rewards = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"ensemble_rewards: how is 'max'; expected mean, min or uwo"):
        kk.recipes.ensemble_rewards(rewards, how="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ensemble_rewards: rewards has shape \[2\]"):
        kk.recipes.ensemble_rewards(rewards[:, 0])
    with pytest.raises(ValueError, match=r"difficulty_mask: low is 0.9, high 0.1"):
        kk.recipes.difficulty_mask(rewards[0], torch.zeros(3).long(), low=0.9, high=0.1)
    with pytest.raises(ValueError, match=r"calibrated_rewards: ties is 'none'; expected half or all"):
        kk.recipes.calibrated_rewards(rewards[0], rewards.T, ties="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"calibrated_rewards: reference_rewards has shape \[3, 0\]"):
        kk.recipes.calibrated_rewards(rewards[0], torch.zeros(3, 0))
    with pytest.raises(ValueError, match=r"win_transform: exponent is 0"):
        kk.recipes.win_transform(rewards, exponent=0)
    with pytest.raises(ValueError, match=r"mvar_advantages: alpha is 0.9, beta 0.2"):
        kk.recipes.mvar_advantages(rewards, 0.0, 1.0, alpha=0.9, beta=0.2)
    with pytest.raises(ValueError, match=r"bundle_advantages: credit is 'half'"):
        kk.recipes.bundle_advantages(rewards[None], 0.0, 1.0, credit="half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"bundle_advantages: rewards has shape \[2, 3\]"):
        kk.recipes.bundle_advantages(rewards, 0.0, 1.0)
