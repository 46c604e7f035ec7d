"""What the papers say of OREAL, TOPR, Clip-Cov and KL-Cov, as identities; and their ends."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from recipe_case import batch, logprob
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels import recipes

BATCH = batch(sequences=6, seed=11)
IDS, MASK, OLD = BATCH["token_ids"], BATCH["mask"], BATCH["old_logprobs"]
GROUPS, TOKENS = torch.tensor([0, 0, 0, 1, 1, 1]), int(BATCH["mask"].sum())
REWARDS = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0, 0.0], dtype=torch.float64)
SCORES = BATCH["teacher_logits"][..., 0]


def trained() -> Tensor:
    return BATCH["logits"].clone().requires_grad_()


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits)[0]


def same(got: kk.PolicyLoss, logits: Tensor, other: kk.PolicyLoss, others: Tensor) -> None:
    torch.testing.assert_close(got.loss, other.loss)
    torch.testing.assert_close(gradient(got.loss, logits), gradient(other.loss, others))


def oreal(logits: Tensor, rewards: Tensor = REWARDS, scores: Tensor = SCORES, **options: Any) -> kk.PolicyLoss:
    return recipes.oreal_loss(logits, IDS, rewards, GROUPS, scores, mask=MASK, **options)


def test_oreal_has_the_gradient_of_the_released_form() -> None:
    """Wrong answers: −e^{ℓ − sg[ℓ]}·A·ω⁻·c/N₋, here as a policy gradient of token weights."""
    logits, others = trained(), trained()
    running = SCORES.where(MASK, 0.0).cumsum(-1) / MASK.cumsum(-1).clamp_min(1)
    advantages = kk.advantages.rloo(REWARDS, GROUPS)[:, None]
    positive, negative = (2 * running.sigmoid() - 1).clamp_min(0), (1 - 2 * running.sigmoid()).clamp_min(0)
    logp, correct = logprob(others, IDS), MASK & (REWARDS > 0)[:, None]
    wrong = MASK & ~correct
    ratio = (logp - logp.detach()).exp()
    released = -(positive * advantages * logp)[correct].mean() - 0.5 * (ratio * advantages * negative)[wrong].mean()
    released = released + 0.01 * kk.policy_loss(
        others, IDS, torch.zeros(6).double(), mask=MASK, reference_logprobs=BATCH["base_logprobs"], kl_coef=1.0,
        aggregation="token-mean",
    ).loss  # fmt: skip
    out = oreal(logits, reference_logprobs=BATCH["base_logprobs"])
    torch.testing.assert_close(gradient(out.loss, logits), gradient(released, others))


def test_oreal_with_weights_of_one_and_no_wrong_answers_is_weighted_fine_tuning() -> None:
    logits, rewards = BATCH["logits"], REWARDS + 0.25
    out = oreal(logits, rewards, torch.full_like(SCORES, 100.0), kl_coef=0.0)
    advantages = kk.advantages.rloo(rewards, GROUPS)[:, None]
    torch.testing.assert_close(out.loss, -(advantages * logprob(logits, IDS))[MASK].mean())


def test_oreal_without_its_negative_part_is_cloning_of_the_correct_answers() -> None:
    logits = BATCH["logits"]
    out = oreal(
        logits, scores=torch.full_like(SCORES, 100.0), kl_coef=0.0, negative_coef=0.0, scale_positive=False
    )  # fmt: skip
    torch.testing.assert_close(out.loss, -logprob(logits, IDS)[MASK & (REWARDS > 0)[:, None]].mean())


@pytest.mark.parametrize("rewards", [torch.ones(6), torch.zeros(6)])
def test_oreal_with_answers_of_one_kind(rewards: Tensor) -> None:
    """No advantage, and no division by their number, 0."""
    assert oreal(BATCH["logits"], rewards.double(), kl_coef=0.0).loss.item() == 0


def test_token_scores_in_half_precision_keep_the_counts() -> None:
    """bfloat16 cannot count beyond 256."""
    size = (2, 515)
    logits, ids = torch.zeros(*size, 3), torch.zeros(size, dtype=torch.int64)
    given = (logits, ids, torch.tensor([1.0, 0.0]), torch.zeros(2, dtype=torch.int64))
    half, single = (
        recipes.oreal_loss(*given, torch.ones(size, dtype=dtype), kl_coef=0.0, scale_positive=False).loss
        for dtype in (torch.bfloat16, torch.float32)
    )
    torch.testing.assert_close(half, single)


@pytest.mark.parametrize("level", ["sequence_sum", "sequence", "token"])
def test_topr_is_reinforce_on_policy_and_where_rewards_are_positive(level: Any) -> None:
    signed = 2 * REWARDS - 1
    for rewards, old in ((signed, logprob(BATCH["logits"], IDS)), (REWARDS, OLD)):
        logits, others = trained(), trained()
        out = recipes.topr_loss(logits, IDS, rewards, old_logprobs=old, level=level, mask=MASK)
        plain = kk.policy_loss(
            others, IDS, rewards, loss_type="reinforce", aggregation="seq-mean-token-mean", mask=MASK
        )  # fmt: skip
        same(out, logits, plain, others)


def test_topr_has_a_gradient_where_ppo_has_none() -> None:
    row, token = torch.tensor([[[2.0, 0.5, -1.0, 0.0]]], requires_grad=True), torch.tensor([[1]])
    old, minus = logprob(row.detach(), token) + 5, torch.tensor([-1.0])
    assert gradient(kk.policy_loss(row, token, minus, old_logprobs=old).loss, row).abs().max() == 0
    found = gradient(recipes.topr_loss(row, token, minus, old_logprobs=old).loss, row)
    plain = gradient(kk.policy_loss(row, token, minus, loss_type="reinforce").loss, row)
    torch.testing.assert_close(found, math.exp(-5) * plain)


def test_topr_with_a_baseline_of_minus_one_keeps_the_positive_answers() -> None:
    logits, signed = trained(), 2 * (REWARDS > 0).double() - 1
    out = recipes.topr_loss(logits, IDS, signed, old_logprobs=OLD, baseline=-1.0, mask=MASK)
    assert ((gradient(out.loss, logits).abs().amax((1, 2)) > 0) == (REWARDS > 0)).all()


def cov(name: str, logits: Tensor, **options: Any) -> kk.PolicyLoss:
    function = getattr(recipes, name)
    out: kk.PolicyLoss = function(logits, IDS, BATCH["advantages"], old_logprobs=OLD, mask=MASK, **options)
    return out


def plain(logits: Tensor, high: float) -> kk.PolicyLoss:
    return kk.policy_loss(
        logits, IDS, BATCH["advantages"], old_logprobs=OLD, mask=MASK, clip_low=1.0, clip_high=high,
        aggregation="token-mean",
    )  # fmt: skip


@pytest.mark.parametrize("fraction", [1e-4, 0.2])
def test_clip_cov_drops_as_many_as_it_says(fraction: float) -> None:
    logits = trained()
    out, everything = cov("clip_cov_loss", logits, fraction=fraction, bounds=(-9.0, 9.0)), plain(logits, 1.0)
    dropped = MASK & (out.per_token_loss != everything.per_token_loss)
    assert dropped.sum() == max(1, int(fraction * TOKENS))
    found = gradient(out.loss, logits)
    assert found[dropped].abs().max() == 0
    torch.testing.assert_close(found[~dropped], gradient(everything.loss, logits)[~dropped])


def test_clip_cov_of_an_empty_band_is_ppo() -> None:
    logits, others = trained(), trained()
    same(cov("clip_cov_loss", logits, bounds=(1e5, 1e6)), logits, plain(others, 1.0), others)


def test_kl_cov_without_its_penalty_is_the_weighted_policy_gradient() -> None:
    logits, others = trained(), trained()
    same(cov("kl_cov_loss", logits, kl_coef=0.0), logits, plain(others, math.inf), others)


@pytest.mark.parametrize("percent", [0.2, 20.0])
def test_kl_cov_chooses_as_many_as_it_says(percent: float) -> None:
    logits = BATCH["logits"]
    out = cov("kl_cov_loss", logits, percent=percent)
    chosen = (out.per_token_loss - plain(logits, math.inf).per_token_loss)[MASK] > 1e-9
    assert chosen.sum() == max(1, int(TOKENS * percent / 100))


def test_kl_cov_has_no_penalty_on_policy() -> None:
    logits = trained()
    old = kk.token_stats(logits.detach(), labels=IDS, stats=("logprob",)).logprob
    out, other = (
        recipes.kl_cov_loss(
            logits, IDS, BATCH["advantages"], old_logprobs=old, mask=MASK, percent=100, kl_coef=coefficient
        )
        for coefficient in (1.0, 0.0)
    )  # fmt: skip
    same(out, logits, other, logits)


def test_entropy_change_is_the_slope_of_the_entropy() -> None:
    """Tokens as often as q has them: the mean over them is that over q."""
    q = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    tokens, step = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 3]]), torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64)
    found = recipes.entropy_change(q.log()[tokens], step[tokens])
    at = torch.zeros((), dtype=torch.float64, requires_grad=True)
    moved = (q.log() + at * step).log_softmax(-1)
    (slope,) = torch.autograd.grad(-(moved.exp() * moved).sum(), at)
    torch.testing.assert_close(found, slope)


@pytest.mark.parametrize("far", [-100.0, 100.0])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_far_from_the_policy_that_sampled(far: float, sign: float) -> None:
    logits, ids, size = torch.randn(2, 3, 5, requires_grad=True), torch.zeros(2, 3, dtype=torch.int64), (2,)
    old = logprob(logits.detach(), ids) - far
    advantages = sign * torch.ones(size)
    for level in ("sequence_sum", "sequence", "token"):
        out = recipes.topr_loss(logits, ids, advantages, old_logprobs=old, level=level)  # type: ignore[arg-type]
        assert out.loss.isfinite()
        assert gradient(out.loss, logits).isfinite().all()
    for function in (recipes.clip_cov_loss, recipes.kl_cov_loss):
        out = function(logits, ids, advantages, old_logprobs=old)
        assert out.loss.isfinite()
        assert gradient(out.loss, logits).isfinite().all()


def test_wrong_options() -> None:
    given = (BATCH["logits"], IDS, REWARDS)
    with pytest.raises(ValueError, match="topr_loss: level is 'word'; expected sequence_sum, sequence or token"):
        recipes.topr_loss(*given, old_logprobs=OLD, level="word")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kl_cov_loss: percent is 0; expected above 0 and at most 100"):
        recipes.kl_cov_loss(*given, old_logprobs=OLD, percent=0)
    with pytest.raises(ValueError, match=r"reference_logprobs is None; kl_coef = 0.01 needs them"):
        oreal(BATCH["logits"])
