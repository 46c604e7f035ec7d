"""Papers 44, 50, 79, 94: identities of the splits into the label's class and the others, and their limits."""

from __future__ import annotations

import math

import pytest
import torch
from recipe_case import batch, double, gradient_of, same
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels import recipes

BATCH = batch(seed=21)
S, T, LABELS = BATCH["logits"], BATCH["teacher_logits"], BATCH["token_ids"]
FEATURES = batch(vocab=4, seed=22)["logits"]
MEANS = batch(7, 2, 4, seed=23)["logits"][:, 0]


def trained(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def at_labels(x: Tensor) -> Tensor:
    return x.gather(-1, LABELS[..., None])[..., 0]


def test_nkd_is_cross_entropy_with_its_weights_changed() -> None:
    """CE(p, q) = −p_c log q_c − (1 − p_c) log(1 − q_c) − (1 − p_c) Σ t̂ log ŝ."""
    p, q = at_labels(T.softmax(-1)), at_labels(S.softmax(-1))
    parts = [recipes.nkd_loss(S, T, LABELS, gamma=gamma, reduction="none") for gamma in (0.0, 1.0)]
    whole = kk.divergence_loss(S, T, "cross_entropy", reduction="none")
    same(parts[0] - (1 - p) * (1 - q).log() + (1 - p) * (parts[1] - parts[0]), whole)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_nkd_of_equal_other_classes(temperature: float) -> None:
    """Whatever the label's logit is and what is added to the others, only the label's part has a gradient."""
    label = torch.nn.functional.one_hot(LABELS, 7)
    s = trained(torch.where(label > 0, 5.0, T + 2.0))
    without = gradient_of(recipes.nkd_loss(s, T, LABELS, gamma=0.0), s)
    got = gradient_of(recipes.nkd_loss(s, T, LABELS, gamma=3.0, non_target_temperature=temperature), s)
    same(got, without)
    same(got.sum(-1), torch.zeros(3, 5))


def test_nkd_of_a_sure_student_and_of_a_sure_teacher() -> None:
    """Finite where q_c is 1, in float32; 0·∞ of a teacher that excludes what the student does is 0."""
    s, t = trained(torch.tensor([[200.0, 0.0, 1.0]])), torch.tensor([[0.0, 1.0, 0.5]])
    loss = recipes.nkd_loss(s, t, torch.tensor([0]))
    assert loss.isfinite()
    assert gradient_of(loss, s).isfinite().all()
    assert loss > 1
    s, t = trained(torch.tensor([[-torch.inf, 0.0, 1.0]])), torch.tensor([[-torch.inf, 1.0, 0.5]])
    loss = recipes.nkd_loss(s, t, torch.tensor([0]))
    assert loss.isfinite()
    assert gradient_of(loss, s).isfinite().all()


def test_uskd_ranks_by_both_heads() -> None:
    """Three others, of which the heads disagree: odds .5 + .1, .3 + .7, .2 + .2 rank them 2, 1, 3 or, with the label
    ranked first, 3, 2, 4."""
    weak, own = double(0.4, 0.3, 0.18, 0.12).log()[None], double(0.4, 0.06, 0.42, 0.12).log()[None]
    got = recipes.uskd_loss(own, weak, torch.tensor([0]), alpha=0.0, beta=1.0, mu=0.0)
    zipf = double(1 / 3, 1 / 2, 1 / 4)
    same(got, -(zipf / zipf.sum() * double(0.1, 0.7, 0.2).log()).sum())


def test_uskd_without_its_weak_parts_is_a_weighted_cross_entropy() -> None:
    """P_c has the batch's mean 1: one row alone has the weight 1."""
    s = S[:1, :1]
    got = recipes.uskd_loss(s, T[:1, :1], LABELS[:1, :1], beta=0.0, mu=0.0)
    same(got, -at_labels(S.log_softmax(-1))[0, 0])
    weak = trained(torch.full((1, 4), 2.0))
    loss = recipes.uskd_loss(torch.full((1, 4), 9.0), weak, torch.tensor([2]), alpha=0.0, beta=0.0, mu=1.0)
    same(loss, torch.tensor(math.log(4)))
    assert gradient_of(loss, weak)[0, 2] < 0
    # Sure of the label, in float32: the odds are infinite, and the label is ranked first.
    sure = torch.tensor([[200.0, 0.0, 1.0]])
    assert recipes.uskd_loss(sure, sure, torch.tensor([0])).isfinite()


def test_ofa_between_its_limits() -> None:
    """The other classes' weights vanish as ε grows, and the label's grows."""
    same(recipes.ofa_loss(S, T, LABELS), kk.divergence_loss(S, T, "cross_entropy"))
    s = trained(S)
    for eps, tolerance in ((1 + 1e-9, 1e-7), (1.0, 1e-12)):
        got = gradient_of(recipes.ofa_loss(s, T, LABELS, eps=eps), s)
        same(got, gradient_of(kk.forward_kl(s, T), s), tolerance)
    large = recipes.ofa_loss(S, T, LABELS, eps=60.0, reduction="none")
    weight = (1 + at_labels(T.softmax(-1))) ** 60 - 1
    same(large / weight, -at_labels(S.log_softmax(-1)), 1e-3)


def test_dkd_and_kd() -> None:
    """KL(p‖q) = TCKD + (1 − p_c)·NCKD, and dkd_loss has τ² of each."""
    tau = 2.0
    parts = [
        recipes.dkd_loss(S, T, LABELS, alpha=a, beta=b, temperature=tau, reduction="none") for a, b in ((1, 0), (0, 1))
    ]
    p = at_labels((T / tau).softmax(-1))
    same(parts[0] + (1 - p) * parts[1], tau**2 * kk.forward_kl(S, T, temperature=tau, reduction="none"))
    same(recipes.dkd_loss(S, S + 3.0, LABELS), torch.zeros(()))
    s = trained(torch.tensor([[200.0, 0.0, 1.0]]))
    loss = recipes.dkd_loss(s, torch.tensor([[0.0, 1.0, 0.5]]), torch.tensor([0]), temperature=1.0)
    assert loss.isfinite()
    assert gradient_of(loss, s).isfinite().all()


def test_the_direction_of_features() -> None:
    """0 along the class's direction from the teacher's norm on; below it a longer feature is better."""
    unit = torch.nn.functional.normalize(MEANS, dim=-1)[LABELS]
    norm = FEATURES.norm(dim=-1, keepdim=True)
    same(recipes.norm_direction_loss(1.5 * norm * unit, FEATURES, MEANS, LABELS), torch.zeros(()))
    same(recipes.norm_direction_loss(0.25 * norm * unit, FEATURES, MEANS, LABELS), torch.tensor(0.75))
    # Longer than the teacher's: 1 − cosine, whose gradient has no part along the feature.
    f = trained(9 * norm * torch.nn.functional.normalize(FEATURES.flip(0), dim=-1))
    gradient = gradient_of(recipes.norm_direction_loss(f, FEATURES, MEANS, LABELS), f)
    same((gradient * f).sum(-1), torch.zeros(3, 5))
    nothing = trained(torch.zeros(2, 4))
    loss = recipes.norm_direction_loss(nothing, torch.zeros(2, 4), MEANS, torch.tensor([0, 1]))
    assert loss == 1
    assert gradient_of(loss, nothing).isfinite().all()


def test_kdpp_of_its_parts() -> None:
    """And τ²·KL of a high temperature is half the mean square of the centred logits."""
    got = recipes.kdpp_loss(S, T, LABELS, FEATURES, FEATURES.flip(0), MEANS, kd_coef=2.0, nd_coef=0.0)
    same(got, -at_labels(S.log_softmax(-1)).mean() + 2 * recipes.kd_loss(S, T, temperature=4.0))
    apart = T - S - (T - S).mean(-1, keepdim=True)
    same(recipes.kd_loss(S, T, temperature=1e4), apart.square().mean(-1).mean() / 2, 1e-3)


def test_margins() -> None:
    """The logit of p_c; exact where p_c rounds to 1 in float32."""
    p = at_labels(S.softmax(-1))
    same(recipes.target_margin(S, LABELS), torch.logit(p))
    sure = trained(torch.tensor([[60.0, 0.0, 0.0]]))
    got = recipes.target_margin(sure, torch.tensor([0]))
    torch.testing.assert_close(got, torch.tensor([60 - math.log(2)]))
    same(gradient_of(got.sum(), sure), torch.tensor([[1.0, -0.5, -0.5]]), 1e-6)


def test_klom_of_equal_and_of_disjoint_histograms() -> None:
    margins = S[:, 0]
    assert (recipes.klom(margins, margins, bins=3, pseudocount=0.0) == 0).all()
    first, second = double(0.0, 0.1), double(5.0, 6.0)
    assert recipes.klom(first, second, bins=4, pseudocount=0.0) == math.inf
    assert 0 < recipes.klom(first, second, bins=4, pseudocount=0.5) < math.inf
    constant = recipes.klom(double(2.0, 2.0), double(2.0), bins=3, pseudocount=0.0)
    assert constant == 0


def test_bfloat16_and_pixels() -> None:
    """[B, H, W] of bfloat16 logits: float32 losses, and the gradient in their dtype."""
    s, t = (x[None].bfloat16() for x in (S, T))
    s.requires_grad_()
    labels = LABELS[None]
    features = FEATURES[None].bfloat16()
    for loss in (
        recipes.nkd_loss(s, t, labels), recipes.uskd_loss(s, t, labels), recipes.ofa_loss(s, t, labels, eps=1.5),
        recipes.dkd_loss(s, t, labels), recipes.logit_matching_loss(s, t),
        recipes.kdpp_loss(s, t, labels, features, features, MEANS.bfloat16()),
    ):  # fmt: skip
        assert loss.dtype == torch.float32
        assert loss.shape == ()
        gradient = gradient_of(loss, s)
        assert gradient.dtype == torch.bfloat16
        assert gradient.isfinite().all()


def test_errors() -> None:
    one = LABELS[:1]
    for wrong in (
        lambda: recipes.nkd_loss(S, T, one), lambda: recipes.nkd_loss(S, T[:1], LABELS),
        lambda: recipes.nkd_loss(S, T, LABELS, mask=torch.ones(1, 5)), lambda: recipes.uskd_loss(S, T[:1], LABELS),
        lambda: recipes.uskd_loss(S, T, one), lambda: recipes.ofa_loss(S, T, one), lambda: recipes.dkd_loss(S, T, one),
        lambda: recipes.norm_direction_loss(FEATURES, FEATURES[:1], MEANS, LABELS),
        lambda: recipes.norm_direction_loss(FEATURES, FEATURES, MEANS[:, :2], LABELS),
        lambda: recipes.norm_direction_loss(FEATURES, FEATURES, MEANS, one),
        lambda: recipes.logit_matching_loss(S, T[:1]), lambda: recipes.target_margin(S, one),
        lambda: recipes.klom(S[:, 0], T[:, 0, :1], bins=2, pseudocount=0.0),
        lambda: recipes.klom(S[:0], T, bins=2, pseudocount=0.0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="shape"):
            wrong()
    with pytest.raises(ValueError, match=r"nkd_loss: reduction is 'batchmean'; expected mean, sum or none"):
        recipes.nkd_loss(S, T, LABELS, reduction="batchmean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ofa_loss: eps is 0"):
        recipes.ofa_loss(S, T, LABELS, eps=0)
    with pytest.raises(ValueError, match=r"klom: bins is 0"):
        recipes.klom(S[:, 0], T[:, 0], bins=0, pseudocount=0.0)
