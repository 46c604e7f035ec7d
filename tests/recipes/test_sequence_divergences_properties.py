"""Papers 8, 11, 25, 32: exact expectations over a small set of texts in place of samples, and the limits."""

from __future__ import annotations

import math

import pytest
import torch
from recipe_case import double, gradient_of, same
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels import recipes

DIVERGENCES = [
    "js",
    "forward_kl",
    "reverse_kl",
    "tvd",
    "forward_chi2",
    "reverse_chi2",
    "alpha",
    "hellinger",
    "jeffreys",
]
# Six texts: the policy, a target that is not normalised, and what samples.
LOGITS, SCORES = double(1.0, 0.2, -0.7, 0.4, -1.5, 0.9), double(-1.0, -2.0, 0.3, -1.2, -0.5, -3.0)
PROPOSAL = double(0.1, -0.4, 0.8, 0.0, -0.2, 0.5).log_softmax(-1)
LOG_Z = SCORES.logsumexp(-1)


def trained(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_the_mean_gradient_over_all_texts_is_that_of_the_divergence(divergence: str, baseline: float) -> None:
    """Each text by its probability under w, as a weight: w(x) times the loss of x alone. js is twice the statistic."""
    s = trained(LOGITS)
    logprobs = s.log_softmax(-1)
    losses = torch.stack([
        recipes.f_dpg_loss(
            logprobs[x : x + 1], SCORES[x : x + 1], LOG_Z, PROPOSAL[x : x + 1], divergence=divergence,  # type: ignore[arg-type]
            baseline=baseline)
        for x in range(6)
    ])  # fmt: skip
    got = gradient_of((PROPOSAL.exp() * losses).sum(), s)
    target = SCORES[None]
    statistic = kk.divergence_loss(s[None], target, divergence)
    same(got, gradient_of(statistic, s) * (2 if divergence == "js" else 1))


def test_guard_of_a_policy_that_is_the_target() -> None:
    """w = π = p: all factors are 1, also of texts whose probabilities float32 does not have."""
    for shift in (0.0, -4000.0):
        logprobs = trained((SCORES - LOG_Z + shift).float())
        loss = recipes.f_dpg_loss(
            logprobs, logprobs.detach(), 0.0, logprobs.detach(), divergence="forward_kl", normalizer=1.0
        )
        same(gradient_of(loss, logprobs), -torch.ones(6))


def test_guard_of_a_text_that_the_policy_has_lost() -> None:
    """Its factor P/(Z·w) is a number, however small π is. One outside of the constraint counts 0 and gets none."""
    logprobs = trained(torch.tensor([-2000.0, -1.0]))
    args = (torch.tensor([-1.0, -torch.inf]), 0.0, torch.tensor([-1.0, -1.0]))
    loss = recipes.f_dpg_loss(logprobs, *args, divergence="forward_kl", normalizer=1.0)
    same(gradient_of(loss, logprobs), torch.tensor([-1.0, 0.0]))
    for divergence in DIVERGENCES:
        loss = recipes.f_dpg_loss(logprobs, *args, divergence=divergence)  # type: ignore[arg-type]
        assert not loss.isnan()


def test_reverse_kl_is_reinforce_with_a_kl_penalty() -> None:
    """P = π₀ e^{r/β}: the reward is r/β − log π/π₀ + log Z − 1."""
    logprobs, reference, r, beta = LOGITS.log_softmax(-1), PROPOSAL, SCORES, 0.5
    got = recipes.f_dpg_rewards(logprobs, reference + r / beta, 0.3, divergence="reverse_kl")
    same(got, r / beta - (logprobs - reference) - 0.3 - 1)


def test_z_over_batches_is_that_of_all() -> None:
    """With uneven batches, one of them empty; its exact value where the texts are drawn by w."""
    log_z, count = torch.tensor(0.0), torch.tensor(0.0)
    for rows in (slice(0, 4), slice(4, 4), slice(4, 6)):
        log_z, count = recipes.running_log_z(SCORES[rows], PROPOSAL[rows], log_z=log_z, count=count)
    whole, total = recipes.running_log_z(SCORES, PROPOSAL, log_z=math.nan)
    same(log_z, whole)
    assert count == total == 6
    same(whole, (SCORES - PROPOSAL).exp().mean().log())
    nothing, _ = recipes.running_log_z(torch.full((2,), -torch.inf), torch.zeros(2))
    assert nothing == -torch.inf


def test_the_kl_of_rejection_sampling() -> None:
    a, allowed = LOGITS.softmax(-1), torch.tensor([True, False, True, True, False, True])
    g = torch.where(allowed, LOGITS, -torch.inf)
    same(recipes.acceptance_kl(a[allowed].sum()), kk.forward_kl(LOGITS[None], g[None]))
    assert recipes.acceptance_kl(0.0) == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_to_the_posterior_is_kl_regularised_rl(dtype: torch.dtype) -> None:
    """∇KL(q‖softmax(t + r/β)) = −(1/β)·∇{E_q[r] − β·KL(q‖p)}, through the package's reverse KL."""
    s, t, r = (x.to(dtype)[None] for x in (LOGITS, SCORES, PROPOSAL))
    s.requires_grad_()
    beta = 0.3
    got = gradient_of(kk.reverse_kl(s, recipes.posterior_logits(t, r, beta=beta)), s)
    gain = (s.softmax(-1) * r).sum() - beta * (s.softmax(-1) * (s.log_softmax(-1) - t.log_softmax(-1))).sum()
    torch.testing.assert_close(got, -gradient_of(gain, s) / beta, rtol=1e-5, atol=1e-6)


def test_a_forbidden_choice() -> None:
    r = torch.tensor([[0.0, -torch.inf, 1.0]])
    assert recipes.posterior_logits(torch.zeros(1, 3), r, beta=0.5).softmax(-1)[0, 1] == 0


@pytest.mark.parametrize("kind", ["total_variation", "hellinger", "chi2", "iq_chi2"])
def test_every_implicit_reward_begins_as_fine_tuning(kind: str) -> None:
    """At the reference the gradient is β times that of the labels' likelihood; total_variation has it everywhere."""
    floor = -0.9 if kind in ("hellinger", "chi2") else None
    s, labels, beta = trained(LOGITS[None].expand(3, 6)), torch.tensor([0, 3, 5]), 0.5
    logprob = kk.selective_log_softmax(s, labels)
    expected = gradient_of(-beta * logprob.mean(), s)
    loss = recipes.implicit_reward_loss(logprob - logprob.detach(), beta=beta, kind=kind, floor=floor)  # type: ignore[arg-type]
    same(gradient_of(loss, s), expected)
    away = recipes.implicit_reward_loss(logprob, beta=beta, kind=kind, floor=floor)  # type: ignore[arg-type]
    assert torch.allclose(gradient_of(away, s), expected) == (kind == "total_variation")


@pytest.mark.parametrize("kind", ["hellinger", "chi2"])
def test_below_the_floor_it_goes_on_straight(kind: str) -> None:
    """No NaN at u ≤ −1, and the slope at the floor everywhere below it, once."""
    x = trained(double(-0.5, -1.0, -3.0, -1e3))
    loss = recipes.implicit_reward_loss(x, kind=kind, floor=-0.5, normalizer=1.0)  # type: ignore[arg-type]
    slope = 4.0 if kind == "hellinger" else math.sqrt(2)
    assert loss.isfinite()
    same(gradient_of(loss, x), double(*[-slope] * 4))


def test_errors() -> None:
    one = SCORES[:1]
    for wrong in (
        lambda: recipes.f_dpg_loss(LOGITS, one, 0.0, LOGITS), lambda: recipes.f_dpg_loss(LOGITS, SCORES, 0.0, one),
        lambda: recipes.f_dpg_loss(LOGITS, SCORES, 0.0, LOGITS, mask=one),
        lambda: recipes.f_dpg_rewards(one, SCORES, 0),
        lambda: recipes.running_log_z(SCORES, one), lambda: recipes.posterior_logits(LOGITS, one, beta=1.0),
        lambda: recipes.implicit_reward_loss(LOGITS, mask=one),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="shape"):
            wrong()
    with pytest.raises(ValueError, match=r"name is 'ks'; expected forward_kl"):
        recipes.f_dpg_rewards(LOGITS, SCORES, 0.0, divergence="ks")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"log_t_clamp is 0"):
        recipes.f_dpg_rewards(LOGITS, SCORES, 0.0, log_t_clamp=0)
    with pytest.raises(ValueError, match=r"posterior_logits: beta is 0"):
        recipes.posterior_logits(LOGITS, SCORES, beta=0)
    for kind, floor, message in (
        ("hellinger", None, "floor is None; hellinger needs"), ("chi2", -1.0, "floor is -1.0; chi2 needs"),
        ("iq_chi2", -0.5, "iq_chi2 has no end"), ("kl", None, "kind is 'kl'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            recipes.implicit_reward_loss(LOGITS, kind=kind, floor=floor)  # type: ignore[arg-type]
