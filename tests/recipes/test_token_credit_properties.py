"""Papers 27, 37, 47, 84: what their weights and advantages must be in the limits and special cases."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from recipe_case import batch, pick
from torch import Tensor

import kldiv_kernels as kk

BATCH = batch(sequences=6, seed=1)
LOGITS, MASK, GROUPS, ADVANTAGES = (BATCH[name] for name in ("logits", "mask", "groups", "advantages"))
LOGPROBS = pick(BATCH, "old_logprobs") | {"reference_logprobs": BATCH["base_logprobs"]}
ENTROPY = kk.token_stats(LOGITS, stats=("entropy",)).entropy


def steer(advantages: Tensor = ADVANTAGES, mask: Tensor = MASK, **options: Any) -> Tensor:
    return kk.recipes.steer_weights(BATCH["old_logprobs"], ENTROPY, advantages, mask, **options)


def process(**options: Any) -> Tensor:
    return kk.recipes.process_advantages(ADVANTAGES, **(LOGPROBS | options), mask=MASK)


def grpo(advantages: Tensor) -> Tensor:
    return torch.where(MASK, advantages[:, None].expand(MASK.shape), 0.0)


def gtpo(rewards: Tensor = BATCH["rewards"], **options: Any) -> kk.PolicyLoss:
    return kk.recipes.gtpo_loss(LOGITS, BATCH["token_ids"], rewards, GROUPS, mask=MASK, **options)


def test_dgpo_at_the_reference_is_grpo() -> None:
    weights = kk.recipes.dgpo_weights(LOGITS, LOGITS.clone(), MASK)
    torch.testing.assert_close(weights, MASK.double())


def test_dgpo_weights_have_mean_1_and_a_bounded_range() -> None:
    tau = 0.5
    # Each token of the reference nearly excludes the policy's: d is near 1 for some, 0 for others.
    reference = torch.where(torch.rand(6, 5, 1, generator=torch.Generator().manual_seed(0)) < 0.5, LOGITS, -40 * LOGITS)
    weights = kk.recipes.dgpo_weights(LOGITS, reference, MASK, credit_temperature=tau)
    torch.testing.assert_close(weights.sum(-1), MASK.sum(-1).double())
    for row, kept in zip(weights, MASK, strict=True):
        assert row[kept].max() / row[kept].min() <= math.exp(1 / tau)


def test_dgpo_of_disjoint_supports() -> None:
    """d is 1, so the weights are softmax of H/(τ·log V), also where a log-probability is −∞."""
    logits = torch.tensor([[[0.0, 0.0, -torch.inf, -torch.inf], [0.0, -torch.inf, -torch.inf, -torch.inf]]]).double()
    weights = kk.recipes.dgpo_weights(logits, logits.flip(-1), torch.tensor([[True, True]]), credit_temperature=1.0)
    torch.testing.assert_close(weights, 2 * torch.tensor([[0.5, 0.0]]).double().softmax(-1))


def test_steer_without_advantage_is_grpo() -> None:
    none = torch.zeros_like(ADVANTAGES)
    assert (steer(none) == MASK).all()
    assert (steer(none, scheme="linear") == MASK).all()
    assert (steer(minimum=1.0) == MASK).all()


def test_steer_keeps_its_range() -> None:
    """The largest change has the smallest weight; a probability of 0 or 1 gives a number."""
    inside = steer()[MASK]
    assert inside.min() == pytest.approx(0.7)
    assert inside.max() <= 1
    extreme = torch.tensor([[-torch.inf, -1e4, -1e-12, 0.0, -1.0]]).double()
    weights = kk.recipes.steer_weights(
        extreme, torch.full((1, 5), 0.5).double(), torch.ones(1).double(), torch.ones(1, 5).bool(),
        logprobs=extreme.flip(-1),
    )  # fmt: skip
    assert weights.isfinite().all()
    assert (weights >= 0.7 - 1e-12).all()


def test_a_token_that_is_certain_changes_no_entropy() -> None:
    weights = kk.recipes.steer_weights(
        torch.tensor([[0.0, -1.0]]), torch.tensor([[0.0, 1.5]]), torch.ones(1), torch.tensor([[True, True]])
    )
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.7]]))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gtpo_of_one_sign_has_no_conflicts(sign: float) -> None:
    ids, groups = torch.zeros(6, 5).long(), torch.zeros(6).long()
    weights = kk.recipes.conflict_weights(ids, sign * ADVANTAGES.abs(), groups, MASK)
    assert (weights == MASK).all()


def test_gtpo_where_both_runs_meet() -> None:
    """Equal completions of opposite sign: each token is in the run from the start and in the one from the end."""
    ids, sign = torch.tensor([[1, 2, 3], [1, 2, 3]]), torch.tensor([1.0, -1.0])
    weights = kk.recipes.conflict_weights(ids, sign, torch.tensor([0, 0]), torch.ones(2, 3).bool())
    assert weights.tolist() == [[4.0, 4.0, 4.0], [0.0, 0.0, 0.0]]


def test_gtpo_of_other_prompts_has_no_conflicts() -> None:
    ids, sign = torch.tensor([[1, 2, 3], [1, 2, 3]]), torch.tensor([1.0, -1.0])
    assert (kk.recipes.conflict_weights(ids, sign, torch.tensor([0, 1]), torch.ones(2, 3).bool()) == 1).all()


def test_gtpo_without_its_parts_is_grpo() -> None:
    """No conflicts weighted, γ = 0 and no filter: GRPO on its own samples, by value and gradient."""
    tokens = torch.arange(30).reshape(6, 5) % 7
    results = []
    for ours in (True, False):
        logits = LOGITS.clone().requires_grad_()
        if ours:
            out = kk.recipes.gtpo_loss(
                logits, tokens, BATCH["rewards"], GROUPS, entropy_coef=0.0, entropy_threshold=math.inf, mask=MASK
            )
        else:
            advantages = kk.advantages.group_relative(BATCH["rewards"], GROUPS)
            assert (kk.recipes.conflict_weights(tokens, advantages, GROUPS, MASK) == MASK).all()
            out = kk.policy_loss(logits, tokens, advantages, mask=MASK)
        results.append((out.loss, *torch.autograd.grad(out.loss, logits)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_gtpo_filters() -> None:
    """Where every completion's entropy is above the threshold nothing is left, unless the model began there."""
    assert gtpo(entropy_threshold=0.0).loss == 0
    assert gtpo(entropy_threshold=0.0).metrics["kept_fraction"] == 0
    assert gtpo(entropy_threshold=0.0, initial_entropy=1.0).loss == gtpo(entropy_threshold=math.inf).loss != 0


