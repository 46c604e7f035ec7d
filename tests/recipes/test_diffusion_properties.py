"""What the papers say of CTRL, f-distill, IPRO and Diff-Instruct*, as identities of exact expectations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from recipe_case import double, gradient_of, same
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from kldiv_kernels import recipes

generator = torch.Generator().manual_seed(0)
DRIFT = torch.randn(3, 4, 2, dtype=torch.float64, generator=generator)


def test_a_path_kl_is_that_of_gaussian_steps() -> None:
    """Euler's steps x + b·dt with noise σ√dt: the sum of their KLs, given the same path."""
    step, sigma = 0.05, double(0.5, 1.0, 2.0, 0.1)
    other = DRIFT + torch.randn(DRIFT.shape, dtype=torch.float64, generator=generator)
    noise = (sigma * math.sqrt(step))[:, None].expand_as(DRIFT)
    wanted = kl_divergence(Normal(DRIFT * step, noise), Normal(other * step, noise)).sum((1, 2)).mean()
    same(recipes.path_kl(DRIFT - other, weights=step / (2 * sigma**2)), wanted)
    velocity = recipes.identity_reward_loss(
        torch.zeros(3).double(), DRIFT, other, step_weights=step / (2 * sigma**2), reward_coef=9.0
    )
    same(velocity, wanted)


def test_equal_networks_have_no_kl_and_without_guidance_only_the_kl_pulls() -> None:
    weights, labels = torch.ones(4).double(), torch.tensor([0, 1, 1])
    assert recipes.path_kl(0 * DRIFT, weights=weights) == 0
    logits = torch.randn(3, 2, dtype=torch.float64, generator=generator).requires_grad_()
    apart = DRIFT.clone().requires_grad_()
    loss = recipes.controlled_diffusion_loss(logits, labels, apart, weights=weights, guidance=0.0, kl_coef=0.5)
    assert (gradient_of(loss, logits) == 0).all()
    same(gradient_of(loss, apart), DRIFT / 3)
    reward = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    out = recipes.identity_reward_loss(reward, DRIFT, DRIFT, step_weights=weights)
    same(out, double(-0.3)[0])


def test_reverse_kl_is_plain_distribution_matching() -> None:
    x, teacher, fake = torch.randn(3, 5, 2, 2, dtype=torch.float64, generator=generator)
    log_ratio = torch.randn(5, dtype=torch.float64, generator=generator)
    for normalize in (True, False):
        x.requires_grad_()
        loss = recipes.f_distill_loss(x, teacher, fake, log_ratio, divergence="reverse_kl", normalize=normalize)
        same(gradient_of(loss, x), (fake - teacher) / x.numel())


@pytest.mark.parametrize("divergence", ["js", "forward_kl", "jeffreys", "softened_reverse_kl", "alpha", "hellinger"])
def test_weights_have_mean_one_and_their_constants_do_not_count(divergence: str) -> None:
    x, log_ratio = torch.zeros(6, 1, dtype=torch.float64, requires_grad=True), torch.linspace(-2, 2.9, 6).double()
    found = []
    for normalize in (True, False):
        loss = recipes.f_distill_loss(
            x, torch.zeros(6, 1), torch.ones(6, 1), log_ratio, divergence=divergence, normalize=normalize
        )
        found.append(gradient_of(loss, x).flatten() * 6)
    same(found[0].mean(), double(1.0)[0])
    same(found[0], found[1] / found[1].mean())
    # The ratio beyond its bounds counts as at them.
    far = recipes.f_distill_loss(x, torch.zeros(6, 1), torch.ones(6, 1), log_ratio + 50, divergence=divergence)
    same(gradient_of(far, x).flatten() * 6, torch.ones(6))


@pytest.mark.parametrize("c", [0.1, 1.0, 30.0])
def test_the_gradient_of_diff_instruct_is_that_of_the_divergence_at_fixed_samples(c: float) -> None:
    """x₀ = θ + z, x_t = x₀ + σε, both normal, so that every score is linear; the reference is N(m, v)."""
    sigma, reference_mean, reference_variance = 0.7, 1.3, 2.5
    points, weights = (torch.from_numpy(x) for x in np.polynomial.hermite_e.hermegauss(40))
    z, eps = torch.cartesian_prod(points, points).unbind(-1)
    chance = torch.cartesian_prod(weights, weights).prod(-1)
    chance = chance / chance.sum()
    theta = double(0.4)[0].requires_grad_()

    def score(x: Tensor, mean: Tensor) -> Tensor:
        return -(x - mean) / (1 + sigma**2)

    def reference(x: Tensor) -> Tensor:
        return -(x - reference_mean) / reference_variance

    x_start = theta + z
    x = x_start + sigma * eps
    frozen = theta.detach()
    loss = recipes.score_divergence_loss(
        score(x, frozen)[:, None], reference(x)[:, None], (-(x - x_start) / sigma**2)[:, None], c=c,
        weight=chance * len(chance),
    )  # fmt: skip
    at = x.detach()
    divergence = (((score(at, theta) - reference(at)) ** 2 + c**2).sqrt() - c) @ chance
    wanted = gradient_of(divergence, theta)
    assert wanted.abs() > 1e-3
    same(gradient_of(loss, theta), wanted, 1e-4 if c < 1 else 1e-8)
    assert loss.abs() < 1e-4


def test_at_the_reference_nothing_pulls_and_far_from_it_the_distance_is_euclidean() -> None:
    score, target, reference = torch.randn(3, 4, 6, dtype=torch.float64, generator=generator)
    assert recipes.score_divergence_loss(score, score, target, c=1.0) == 0
    # c → ∞: d(y) = ‖y‖²/(2c).
    out = recipes.score_divergence_loss(score, reference, target, c=1e6)
    same(out * 1e6, -((score - reference) * (score - target)).sum(-1).mean(), 1e-9)


def test_what_is_wrong_is_named() -> None:
    x, ones = torch.zeros(2, 3), torch.ones(2)
    for call, message in (
        (lambda: recipes.path_kl(DRIFT, weights=ones), r"path_kl: weights has shape \[2\] with drifts \[3, 4, 2\]"),
        (lambda: recipes.controlled_diffusion_loss(x[:1], ones, DRIFT, weights=ones), "class_logits has shape"),
        (lambda: recipes.f_distill_loss(x, x[:1], x, ones), "f_distill_loss: x has shape"),
        (lambda: recipes.f_distill_loss(x, x, x, x), "f_distill_loss: x has shape"),
        (lambda: recipes.f_distill_loss(x, x, x, ones, divergence="tvd"), "divergence is 'tvd'; expected"),
        (lambda: recipes.f_distill_loss(x, x, x, ones, alpha=0.3), "alpha is 0.3 with divergence 'js'"),
        (lambda: recipes.f_distill_loss(x, x, x, ones, ratio_clamp=(2, 1)), "ratio_clamp is"),
        (lambda: recipes.f_distill_loss(x, x, x, ones, weight=x), r"weight has shape \[2, 3\]"),
        (lambda: recipes.identity_reward_loss(ones, DRIFT, DRIFT, step_weights=ones), "reward has shape"),
        (lambda: recipes.score_divergence_loss(x, x[:1], x, c=1.0), "score has shape"),
        (lambda: recipes.score_divergence_loss(x, x, x, c=0.0), "c is 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
