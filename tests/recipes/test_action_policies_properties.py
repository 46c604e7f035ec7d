"""What the papers say of Adv-GRPO, GRPO-Guard and RIFT, as identities; and their ends."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kldiv_kernels import recipes

LOGPROBS = torch.tensor([-1.0, -2.0, 0.5], dtype=torch.float64)
ADVANTAGES = torch.tensor([1.0, -9.0, 3.0], dtype=torch.float64)
MEANS = torch.tensor([[0.0, 1.0], [2.0, 0.5], [-1.0, 0.0]], dtype=torch.float64)


def test_on_policy_the_loss_is_the_mean_of_the_clipped_advantages() -> None:
    assert recipes.gaussian_grpo_loss(LOGPROBS, LOGPROBS, ADVANTAGES).item() == pytest.approx(1 / 3)


def test_the_same_step_under_the_same_mean_has_the_ratio_one() -> None:
    found = recipes.centred_log_ratio(LOGPROBS, LOGPROBS, MEANS, MEANS, torch.tensor([0.1, 1.0, 7.0]).double())
    assert (found == 0).all()
    out = recipes.grpo_guard_loss(LOGPROBS, LOGPROBS, ADVANTAGES, MEANS, MEANS, step_size=0.25, sigma=2.0)
    assert out.item() == pytest.approx(4 * 5 / 3)


@pytest.mark.parametrize("scale", [0.05, 1.0, 3.0])
def test_the_centred_log_ratio_has_mean_zero_and_one_deviation_at_every_scale(scale: float) -> None:
    """Steps of two dimensions that the old policy samples; the quadrature is exact for squares."""
    points, weights = (torch.from_numpy(x) for x in np.polynomial.hermite_e.hermegauss(4))
    weights = weights / weights.sum()
    old, now = torch.tensor([0.3, -0.2]).double(), torch.tensor([0.7, 0.4]).double()
    x = old + scale * torch.cartesian_prod(points, points)
    chance = torch.cartesian_prod(weights, weights).prod(-1)
    logprobs, old_logprobs = (-((x - mean) ** 2 / (2 * scale**2)).mean(-1) for mean in (now, old))
    found = recipes.centred_log_ratio(logprobs, old_logprobs, now.expand_as(x), old.expand_as(x), scale)
    assert (chance * found).sum().abs() < 1e-12
    deviation = (chance * found.square()).sum().sqrt()
    assert deviation.item() == pytest.approx((now - old).norm().item() / 2)


def test_without_an_effect_of_the_shift_the_means_would_have_no_gradient() -> None:
    means = MEANS.clone().requires_grad_()
    out = recipes.centred_log_ratio(LOGPROBS, LOGPROBS, means, MEANS + 1, 2.0)
    (gradient,) = torch.autograd.grad(out.sum(), means)
    # d/dμ of mean (Δμ)²/(2s²)·s, with Δμ = −1, s = 2 and two dimensions.
    torch.testing.assert_close(gradient, torch.full_like(means, -1 / 4))


def test_candidates_on_policy() -> None:
    """The mean of advantages that are centred: 0, with the gradient of the policy gradient."""
    logits = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[1.0, -0.4, -0.6]], dtype=torch.float64)
    out = recipes.categorical_ppo_loss(logits, advantages, old_logits=logits)
    assert out.loss.item() == pytest.approx(0.0, abs=1e-12)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    torch.testing.assert_close(gradient, -advantages / 3, atol=1e-12, rtol=0)


def test_candidates_beyond_the_dual_clip_have_no_gradient() -> None:
    logits = torch.tensor([[5.0, 0.0]], requires_grad=True)
    advantages, old = torch.tensor([[-1.0, 0.0]]), torch.tensor([[-5.0, 0.0]])
    out = recipes.categorical_ppo_loss(logits, advantages, old_logits=old)
    assert out.loss.item() == pytest.approx(1.5)
    assert (torch.autograd.grad(out.loss, logits)[0] == 0).all()
    plain = recipes.categorical_ppo_loss(logits, advantages, old_logits=old, dual_clip=math.inf)
    ratio = logits.softmax(-1)[0, 0] / old.softmax(-1)[0, 0]
    assert plain.loss.item() == pytest.approx(ratio.item() / 2, rel=1e-5)


def test_a_masked_candidate_is_one_that_there_is_not() -> None:
    logits, advantages, old = torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([True, True, False, True]).expand(2, 4)
    kept = [0, 1, 3]
    out = recipes.categorical_ppo_loss(logits, advantages, old_logits=old, mask=mask)
    fewer = recipes.categorical_ppo_loss(logits[:, kept], advantages[:, kept], old_logits=old[:, kept])
    torch.testing.assert_close(out.loss, fewer.loss)


@pytest.mark.parametrize("far", [-100.0, 100.0])
def test_candidates_far_from_the_old_policy(far: float) -> None:
    logits = torch.tensor([[far, 0.0, 1.0]], requires_grad=True)
    out = recipes.categorical_ppo_loss(logits, torch.tensor([[1.0, -2.0, 1.0]]), old_logits=-logits)
    assert out.loss.isfinite()
    assert torch.autograd.grad(out.loss, logits)[0].isfinite().all()


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match=r"gaussian_grpo_loss: reference_means is None; kl_coef = 0.1 needs both"):
        recipes.gaussian_grpo_loss(LOGPROBS, LOGPROBS, ADVANTAGES, MEANS, kl_coef=0.1)


def test_no_steps() -> None:
    none = torch.zeros(0)
    assert recipes.gaussian_grpo_loss(none, none, none).item() == 0
    assert recipes.hinge_discriminator_loss(none, none).item() == 0


@pytest.mark.parametrize("nothing", [-torch.inf, -1e30, torch.finfo(torch.float32).min])
def test_candidates_that_are_left_out_by_their_logit_are_left_out(nothing: float) -> None:
    torch.manual_seed(0)
    logits, old, advantages = torch.randn(3, 4, 6)
    kept = torch.ones(4, 6, dtype=torch.bool)
    kept[:, 4:] = False
    wanted = recipes.categorical_ppo_loss(logits, advantages, old_logits=old, mask=kept).loss
    found = [x.masked_fill(~kept, nothing) for x in (logits, old)]
    got = recipes.categorical_ppo_loss(found[0], advantages, old_logits=found[1]).loss
    assert torch.equal(got, wanted)
    assert got.abs() > 1e-3
