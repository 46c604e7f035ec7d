"""What papers 58, 74 and 103 say of their losses, or what follows from it."""

from __future__ import annotations

import math

import pytest
import torch
from recipe_case import batch
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels import recipes

BATCH = batch(seed=6)
S, P, IDS, MASK = BATCH["logits"], BATCH["base_logits"], BATCH["token_ids"], BATCH["mask"]


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits)[0]


def same(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)


def test_dft_is_asft_without_anchor_or_at_the_anchor() -> None:
    s = S.clone().requires_grad_()
    dft = recipes.dft_loss(s, IDS, mask=MASK)
    same(recipes.asft_loss(s, P, IDS, kl_coef=0.0, mask=MASK), dft)
    for kind in ("reverse_kl", "forward_kl"):
        at_anchor = recipes.asft_loss(s, S, IDS, kind=kind, kl_coef=7.0, mask=MASK)
        same(at_anchor, dft)
        same(gradient(at_anchor, s), gradient(recipes.dft_loss(s, IDS, mask=MASK), s))


def test_dft_of_a_uniform_row() -> None:
    assert recipes.dft_loss(torch.zeros(1, 16).double(), torch.tensor([3])).item() == pytest.approx(math.log(16) / 16)


def test_dft_has_the_gradient_of_the_policy_loss_with_the_anchor_1() -> None:
    """In one read: ρ = q_y to an anchor of 1, whose −ρ has the gradient −q_y ∇log q_y."""
    s, zeros = S.clone().requires_grad_(), torch.zeros_like(IDS).double()
    out = kk.policy_loss(
        s, IDS, torch.ones(3).double(), anchor_logprobs=zeros, old_logprobs=zeros,
        mask=MASK, clip_low=1.0, clip_high=math.inf, aggregation="token-mean",
    )  # fmt: skip
    same(gradient(out.loss, s), gradient(recipes.dft_loss(s, IDS, mask=MASK), s))


def test_dft_of_a_label_without_probability() -> None:
    s = torch.tensor([[0.0, -torch.inf, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = recipes.dft_loss(s, torch.tensor([1]))
    assert loss == 0
    assert (gradient(loss, s) == 0).all()
    far = torch.tensor([[0.0, -400.0]], requires_grad=True)
    assert gradient(recipes.dft_loss(far, torch.tensor([1])), far).isfinite().all()


@pytest.mark.parametrize("kl_coef", [0.1, 1.0, 50.0])
def test_the_optimum_of_demonstration_regularisation(kl_coef: float) -> None:
    """p·e^{Q/λ} over its sum: the gradient is 0 there, and every other policy has a higher loss."""
    values = 0.2 * BATCH["teacher_logits"]
    best = (P + values / kl_coef).requires_grad_()
    loss = recipes.demonstration_regularized_loss(best, P, values, kl_coef=kl_coef)
    assert gradient(loss, best).abs().max() < 1e-12 * max(1.0, kl_coef)
    assert recipes.demonstration_regularized_loss(best + 0.3 * S, P, values, kl_coef=kl_coef) > loss
    # It is the one that a distillation from these logits has.
    constant = -kl_coef * ((values / kl_coef).exp() * P.softmax(-1)).sum(-1).log().mean()
    same(loss.detach(), constant)


def test_an_action_that_cannot_be_taken_may_have_any_value() -> None:
    s = torch.tensor([[0.3, -torch.inf, 0.0]], dtype=torch.float64, requires_grad=True)
    clone = torch.tensor([[0.0, -torch.inf, 0.0]], dtype=torch.float64)
    values = torch.tensor([[1.0, -torch.inf, 0.0]], dtype=torch.float64)
    loss = recipes.demonstration_regularized_loss(s, clone, values, kl_coef=0.5)
    assert loss.isfinite()
    assert gradient(loss, s).isfinite().all()


def test_two_vocabularies_are_two_cross_entropies() -> None:
    fine = IDS.clone()
    fine[0, 0] = -100
    got = recipes.two_vocabulary_cross_entropy(S, P, IDS, fine)
    cross_entropy = torch.nn.functional.cross_entropy
    same(got, (cross_entropy(S.transpose(1, 2), IDS) + cross_entropy(P.transpose(1, 2), fine)) / 2)


def test_a_wrong_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^asft_loss: kind is 'js'; expected reverse_kl or forward_kl"):
        recipes.asft_loss(S, P, IDS, kind="js")
