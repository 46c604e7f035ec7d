"""Rewards and log-probabilities as users have them: integers, bfloat16, −inf, sure rows, wrong shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recipe_case import gradient_of
from torch import Tensor

from kldiv_kernels import recipes

INF = torch.inf
ONE_PROMPT = torch.tensor([0, 0, 0])


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    """By the largest number of `wanted`."""
    assert found.isfinite().all()
    assert found.shape == wanted.shape
    assert (found.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


def bf16(*shape: int, seed: int = 0) -> Tensor:
    """Log-probabilities."""
    return -torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).mul(4).add(0.1).bfloat16()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_rewards_that_are_not_floating_point(dtype: torch.dtype) -> None:
    rewards = torch.tensor([1, 0, 1])
    given, real = rewards.to(dtype), rewards.double()
    targets = recipes.reward_targets(given, ONE_PROMPT)
    wanted = ((real - real.mean()) / real.std() / 0.5).softmax(-1)
    close(targets, wanted)
    logprobs = torch.tensor([-3.0, -1.0, -2.0])
    loss = recipes.adpo_loss(logprobs, torch.zeros(3), targets, ONE_PROMPT)
    close(loss, -(wanted * (logprobs.double() / 0.8).log_softmax(-1)).sum())
    tau = recipes.adaptive_tau(torch.tensor([-1.0, -2.0, -0.5]), given, ONE_PROMPT, vocab_size=100)
    unsure = torch.tensor([1.0, 2.0, 0.5]).double() / torch.tensor(100.0).double().log()
    close(tau, 0.8 * (1 + 0.5 * unsure + 0.5 * (1 - unsure) * (1 - real)))

    weights, averages = recipes.difficulty_sampling_weights(given)
    close(averages, 0.45 + 0.1 * real)
    close(weights, (-((0.1 * real - 0.05) ** 2) / (2 * 0.35**2)).exp())
    two, ensemble = torch.stack([given, given.new_ones(3)]), torch.stack([real, torch.ones(3).double()])
    close(recipes.ensemble_rewards(two), ensemble.mean(0))
    close(recipes.ensemble_rewards(two, how="uwo"), ensemble.mean(0) - 0.1 * ensemble.var(0))
    answers = torch.tensor([[[1, 0, 1], [0, 0, 1]]])
    for credit in ("std", "sum-mean", "uniform", "score"):
        close(
            recipes.bundle_advantages(answers.to(dtype), 0.5, 1.5, credit=credit),
            recipes.bundle_advantages(answers.double(), 0.5, 1.5, credit=credit),
        )
    close(recipes.calibrated_rewards(given, torch.zeros(3, 2, dtype=dtype)), 0.5 + 0.5 * real)


def test_integer_advantages_keep_their_factor() -> None:
    lengths, correct = torch.tensor([10, 8, 13]), torch.tensor([True, False, False])
    found = recipes.stcr_advantages(torch.tensor([1, -1, -1]), lengths, correct, ONE_PROMPT, base=2.0)
    close(found, torch.tensor([1.0, -1.0, -(2 - 2**-3.0)]).double())


GIVEN: list[tuple[Callable[..., Any], list[Any], str]] = [
    (recipes.calibrated_rewards, [torch.ones(1), torch.ones(3, 4)], r"calibrated_rewards: rewards .*\[1\].*\[3\]"),
    (recipes.calibrated_rewards, [torch.ones(3), torch.ones(1, 4)], r"calibrated_rewards: rewards .*\[3\].*\[1\]"),
    (recipes.calibrated_rewards, [torch.ones(3, 1), torch.ones(3, 4)], r"rewards has shape \[3, 1\].*\[3\]"),
    (recipes.answer_entropy, [torch.tensor([1]), ONE_PROMPT], r"answers has shape \[1\]; expected \[3\]"),
    (recipes.copo_global_advantages, [torch.ones(3), ONE_PROMPT[:2]], r"groups has shape \[2\]; expected \[3\]"),
    (recipes.copo_global_advantages, [torch.ones(3), ONE_PROMPT, ONE_PROMPT[:1]], r"answers has shape \[1\]"),
    (recipes.difficulty_mask, [torch.ones(3), ONE_PROMPT[None]], r"groups has shape \[1, 3\]; expected \[3\]"),
    (recipes.gopd_advantages, [torch.ones(2, 3), torch.ones(3), torch.ones(2, 3)], r"teacher_logprobs .*\[3\]"),
    (recipes.gopd_advantages, [torch.ones(2, 3), torch.ones(2, 3), torch.ones(1)], r"base_logprobs .*\[1\]"),
]


@pytest.mark.parametrize(("function", "arguments", "message"), GIVEN)
def test_shapes_that_would_broadcast(function: Callable[..., Any], arguments: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(*arguments)


@pytest.mark.parametrize("peak", [20.0, 30.0, 40.0])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_pld_of_sure_rows(peak: float, offset: float) -> None:
    """The student is near the teacher, and both are sure of the label."""
    noise = torch.Generator().manual_seed(0)
    teacher = torch.randn(64, generator=noise)
    teacher[7] += peak
    student = ((teacher + 0.1 * torch.randn(64, generator=noise)) + offset).requires_grad_()
    loss = recipes.pld_loss(student[None], teacher[None], torch.tensor([7]))

    exact = student.detach().double().requires_grad_()
    order = teacher.argsort(descending=True).tolist()
    weights = (teacher.double() / 4).softmax(-1)
    terms = [weights[k] * (exact[order[place:]].logsumexp(0) - exact[k]) for place, k in enumerate(order)]
    close(gradient_of(loss, student), gradient_of(torch.stack(terms).sum(), exact), 3e-5)


def test_gtpo_of_a_token_without_probability() -> None:
    """Without old log-probabilities the ratio is 1; NaN logits stay NaN."""
    logits = torch.tensor([[[-INF, 0.0, 0.0]], [[0.0, 0.0, 0.0]]], requires_grad=True)
    ids, rewards, groups = torch.tensor([[0], [1]]), torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
    loss = recipes.gtpo_loss(logits, ids, rewards, groups, entropy_threshold=9.0).loss
    real = rewards.double()
    advantages = (real - 0.5) / (real.std() + 1e-4) - 0.1 * torch.tensor([2.0, 3.0]).double().log()
    close(loss, -advantages.mean())
    slopes = torch.nn.functional.one_hot(ids, 3) - logits.detach().double().softmax(-1)
    close(gradient_of(loss, logits), -advantages[:, None, None] / 2 * slopes)
    broken = recipes.gtpo_loss(logits * torch.nan, ids, rewards, groups, entropy_threshold=9.0)
    assert broken.loss.isnan()


def test_drpo_of_wrong_answers_without_probability() -> None:
    """exp(S/τ) of such an answer is 0."""
    rows = [[0.0, 1.0, 2.0], [-INF, 1.0, 2.0], [0.5, 0.0, 0.0]]
    logits = torch.tensor(rows)[:, None].requires_grad_()
    given = {"old_logprobs": torch.full((3, 1), -1.0), "beta": 0.0}
    loss = recipes.drpo_loss(logits, torch.zeros(3, 1).long(), torch.tensor([1.0, 0.0, 0.0]), ONE_PROMPT, **given).loss
    exact = logits.detach().double().requires_grad_()
    scores = exact[[0, 2], 0].log_softmax(-1)[:, 0]
    wanted = scores[1] - scores[0]
    close(loss, wanted)
    close(gradient_of(loss, logits), gradient_of(wanted, exact))

    # A prompt whose wrong answers all have none: nothing to push, and the pull is left.
    loss = recipes.drpo_loss(
        logits[:2], torch.zeros(2, 1).long(), torch.tensor([1.0, 0.0]), ONE_PROMPT[:2],
        old_logprobs=torch.full((2, 1), -1.0), beta=0.0,
    ).loss  # fmt: skip
    close(loss, -scores[0])
    assert gradient_of(loss, logits).isfinite().all()


@pytest.mark.parametrize("teacher_clamp", [1.0, INF])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_trrd_of_one_share_does_not_look_at_the_other(teacher_clamp: float, alpha: float) -> None:
    logits = torch.tensor([[[0.0, 1.0, 2.0], [1.0, 0.0, 0.5]]], requires_grad=True)
    ids, advantages = torch.tensor([[0, 1]]), torch.tensor([[1.0, -0.5]])
    near, none = torch.tensor([[-2.3, -1.9]]), torch.full((1, 2), -INF)
    old, teacher = (near, none) if alpha == 1 else (none, near)
    loss = recipes.trrd_loss(
        logits, ids, advantages, old_logprobs=old, teacher_logprobs=teacher, alpha=alpha, teacher_clamp=teacher_clamp
    ).loss
    exact = logits.detach().double().requires_grad_()
    ratio = (exact.log_softmax(-1).gather(-1, ids[..., None])[..., 0] - near).exp()
    wanted = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages).mean()
    close(loss, wanted)
    close(gradient_of(loss, logits), gradient_of(wanted, exact))


def test_trrd_and_tcod_of_bfloat16() -> None:
    """The bfloat16 of the inputs is not that of the arithmetic."""
    logits = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    ids = logits.detach().argmax(-1)
    exact = logits.detach().double().requires_grad_()
    logprob = exact.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    old, teacher = ((logprob.detach() + 0.05 * bf16(2, 8, seed=seed)).bfloat16() for seed in (2, 3))
    advantages = torch.linspace(-1, 1, 16).reshape(2, 8)
    loss = recipes.trrd_loss(
        logits, ids, advantages, old_logprobs=old, teacher_logprobs=teacher, alpha=0.3, teacher_clamp=INF,
        aggregation="token-mean",
    ).loss  # fmt: skip
    ratio = (logprob - 0.3 * old.double() - 0.7 * teacher.double()).exp()
    wanted = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages).mean()
    close(loss, wanted)
    close(gradient_of(loss, logits), gradient_of(wanted, exact))

    turns, teacher = torch.zeros(2, 8).long(), bf16(2, 8, seed=8)
    loss = recipes.tcod_loss(logits, ids, old_logprobs=old, teacher_logprobs=teacher, turns=turns, window=1).loss
    ratio, a = (logprob - old.double()).exp(), teacher.double() - old.double()
    pull = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
    wanted = -torch.where(a < 0, torch.maximum(pull, 3.0 * a), pull).mean()
    close(loss, wanted)
    close(gradient_of(loss, logits), gradient_of(wanted, exact))


def test_credit_and_rewards_of_bfloat16() -> None:
    old, reference, entropy = bf16(2, 40, seed=4), bf16(2, 40, seed=5), -bf16(2, 40, seed=6)
    every, ones = torch.ones(2, 40, dtype=torch.bool), torch.ones(2)
    apart = old.double() - reference.double()
    found = recipes.process_advantages(ones, old, reference, every, eta=10.0, step_length=1)
    close(found, 1 - apart.flip(-1).cumsum(-1).flip(-1) / 10)
    found = recipes.kl_shaped_rewards(ones.bfloat16(), old, reference, every, kl_coef=0.1)
    last = torch.eye(40, dtype=torch.float64)[-1]
    close(found, last - 0.1 * apart)
    close(
        recipes.gopd_advantages(old, reference, entropy),
        1.25 * (reference.double() - entropy) - (old - entropy.double()),
    )

    size = (torch.expm1(old.double()) * (old.double() + entropy)).abs()
    linear = recipes.steer_weights(old, entropy, ones, every, scheme="linear")
    close(linear, 1.2 - 0.4 * (size - size.min()) / (size.max() - size.min()))
    assert linear.max() <= 1.2 + 1e-6
    close(recipes.steer_weights(old, entropy, ones, every), 0.7 ** (size / size.max()))
    pull = recipes.entropy_band(entropy, every, 1.0, 2.0, low_coef=0.1, high_coef=0.2)
    close(pull, 0.1 * (1 - entropy.double()).relu() + 0.2 * (entropy.double() - 2).relu())
    accuracy = torch.full((2,), 0.3).bfloat16()
    close(recipes.dads_weights(ones, accuracy), 1 - (-torch.e * accuracy.double()).exp())
    # Rewards of which bfloat16 has no sum.
    rewards = bf16(2, 3, 4, seed=7)
    close(recipes.bundle_advantages(rewards, -5.0, -4.0), recipes.bundle_advantages(rewards.double(), -5.0, -4.0))
    close(recipes.ensemble_rewards(rewards[0]), rewards[0].double().mean(0))


def test_gopd_of_factor_1_has_no_base() -> None:
    old, teacher = torch.tensor([-2.0]), torch.tensor([-1.0])
    found = recipes.gopd_advantages(old, teacher, torch.tensor([-INF]), extrapolation=1.0)
    close(found, torch.tensor([1.0]).double())
