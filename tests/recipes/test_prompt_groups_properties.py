"""What the papers say of DRPO and COPO, as identities; and their ends."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from recipe_case import batch, logprob
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels import recipes

BATCH = batch(sequences=6, seed=13)
IDS, MASK, OLD = BATCH["token_ids"], BATCH["mask"], BATCH["old_logprobs"]
GROUPS = torch.zeros(6, dtype=torch.int64)
REWARDS = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
ANSWERS = torch.tensor([1, 2, 1, 2, 0, 5])
LOCAL, BETWEEN = BATCH["advantages"], BATCH["advantages"].flip(0) - 0.3


def of_scores(**options: Any) -> Tensor:
    """d loss / d S of each answer of one prompt: answers of one token, equally likely ones."""
    logits = BATCH["logits"][:, :1].detach().requires_grad_()
    old = logprob(logits.detach(), IDS[:, :1])
    out = recipes.drpo_loss(logits, IDS[:, :1], REWARDS, GROUPS, old_logprobs=old, **options)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    q = logits.detach().softmax(-1).gather(-1, IDS[:, :1, None])
    return (gradient.gather(-1, IDS[:, :1, None]) / (1 - q)).flatten()


def drpo(logits: Tensor, old: Tensor = OLD, groups: Tensor = GROUPS, **options: Any) -> kk.PolicyLoss:
    return recipes.drpo_loss(logits, IDS, REWARDS, groups, old_logprobs=old, mask=MASK, **options)


def test_drpo_moves_no_prompt_as_a_whole() -> None:
    slopes = of_scores(tau=0.7)
    assert slopes.sum().abs() < 1e-12
    torch.testing.assert_close(slopes[REWARDS > 0].sum().item(), -1.0)


def test_drpo_with_a_small_tau_pushes_the_likeliest_wrong_answer_alone() -> None:
    slopes = of_scores(tau=1e-3)
    first = logprob(BATCH["logits"], IDS)[:, 0].where(REWARDS == 0, -torch.inf).argmax()
    assert slopes[first].item() == pytest.approx(1.0)
    assert slopes[REWARDS == 0].sum().item() == pytest.approx(1.0)


def test_drpo_with_a_large_length_temperature_weighs_correct_answers_alike() -> None:
    logits = BATCH["logits"]
    scores = torch.stack([row[kept].mean() for row, kept in zip(logprob(logits, IDS), MASK, strict=True)])
    wanted = 2.0 * (scores[REWARDS == 0] / 2.0).logsumexp(0) - scores[REWARDS > 0].mean()
    torch.testing.assert_close(drpo(logits, tau=2.0, length_temperature=1e12, beta=0.0).loss, wanted)


@pytest.mark.parametrize("kl_estimator", ["k1", "k3"])
def test_the_trust_region_of_drpo_is_not_felt_at_the_first_step(kl_estimator: Any) -> None:
    logits = BATCH["logits"].clone().requires_grad_()
    inside, without = (
        torch.autograd.grad(drpo(logits, logprob(logits.detach(), IDS), beta=x, kl_estimator=kl_estimator).loss, logits)
        for x in (1e3, 0.0)
    )
    torch.testing.assert_close(inside, without, rtol=0, atol=0)


def test_a_prompt_without_wrong_answers_counts_and_has_no_gradient() -> None:
    logits, groups = BATCH["logits"].clone().requires_grad_(), torch.tensor([0, 0, 0, 0, 0, 8])
    out = drpo(logits, groups=groups, beta=0.0)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    assert gradient[5].abs().max() == 0
    fewer = recipes.drpo_loss(
        logits[:5], IDS[:5], REWARDS[:5], GROUPS[:5], old_logprobs=OLD[:5], mask=MASK[:5], beta=0.0
    )  # fmt: skip
    torch.testing.assert_close(out.loss, fewer.loss / 2)


@pytest.mark.parametrize("far", [-100.0, 100.0])
def test_drpo_far_from_the_policy_that_sampled(far: float) -> None:
    logits = BATCH["logits"].float().requires_grad_()
    for tau in (1e-3, 1e3):
        out = drpo(logits, (OLD - far).float(), tau=tau)
        assert out.loss.isfinite()
        assert torch.autograd.grad(out.loss, logits)[0].isfinite().all()


def copo(logits: Tensor, old: Tensor = OLD, **options: Any) -> kk.PolicyLoss:
    return recipes.copo_loss(
        logits, IDS, LOCAL, BETWEEN, ANSWERS, GROUPS, REWARDS, old_logprobs=old, mask=MASK, **options
    )  # fmt: skip


def test_copo_with_weight_one_is_grpo() -> None:
    logits = BATCH["logits"].clone().requires_grad_()
    out = copo(logits, BATCH["base_logprobs"], midpoint=-1e4, zero_wrong=False)
    grpo = kk.policy_loss(logits, IDS, LOCAL, old_logprobs=BATCH["base_logprobs"], mask=MASK, dual_clip=3.0)
    torch.testing.assert_close(out.loss, grpo.loss)
    torch.testing.assert_close(*(torch.autograd.grad(x.loss, logits)[0] for x in (out, grpo)))
    assert out.metrics["local_weight"] == 1


def test_copo_inside_the_clip_is_ppo_of_the_blend() -> None:
    logits = BATCH["logits"]
    out = copo(logits, clip_low=1.0, clip_high=math.inf, dual_clip=math.inf)
    weight = torch.sigmoid(5 * (recipes.answer_entropy(ANSWERS, GROUPS) - 1)) * (REWARDS != 0)
    blend = kk.policy_loss(
        logits, IDS, weight * LOCAL + (1 - weight) * BETWEEN, old_logprobs=OLD, mask=MASK, clip_low=1.0,
        clip_high=math.inf,
    )  # fmt: skip
    torch.testing.assert_close(out.loss, blend.loss)


def test_copo_takes_nothing_of_a_loss_without_weight() -> None:
    """That of the local advantages is infinite here."""
    logits = torch.zeros(1, 1, 3, requires_grad=True)
    one = torch.zeros(1, dtype=torch.int64)
    out = recipes.copo_loss(
        logits, torch.tensor([[0]]), torch.tensor([-1.0]), torch.tensor([1.0]), one, one, torch.zeros(1),
        old_logprobs=torch.full((1, 1), -200.0), dual_clip=math.inf,
    )  # fmt: skip
    assert out.loss.item() == pytest.approx(-1.2)
    assert (torch.autograd.grad(out.loss, logits)[0] == 0).all()


def test_answer_entropy_is_between_zero_and_the_logarithm_of_the_samples() -> None:
    found = recipes.answer_entropy(torch.tensor([3, 3, 3, -1, 0, 2, 8]), torch.tensor([5, 5, 5, 1, 1, 1, 1]))
    assert found.tolist() == [0.0] * 3 + [2.0] * 4


def test_global_advantages_of_one_prompt_and_of_answers_that_all_differ() -> None:
    assert (recipes.copo_global_advantages(REWARDS, GROUPS) == 0).all()
    groups, unlike = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([1, 2, 3, 4, 5, 5])
    # 1 − λH is 1/n where all n answers differ, and 1 where they agree.
    plain = recipes.copo_global_advantages(torch.tensor([0.5, 0.5, 0.25, 0.25, 1, 1]).double(), groups)
    found = recipes.copo_global_advantages(torch.tensor([1, 1, 0.5, 0.5, 1, 1]).double(), groups, unlike)
    torch.testing.assert_close(found, plain)


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match="drpo_loss: kl_estimator is 'k2'; expected k1 or k3"):
        drpo(BATCH["logits"], kl_estimator="k2")


@pytest.mark.parametrize("name", ["drpo", "copo"])
def test_an_empty_batch(name: str) -> None:
    logits, none = torch.zeros(0, 4, 5), torch.zeros(0, dtype=torch.int64)
    ids, old, floats = torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0, 4), torch.zeros(0)
    if name == "drpo":
        out = recipes.drpo_loss(logits, ids, floats, none, old_logprobs=old)
    else:
        out = recipes.copo_loss(logits, ids, floats, floats, none, none, floats, old_logprobs=old)
    assert out.loss.item() == 0


def test_rewards_that_are_no_numbers_with_a_point() -> None:
    """Their advantages would be rounded to 0."""
    with pytest.raises(TypeError, match=r"rewards is torch\.int64; expected floating point"):
        kk.recipes.copo_global_advantages(torch.tensor([1, 0]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="drpo_loss: tau is 0; expected above 0"):
        kk.recipes.drpo_loss(
            torch.zeros(2, 1, 4), torch.zeros(2, 1, dtype=torch.int64), torch.tensor([1.0, 0.0]), torch.tensor([0, 0]),
            old_logprobs=torch.zeros(2, 1), tau=0,
        )  # fmt: skip
