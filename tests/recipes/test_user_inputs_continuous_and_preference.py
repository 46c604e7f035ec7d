"""What users give to recipes of samples, steps, candidates and pairs: close samples, finite masks, bfloat16, −inf."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from checks import BACKENDS
from recipe_case import gradient_of, logprob
from torch import Tensor
from torch.nn.functional import logsigmoid

import kldiv_kernels as kk
from kldiv_kernels import recipes

LOG_2 = math.log(2)


def trained(x: Tensor) -> tuple[Tensor, Tensor]:
    """x and x in float64, both with gradient."""
    return x.detach().clone().requires_grad_(), x.detach().double().requires_grad_()


def close(got: Tensor, expected: Tensor, relative: float = 2e-6) -> None:
    """Within `relative` of the largest."""
    assert got.isfinite().all()
    assert (got.double() - expected).abs().max() <= relative * expected.abs().max(), f"got {got}, expected {expected}"


def both_close(
    got: Tensor, expected: Tensor, given: tuple[Tensor, Tensor], value: float = 2e-6, gradient: float = 2e-6
) -> None:
    close(got, expected, value)
    expected_gradient = gradient_of(expected, given[1])
    assert expected_gradient.abs().max() > 0
    close(gradient_of(got, given[0]), expected_gradient, gradient)


def excess(a: Tensor, b: Tensor) -> Tensor:
    """The kernel less 1: its digits where samples are close."""
    return torch.expm1(-(a.double()[:, None] - b.double()[None]).square().sum(-1) / 2)


def information(e: Tensor, f: Tensor) -> Tensor:
    """The three logarithms of the docstring, with both kernels as 1 + e and 1 + f."""
    r, s = e.mean(-1), f.mean(-1)
    joint, apart = (e + f + e * f).mean().log1p(), e.mean().log1p() + f.mean().log1p()
    return (joint + apart - 2 * (r + s + r * s).mean().log1p()) / LOG_2


def test_information_of_samples_that_are_close() -> None:
    torch.manual_seed(0)
    small, wide = 0.01 * torch.randn(64, 2), torch.randn(64, 2)
    pixels = torch.rand(64, 48) / 8
    for x, start in (
        (small, 2 * small), (wide, 0.02 * torch.randn(64, 2) + 0.02 * wide), (wide, 100 + 1e-3 * wide),
        (pixels, pixels + torch.rand(64, 48) / 8), (wide, (3 + 0.05 * wide).bfloat16()),
    ):  # fmt: skip
        code = trained(start)
        of_x, of_code = excess(x, x), excess(code[1], code[1])
        shared = information(of_x, of_code)
        accuracy = 1e-2 if start.dtype == torch.bfloat16 else 2e-6
        both_close(recipes.cs_mutual_information(x, code[0], normalize=False), shared, code, gradient=accuracy)
        whole = shared / (information(of_x, of_x) * information(of_code, of_code)).sqrt()
        both_close(recipes.cs_mutual_information(x, code[0]), whole, code, gradient=accuracy)
    found = recipes.cs_bottleneck_loss(small, small, small, 2 * small, beta=1.0)
    assert found.dtype == torch.float32
    close(found, recipes.cs_mutual_information(small, 2 * small).double())


def test_divergence_of_predictions_that_are_far_or_close() -> None:
    prediction = torch.full((4, 1), 20.0, requires_grad=True)
    out = recipes.conditional_cs_divergence(torch.zeros(4, 1), torch.zeros(4, 1), prediction)
    # −2·log₂ e^−200, and its slope by each of four predictions that count alike.
    assert out.item() == pytest.approx(400 / LOG_2)
    torch.testing.assert_close(gradient_of(out, prediction), torch.full((4, 1), 10 / LOG_2))

    torch.manual_seed(0)
    for scale, away in ((1.0, 0.3), (0.01, 0.001), (3.0, 6.0)):
        x, y = scale * torch.randn(16, 3), scale * torch.randn(16, 2)
        moved = trained(y + away * torch.randn(16, 2))
        kernel = 1 + excess(x, x)

        def log_sum(a: Tensor, b: Tensor, kernel: Tensor = kernel) -> Tensor:
            return ((kernel * (1 + excess(a, b))).sum(-1) / kernel.square().sum(-1)).sum().log2()

        wanted = -2 * log_sum(moved[1], y) + log_sum(y, y) + log_sum(moved[1], moved[1])
        both_close(recipes.conditional_cs_divergence(x, y, moved[0]), wanted, moved, 1e-4, 1e-4)


@pytest.mark.parametrize("queries", [3, 7, 300])
def test_queries_that_fit_alike_have_no_advantage(queries: int) -> None:
    zeros = torch.zeros(2, queries)
    for value in (0.1, 1 / 3, 1000.7):
        fit = torch.full((2, queries), value, requires_grad=True)
        out = recipes.grqo_loss(fit, zeros, zeros, reduction="none")
        assert (out == 0).all()
        assert gradient_of(out.mean(), fit).abs().max() < 1e-9
    near = trained(1000 + torch.rand(2, queries))
    weights = torch.rand(2, queries).double()
    wanted = (near[1] - near[1].mean(-1, keepdim=True)) / (near[1].std(-1, keepdim=True) + 2e-9)
    found = -recipes.grqo_loss(near[0], zeros, zeros, alpha=1.0, reduction="none")
    both_close((found * weights).sum(), (wanted * weights).sum(), near)
    close(found, wanted)


def pairs_with_a_forbidden_column() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, reference and labels of two pairs; the policy leaves a column out that the reference does not."""
    torch.manual_seed(0)
    logits, reference = torch.randn(2, 4, 3, 8)
    logits[:, 1, 6] = -torch.inf
    return logits, reference, torch.randint(0, 6, (4, 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_coefficient_of_zero_leaves_an_infinite_divergence_out(backend: kk.choices.Backend) -> None:
    start, reference, labels = pairs_with_a_forbidden_column()
    given = trained(start)
    delta = (logprob(given[1], labels) - logprob(reference.double(), labels)).sum(-1)
    wanted = -logsigmoid(0.1 * (delta[:2] - delta[2:])).mean()
    zeros, ones = torch.zeros(4, 3, requires_grad=True), torch.ones(4, 3)
    weights = torch.ones(4, 3)
    weights[:, 1] = 0
    phrases = torch.ones(4, 3, dtype=torch.int64)
    both_close(recipes.tdpo_loss(given[0], reference, labels, alpha=0.0, backend=backend), wanted, given)
    both_close(recipes.rrpo_loss(given[0], reference, labels, phrases, alpha=0.0, backend=backend), wanted, given)
    # Where it is not 0 an infinite divergence stays infinite.
    assert recipes.rrpo_loss(given[0], reference, labels, phrases, backend=backend) == torch.inf

    def sparse(ratio_weights: Tensor, kl_weights: Tensor, labels: Tensor = labels) -> Tensor:
        return recipes.sparsepo_loss(
            given[0], reference, labels, ratio_weights, kl_weights, ratio_l1=0.0, kl_l1=0.0, backend=backend
        )

    without = sparse(ones, zeros)
    both_close(without, wanted, given)
    assert gradient_of(without, zeros).isfinite().all()
    # A weight of 0 that is trained has the gradient of a finite divergence.
    assert (gradient_of(without, zeros)[:, ::2] != 0).all()
    p = reference.double().log_softmax(-1)
    kl = (p.exp() * (p - given[1].log_softmax(-1)))[:, ::2].sum((-1, -2))
    each = delta + kl
    both_close(sparse(ones, weights), -logsigmoid(0.1 * (each[:2] - each[2:])).mean(), given)
    # A sampled token without probability, at a weight of 0.
    forbidden = labels.clone()
    forbidden[:, 1] = 6
    apart = (logprob(given[1], labels) - logprob(reference.double(), labels))[:, ::2].sum(-1)
    both_close(sparse(weights, zeros, forbidden), -logsigmoid(0.1 * (apart[:2] - apart[2:])).mean(), given)

    policy = reference.clone().requires_grad_()
    roots: tuple[Literal["batch", "token", "none"], ...] = ("batch", "token", "none")
    for root in roots:
        out = recipes.chi2_penalty(policy, start, coef=0.0, root=root, backend=backend)
        assert out == 0
        assert (gradient_of(out, policy) == 0).all()
        assert recipes.chi2_penalty(policy, start, coef=0.1, root=root, backend=backend) == torch.inf


STEPS, MEANS = torch.tensor([-1.0, -2.0, -0.5]), torch.rand(3, 2)


@pytest.mark.parametrize("wrong", [torch.ones(3, 1), torch.ones(1), torch.ones(1, 3)])
def test_a_scale_that_broadcasting_would_take(wrong: Tensor) -> None:
    shape = rf"\[{', '.join(map(str, wrong.shape))}\]; expected \[3\] like logprobs"
    given = (STEPS, STEPS, torch.ones(3), MEANS, 2 * MEANS)
    with pytest.raises(ValueError, match=f"sigma has shape {shape}"):
        recipes.gaussian_grpo_loss(*given, kl_coef=1.0, sigma=wrong)
    with pytest.raises(ValueError, match=f"sigma has shape {shape}"):
        recipes.grpo_guard_loss(*given, step_size=0.5, sigma=wrong)
    with pytest.raises(ValueError, match=f"step_size has shape {shape}"):
        recipes.grpo_guard_loss(*given, step_size=wrong, sigma=1.0)
    with pytest.raises(ValueError, match=f"scale has shape {shape}"):
        recipes.centred_log_ratio(STEPS, STEPS, MEANS, MEANS, wrong)
    number = recipes.grpo_guard_loss(*given, step_size=torch.tensor(0.5), sigma=torch.tensor(2.0))
    assert torch.equal(number, recipes.grpo_guard_loss(*given, step_size=0.5, sigma=torch.full((3,), 2.0)))


def test_means_that_broadcasting_would_take() -> None:
    for wrong in (MEANS[:1], STEPS, torch.ones(2, 3)):
        with pytest.raises(ValueError, match=r"means has shape \[.*\]; expected \[3\], like logprobs, and a step"):
            recipes.gaussian_grpo_loss(STEPS, STEPS, torch.ones(3), wrong, wrong, kl_coef=1.0)
    for other in (MEANS[:1], MEANS[:, :1], STEPS):
        with pytest.raises(ValueError, match=r"reference_means has shape \[.*\]; expected \[3, 2\] like means"):
            recipes.gaussian_grpo_loss(STEPS, STEPS, torch.ones(3), MEANS, other, kl_coef=1.0)
        with pytest.raises(ValueError, match=r"old_means has shape \[.*\]; expected \[3, 2\] like means"):
            recipes.centred_log_ratio(STEPS, STEPS, MEANS, other, 1.0)


def candidates_loss(rows: Tensor, old: Tensor, advantages: Tensor, temperature: float) -> Tensor:
    """The definition, in float64, over the classes that have a logit."""
    rows, old, a = rows / temperature, old.double() / temperature, advantages.double()
    kept = rows > -1e30
    apart = torch.where(kept, rows - old, 0.0)
    ratio = (apart - rows.logsumexp(-1, keepdim=True) + old.logsumexp(-1, keepdim=True)).exp()
    objective = torch.minimum(a * ratio, a * ratio.clamp(0.8, 1.2))
    objective = torch.where(a < 0, torch.maximum(objective, 3 * a), objective)
    return -objective[kept].mean()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("out", [-1e4, -1e8, -1e12, -3e38, -torch.inf])
def test_candidates_that_both_policies_all_but_leave_out(backend: kk.choices.Backend, out: float) -> None:
    torch.manual_seed(0)
    rows, moved, advantages = torch.randn(3, 32, 16)
    for temperature, offset, dtype in itertools.product((1.0, 0.7), (0.0, 300.0), (torch.float32, torch.bfloat16)):
        given, old = ((x + offset).to(dtype) for x in (3 * rows, 3 * rows + 0.3 * moved + 7))
        given[:, 6:], old[:, 6:] = out, out
        logits = trained(given)
        found = recipes.categorical_ppo_loss(
            logits[0], advantages, old_logits=old, temperature=temperature, backend=backend
        )
        wanted = candidates_loss(logits[1], old, advantages, temperature)
        both_close(found.loss, wanted, logits, 1e-5, 1e-5 if dtype == torch.float32 else 1e-2)


def test_candidates_that_one_policy_leaves_out() -> None:
    """The ratio is 0 where the policy does, infinite where the old one does; the other classes' gradients hold."""
    rows = torch.tensor([[1.0, 0.5, -torch.inf, 0.3]], requires_grad=True)
    old = torch.tensor([[0.9, 0.6, 0.2, -torch.inf]])
    out = recipes.categorical_ppo_loss(rows, torch.tensor([[1.0, 1.0, 1.0, 1.0]]), old_logits=old, clip=0.5)
    ratio = rows.detach().softmax(-1) / old.softmax(-1)
    close(out.per_token_loss, -ratio.clamp_max(1.5).double())
    assert gradient_of(out.loss, rows).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_before_it_is_subtracted(dtype: torch.dtype) -> None:
    """Values and gradients are those of the same numbers in float32."""
    torch.manual_seed(0)
    ell, reference, target = (x.to(dtype) for x in -torch.randn(3, 4, 12).mul(1.5).exp())
    preference, mask = torch.rand(4), torch.rand(4, 12) > 0.2

    def alike(function: Callable[..., Tensor], *given: Tensor) -> None:
        first = [given[0].clone().requires_grad_(), given[0].float().requires_grad_()]
        half = function(first[0], *given[1:])
        single = function(first[1], *(x.float() if x.dtype == dtype else x for x in given[1:]))
        close(half, single.double(), 1e-6)
        close(gradient_of(half, first[0]), gradient_of(single, first[1]).double(), 5e-3)

    def mirror(ell: Tensor, reference: Tensor, target: Tensor) -> Tensor:
        return recipes.mirror_prox_loss(ell, reference, target, preference, beta=0.1, eta=0.5, mask=mask)

    def hypo(ell: Tensor, reference: Tensor) -> Tensor:
        pair = torch.zeros(2, 1, 4)
        return recipes.hypo_loss(pair, pair, torch.tensor([[0], [1]]), ell, reference, kl_coef=1.0, online_mask=mask)

    def gaussian(ell: Tensor, old: Tensor, means: Tensor, reference_means: Tensor, sigma: Tensor) -> Tensor:
        ones = torch.ones(4, 12)
        return recipes.gaussian_grpo_loss(ell, old, ones, means, reference_means, clip=1.0, kl_coef=1.0, sigma=sigma)

    def guard(ell: Tensor, old: Tensor, means: Tensor, old_means: Tensor, sigma: Tensor) -> Tensor:
        ones = torch.ones(4, 12)
        return recipes.grpo_guard_loss(ell, old, ones, means, old_means, step_size=sigma, sigma=sigma, clip=1.0)

    def hinge(real: Tensor, fake: Tensor) -> Tensor:
        return recipes.hinge_discriminator_loss(real, fake)

    means, old_means = (x.to(dtype) for x in torch.randn(2, 4, 12, 5))
    sigma = (0.5 + torch.rand(4, 12)).to(dtype)
    alike(mirror, ell, reference, target)
    alike(hypo, ell, reference)
    near, old = (x / 16 for x in (ell, reference))
    alike(gaussian, near, old, means, old_means, sigma)
    alike(guard, near, old, means, old_means, sigma)
    alike(hinge, near, old)

    logits, teacher = torch.randn(2, 4, 12, 8)
    labels = torch.randint(0, 8, (4, 12))
    power = torch.tensor([0.0, 0.1, 0.7, 1.0]).to(dtype)
    kinds: tuple[Literal["full", "f3", "f3_is"], ...] = ("full", "f3", "f3_is")
    for kl in kinds:
        found, wanted = (
            recipes.rapo_loss(
                logits, teacher, labels, torch.ones(4), phi, old_logprobs=torch.full((4, 12), -2.0), kl_coef=1.0,
                entropy_coef=0.0, kl=kl,
            ).loss
            for phi in (power, power.float())
        )  # fmt: skip
        close(found, wanted.double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_states_that_the_policy_alone_visits(dtype: torch.dtype) -> None:
    """e^d is beyond float16 from d = 11.1 on, and beyond float32 from 88.7 on."""
    for far in (12.0, 100.0):
        scores = torch.tensor([0.0, 1.0, far], dtype=dtype)
        excess = torch.expm1(scores.double())
        found = recipes.occupancy_reward_penalty(scores, coef=0.5)
        assert found.dtype == torch.float32
        close(found, 0.5 * excess / excess.mean().sqrt())
    scores = torch.tensor([0.003, 1.0, 12.0], dtype=dtype)
    close(recipes.occupancy_reward_penalty(scores, coef=0.5, kind="chi2"), 0.5 * torch.expm1(scores.double()))
    close(recipes.occupancy_reward_penalty(scores, coef=0.3, kind="kl"), 0.3 * scores.double())


def test_a_clip_of_a_few_millionths() -> None:
    """What is clipped is told by the log-ratio, of which a float32 ratio near 1 has 5 bits."""
    zeros, ones = torch.zeros(400), torch.ones(400)
    log_ratio = torch.linspace(-4e-6, 4e-6, 400)
    means = torch.zeros(400, 2)

    def surrogate(log_ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
        ratio = log_ratio.exp()
        return -torch.minimum(advantages * ratio, advantages * ratio.clamp(1 - clip, 1 + clip)).mean()

    for advantages in (ones, -ones):
        guard, gaussian = trained(log_ratio), trained(log_ratio)
        found = recipes.grpo_guard_loss(guard[0], zeros, advantages, means, means, step_size=1.0, sigma=1.0)
        both_close(found, surrogate(guard[1], advantages, 2e-6), guard)
        found = recipes.gaussian_grpo_loss(gaussian[0], zeros, advantages, clip=3e-6)
        both_close(found, surrogate(gaussian[1], advantages, 3e-6), gaussian)
