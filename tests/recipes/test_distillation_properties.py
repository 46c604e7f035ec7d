"""What papers 7, 10, 12, 35 and 36 say of their losses, or what follows from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recipe_case import batch
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels import recipes

BATCH = batch(seed=5)
S, T, MASK = BATCH["logits"], BATCH["teacher_logits"], BATCH["mask"]
UNIFORM = torch.zeros_like(S)


def both(loss: Any, s: Tensor = S, t: Tensor = T) -> tuple[Tensor, Tensor, Tensor]:
    """Value and the gradients of both logits; 0 where there is none."""
    s, t = s.clone().requires_grad_(), t.clone().requires_grad_()
    value = loss(s, t)
    found = torch.autograd.grad(value, (s, t), allow_unused=True)
    return value.detach(), *(torch.zeros_like(s) if x is None else x for x in found)  # type: ignore[return-value]


def same(first: Any, second: Any) -> None:
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)


def test_gere_is_a_quarter_of_distillation_and_0_for_the_base_model() -> None:
    same(4 * recipes.gere_kd_loss(S, T), recipes.kd_loss(S, T))
    assert recipes.gere_kd_loss(S, S).abs() < 1e-12


def test_the_threshold_loss_is_0_for_the_base_model() -> None:
    lower, upper = torch.full((7,), -0.5).double(), torch.full((7,), 0.5).double()
    assert recipes.activation_threshold_loss(S, S, lower, upper) == 0
    assert recipes.activation_threshold_loss(S + 9, S, lower, upper) > 1
    # Where both thresholds are one, so is the side of a unit that stands on it: it is to stay there.
    on = torch.zeros(1, 1)
    assert recipes.activation_threshold_loss(on + 2, on, torch.zeros(1), torch.zeros(1)) == 2


def test_the_threshold_loss_is_float32_for_bfloat16() -> None:
    loss = recipes.activation_threshold_loss(S.bfloat16(), T.bfloat16(), torch.zeros(7), torch.ones(7))
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("gamma", [0.0, 1.0, torch.tensor(0.3, dtype=torch.float64)])
def test_entropy_aware_kl_of_a_given_gamma(gamma: float | Tensor) -> None:
    def mixed(s: Tensor, t: Tensor) -> Tensor:
        return gamma * kk.reverse_kl(s, t.detach()) + (1 - gamma) * kk.forward_kl(s, t.detach())

    same(both(lambda s, t: recipes.entropy_aware_kl(s, t, gamma=gamma)), both(mixed))


def test_a_sequence_without_tokens_counts_in_the_means_of_entropy_aware_kl() -> None:
    """As in the code: 0 of two."""
    mask = torch.tensor([[True], [False]]).expand(2, 5)
    got = recipes.entropy_aware_kl(S[:2], T[:2], gamma=0.0, mask=mask)
    same(got, kk.forward_kl(S[:1], T[:1]) / 2)


def test_entropy_aware_kl_of_a_teacher_that_knows_nothing_or_all() -> None:
    same(recipes.entropy_aware_kl(S, UNIFORM, confidence_k=7), kk.forward_kl(S, UNIFORM))
    sure = torch.zeros_like(S)
    sure[..., 2] = 200.0
    same(recipes.entropy_aware_kl(S, sure), kk.reverse_kl(S, sure))


def test_entropy_aware_kl_leaves_out_an_infinite_divergence_of_weight_0() -> None:
    """A teacher that excludes a column has an infinite KL(q‖p), which counts 0 where γ is 0."""
    excluding = torch.cat([UNIFORM[..., :6], torch.full_like(UNIFORM[..., :1], -torch.inf)], dim=-1)
    value, gradient, _ = both(lambda s, t: recipes.entropy_aware_kl(s, t, confidence_k=6), S, excluding)
    same(value, kk.forward_kl(S, excluding))
    assert gradient.isfinite().all()


def test_bidirectional_kl_is_plain_distillation_or_symmetric() -> None:
    def forward(s: Tensor, t: Tensor) -> Tensor:
        return recipes.bidirectional_kl(s, t, forward_weights=(1, 1), reverse_weights=(0, 0), temperature=2.0)

    same(both(forward), both(lambda s, t: kk.forward_kl(s, t, temperature=2.0, temperature_squared=True)))

    def even(s: Tensor, t: Tensor) -> Tensor:
        return recipes.bidirectional_kl(s, t, forward_weights=(0.5, 0.5), reverse_weights=(0.5, 0.5), mask=MASK)

    value, of_s, of_t = both(even)
    again, of_t_swapped, of_s_swapped = both(even, T, S)
    same((value, of_s, of_t), (again, of_s_swapped, of_t_swapped))


def test_bidirectional_kl_takes_the_first_weights_where_the_teacher_is_less_sure() -> None:
    loss = recipes.bidirectional_kl(
        S, T, forward_weights=(1, 0), reverse_weights=(0, 0), reduction="none", temperature_squared=False
    )
    surer = kk.entropy(T) > kk.entropy(S)
    same(loss, torch.where(surer, kk.forward_kl(S, T, reduction="none"), 0.0))
    assert surer.any()
    assert not surer.all()


def test_paced_loss_is_0_at_both_ends_and_plain_without_exponents() -> None:
    ends = torch.tensor([0.0, 1.0, 0.0]).double()
    for x in both(lambda s, t: recipes.paced_loss(s, t, ends)):
        assert (x == 0).all()
    plain = both(lambda s, t: kk.forward_kl(s, t.detach(), mask=MASK))
    same(both(lambda s, t: recipes.paced_loss(s, t, ends, alpha=0.0, beta=0.0, mask=MASK)), plain)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (2.0, 1.0), (0.5, 1.5)])
def test_paced_loss_weighs_most_what_is_solved_alpha_of_alpha_and_beta_times(alpha: float, beta: float) -> None:
    rates = torch.linspace(0, 1, 401).double()
    rows = [x.expand(401, 1, 7) for x in (S[0, :1], T[0, :1])]
    losses = recipes.paced_loss(*rows, rates, alpha=alpha, beta=beta, reduction="none")[:, 0]
    assert rates[losses.argmax()].item() == pytest.approx(alpha / (alpha + beta), abs=0.003)


def test_distillation_at_temperatures() -> None:
    """Its gradient by the logits is τ(q − p), and at high temperatures it is half the mean of squared distances."""
    _, gradient, of_teacher = both(lambda s, t: recipes.kd_loss(s, t, temperature=3.0, reduction="sum"))
    same(gradient, 3 * ((S / 3).softmax(-1) - (T / 3).softmax(-1)))
    assert (of_teacher == 0).all()
    apart = (S - S.mean(-1, keepdim=True)) - (T - T.mean(-1, keepdim=True))
    hot = recipes.kd_loss(S, T, temperature=1e4, reduction="none")
    torch.testing.assert_close(hot, apart.square().mean(-1) / 2, rtol=1e-3, atol=0)


def test_memorization_metrics_have_no_gradient_and_end_with_the_last_tokens() -> None:
    found = recipes.memorization_metrics(S.clone().requires_grad_(), T, BATCH["token_ids"], last=1, mask=MASK)
    assert not any(x.requires_grad for x in found)
    at = MASK.long().cumsum(-1).argmax(-1)
    same(found.last_entropy, found.entropy.gather(-1, at[:, None])[:, 0])


def test_wrong_options_are_refused() -> None:
    for wrong, call in {
        "entropy_aware_kl: confidence_k is 1": lambda: recipes.entropy_aware_kl(S, T, confidence_k=1),
        "bidirectional_kl: reduction is 'max'": lambda: recipes.bidirectional_kl(
            S, T, forward_weights=(1, 1), reverse_weights=(1, 1), reduction="max"),
        "paced_loss: kind is 'js'": lambda: recipes.paced_loss(S, T, torch.ones(3), kind="js"),
        "paced_loss: alpha is -1": lambda: recipes.paced_loss(S, T, torch.ones(3), alpha=-1),
        "memorization_metrics: last is 0": lambda: recipes.memorization_metrics(S, T, BATCH["token_ids"], last=0),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"^{wrong}"):
            call()  # type: ignore[no-untyped-call]