def test_gtpo_of_a_distant_policy() -> None:
    """Ratios that are infinite in float32 leave a conflict token of a wrong answer at 0."""
    logits = torch.zeros(2, 1, 4, requires_grad=True)
    out = kk.recipes.gtpo_loss(
        logits, torch.tensor([[1], [1]]), torch.tensor([1.0, 0.0]), torch.tensor([0, 0]),
        entropy_threshold=math.inf, old_logprobs=torch.tensor([[-1.0], [-1e3]]),
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[1] == 0).all()


def test_prl_is_grpo_in_its_limits() -> None:
    torch.testing.assert_close(process(eta=math.inf), grpo(ADVANTAGES))
    torch.testing.assert_close(process(reference_logprobs=LOGPROBS["old_logprobs"]), grpo(ADVANTAGES))


def test_prl_with_steps_of_a_token() -> None:
    """A_t − A_{t+1} is the token's own reward."""
    eta, full = 3.0, MASK.all(-1)
    out = process(eta=eta, step_length=1)[full]
    apart = (LOGPROBS["old_logprobs"] - LOGPROBS["reference_logprobs"])[full]
    torch.testing.assert_close(out[:, :-1] - out[:, 1:], -apart[:, :-1] / eta)


def test_prl_where_a_step_sums_to_0() -> None:
    """The code looks for the next number that is not 0 and would take the next step's."""
    apart = torch.tensor([[1.0, 2.0, -4.0, 2.0]])
    ends = torch.tensor([[False, True, False, False]])
    advantages = kk.recipes.process_advantages(
        torch.zeros(1), apart, torch.zeros(1, 4), torch.ones(1, 4).bool(), eta=1.0, step_ends=ends
    )
    assert advantages.tolist() == [[0.0, 0.0, -2.0, -2.0]]


def test_without_gradient_and_without_tokens() -> None:
    logits, advantages = LOGITS.clone().requires_grad_(), ADVANTAGES.clone().requires_grad_()
    assert not kk.recipes.dgpo_weights(logits, BATCH["teacher_logits"], MASK).requires_grad
    assert not steer(advantages).requires_grad
    assert not kk.recipes.process_advantages(advantages, **LOGPROBS, mask=MASK).requires_grad
    nothing = torch.zeros(0, 5)
    assert kk.recipes.steer_weights(nothing, nothing, torch.zeros(0), nothing.bool()).shape == (0, 5)
    assert kk.recipes.process_advantages(torch.zeros(0), nothing, nothing, nothing.bool()).shape == (0, 5)
    assert kk.recipes.conflict_weights(
        nothing.long(), torch.zeros(0), torch.zeros(0).long(), nothing.bool()
    ).shape == (0, 5)  # fmt: skip


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"dgpo_weights: credit_temperature is 0"):
        kk.recipes.dgpo_weights(LOGITS, LOGITS, MASK, credit_temperature=0.0)
    with pytest.raises(ValueError, match=r"steer_weights: scheme is 'cubic'; expected exponential or linear"):
        steer(scheme="cubic")
    with pytest.raises(ValueError, match=r"steer_weights: minimum is 0"):
        steer(minimum=0.0)
    with pytest.raises(ValueError, match=r"process_advantages: eta is -1"):
        process(eta=-1.0)
