"""What the papers say of TiUE, DINO-R1, CDT, vSAE, CS-IB and factor consistency, as identities; and their ends."""

from __future__ import annotations

import pytest
import torch
from recipe_case import double, gradient_of, same

from kldiv_kernels import recipes

generator = torch.Generator().manual_seed(0)
X, Y, CODE = (torch.randn(8, width, dtype=torch.float64, generator=generator) for width in (3, 2, 4))


def test_the_standard_normal_has_no_kl() -> None:
    noise = torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    out = recipes.moment_kl(noise)
    assert out == 0
    assert (gradient_of(out, noise) == 0).all()
    zeros = torch.zeros(2, 3, 4)
    assert (recipes.posterior_kl(zeros, zeros) == 0).all()
    assert recipes.moment_kl(torch.ones(1, 4)).isinf().all()


def test_beyond_its_bounds_a_log_variance_is_at_them_without_a_gradient() -> None:
    log_variance = double(25.0, -40.0, 1.0)[None].requires_grad_()
    out = recipes.posterior_kl(torch.zeros(1, 3), log_variance)
    same(out, recipes.posterior_kl(torch.zeros(1, 3), double(20.0, -30.0, 1.0)[None]))
    assert gradient_of(out, log_variance).eq(0).tolist() == [[True, True, False]]


def test_a_sparse_autoencoder_of_unit_variance_has_half_the_square() -> None:
    out = recipes.vsae_loss(X, X, CODE, kl_coef=2.0)
    same(out, CODE.square().sum(-1).mean())
    same(recipes.vsae_loss(X, X, CODE, torch.zeros_like(CODE), kl_coef=2.0), out)


def test_queries_at_the_frozen_scores_and_away_from_them() -> None:
    s, t, fit = torch.randn(3, 2, 5, dtype=torch.float64, generator=generator)
    s.requires_grad_()
    assert recipes.grqo_loss(fit, s, s, alpha=0.0) == 0
    values = recipes.grqo_loss(fit, s, t, alpha=0.0, beta=1.0, reduction="none")
    assert (values > 0).all()
    x = t.sigmoid() / s.sigmoid()
    same(gradient_of(values.sum(), s), (1 - x) * (1 - s.sigmoid()), 1e-7)
    # The advantages of an image have mean 0 and deviation 1, and do not count shift or scale.
    advantages = -recipes.grqo_loss(fit, s, s, alpha=1.0, reduction="none")
    same(advantages.mean(-1), torch.zeros(2), 1e-8)
    same(advantages.std(-1), torch.ones(2), 1e-8)
    same(-recipes.grqo_loss(3 * fit - 7, s, s, alpha=1.0, reduction="none"), advantages, 1e-7)


@pytest.mark.parametrize("far", [-200.0, 200.0])
def test_queries_with_extreme_scores(far: float) -> None:
    s = torch.tensor([[far, -far]], requires_grad=True)
    fit = torch.ones(1, 2, requires_grad=True)
    out = recipes.grqo_loss(fit, s, -s)
    assert out.isfinite()
    assert gradient_of(out, s).isfinite().all()
    assert (gradient_of(out, fit) == 0).all()


def test_a_perfect_prediction_has_no_divergence_and_every_other_has_one() -> None:
    prediction = Y.clone().requires_grad_()
    out = recipes.conditional_cs_divergence(X, Y, prediction)
    assert out.abs() < 1e-12
    # Of inputs that are all equal the rows weigh alike, and it is the divergence of two sets of samples.
    alike = recipes.conditional_cs_divergence(torch.zeros_like(X), Y, prediction)
    assert gradient_of(alike, prediction).abs().max() < 1e-12
    for scale in (0.1, 0.5):
        moved = Y + scale * torch.randn(8, 2, dtype=torch.float64, generator=generator)
        assert recipes.conditional_cs_divergence(torch.zeros_like(X), Y, moved) > 0
        assert recipes.conditional_cs_divergence(X, Y, moved) > 0
    # Descent on it brings the prediction to the targets.
    prediction = (Y + 0.5).requires_grad_()
    optimizer = torch.optim.Adam([prediction], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        recipes.conditional_cs_divergence(X, Y, prediction).backward()
        optimizer.step()
    assert (prediction - Y).abs().max() < 0.3


def test_the_information_of_a_constant_is_none_and_of_itself_all() -> None:
    assert recipes.cs_mutual_information(X, torch.ones(8, 1), normalize=False).abs() < 1e-12
    same(recipes.cs_mutual_information(X, X), double(1.0)[0])
    same(recipes.cs_mutual_information(X, CODE), recipes.cs_mutual_information(CODE, X))
    assert recipes.cs_mutual_information(X, CODE) > 0
    perfect = recipes.cs_bottleneck_loss(X, Y, Y, CODE, beta=0.5)
    same(perfect, 0.5 * recipes.cs_mutual_information(X, CODE))


def test_a_grid_of_samples_is_seen_as_rows() -> None:
    images = torch.randn(4, 2, 3, generator=generator, dtype=torch.float64)
    same(recipes.cs_mutual_information(images, CODE[:4]), recipes.cs_mutual_information(images.flatten(1), CODE[:4]))
    same(recipes.posterior_kl(images, -images), recipes.posterior_kl(images.flatten(1), -images.flatten(1)))


def test_factors_in_proportion_are_consistent_whatever_their_signs() -> None:
    prior = torch.tensor([[3.0, 0.0, 1.0], [1.0, 1.0, 2.0]], dtype=torch.float64)
    importance = torch.tensor([[-6.0, 0.0, 2.0], [5.0, -5.0, -10.0]], dtype=torch.float64, requires_grad=True)
    out = recipes.factor_consistency_loss(importance, prior)
    assert out.abs() < 1e-12
    assert gradient_of(out, importance).abs().max() < 1e-12
    missing = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    assert recipes.factor_consistency_loss(missing, torch.ones(1, 2).double()).isinf()


def test_what_is_wrong_is_named() -> None:
    two = torch.zeros(2, 2)
    for call, message in (
        (lambda: recipes.moment_kl(torch.zeros(3)), r"moment_kl: x has shape \[3\]"),
        (lambda: recipes.posterior_kl(two, two[:1]), "log_variance has shape"),
        (lambda: recipes.vsae_loss(two, two[:, :1], two, kl_coef=1.0), "reconstruction has shape"),
        (lambda: recipes.grqo_loss(two, two[:1], two), "scores has shape"),
        (lambda: recipes.grqo_loss(two[:, :1], two[:, :1], two[:, :1]), "of two queries or more"),
        (lambda: recipes.grqo_loss(two, two, two, reduction="sum"), "reduction is 'sum'"),  # type: ignore[arg-type]
        (lambda: recipes.conditional_cs_divergence(X, Y, Y[:1]), "prediction has shape"),
        (lambda: recipes.conditional_cs_divergence(X[:1], Y, Y), "x has 1 samples; expected 8 like y"),
        (lambda: recipes.conditional_cs_divergence(X, Y, Y, sigma=0.0), "conditional_cs_divergence: sigma is 0.0"),
        (lambda: recipes.cs_mutual_information(X, CODE[:1]), "code has 1 samples; expected 8"),
        (lambda: recipes.factor_consistency_loss(two, two[0]), "prior has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
