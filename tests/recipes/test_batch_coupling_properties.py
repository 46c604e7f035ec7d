"""Papers 15, 57, 60, 62, 80, 87: identities and limits of what couples rows of a batch, or two views of them."""

from __future__ import annotations

import math

import pytest
import torch
from recipe_case import batch, double, gradient_of, same
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels import recipes

BATCH = batch(seed=31)
S, T, OLD = (BATCH[name][0] for name in ("logits", "teacher_logits", "old_logits"))
UNIFORM = torch.full((7,), -math.log(7), dtype=torch.float64)


def trained(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def test_sinkd_of_one_row_and_of_equal_rows() -> None:
    """One row is twice the total variation; rows that differ much from each other and equal the teacher's cost 0."""
    same(recipes.sinkd_loss(S[:1], T[:1], weight=1.0), 2 * kk.tvd(S[:1], T[:1], temperature=2.0))
    apart = 40 * torch.eye(5).double()
    assert recipes.sinkd_loss(apart, apart.clone(), weight=1.0) < 1e-5
    # A transport, not a sum over rows: the teacher's rows may stand in another order.
    same(recipes.sinkd_loss(apart, apart.flip(0), weight=1.0), recipes.sinkd_loss(apart, apart, weight=1.0))


def test_sinkd_moves_one_unit_to_each_row_of_the_teacher() -> None:
    """The plan's columns sum to 1: a cost that is the same for all pairs is paid B times, however small ε is."""
    s, t = (40 * torch.eye(7).double()[rows] for rows in ([0, 0, 0], [1, 1, 1]))
    for epsilon in (0.1, 1e-3):
        same(recipes.sinkd_loss(s, t, weight=1.0, epsilon=epsilon), torch.tensor(6.0), 1e-6)


def test_dro_between_the_mean_and_the_maximum() -> None:
    losses = double(0.3, 2.0, 0.1, 3.0)
    same(recipes.dro_loss(losses, temperature=1e6), losses.mean(), 1e-5)
    same(recipes.dro_loss(losses, temperature=1e-3), losses.max(), 1e-3)
    x, r = trained(losses), 0.7
    weights = gradient_of(recipes.dro_loss(x, temperature=r), x)
    same(weights, (losses / r).softmax(-1))
    # The primal at its best weights, which beat others.
    value = (weights * losses).sum() - r * (weights * (4 * weights).log()).sum()
    same(recipes.dro_loss(losses, temperature=r), value)
    for other in (double(0.25, 0.25, 0.25, 0.25), double(0.1, 0.3, 0.1, 0.5)):
        assert (other * losses).sum() - r * (other * (4 * other).log()).sum() < value


def test_dro_keeps_an_infinite_and_an_empty_batch() -> None:
    assert recipes.dro_loss(torch.tensor([1.0, torch.inf]), temperature=1.0) == math.inf
    assert recipes.dro_loss(torch.zeros(0), temperature=1.0) == 0


def test_depict_targets() -> None:
    """Rows sum to 1. Uniform frequencies leave P; rows with one class stay; a class of many rows attracts fewer."""
    targets = recipes.frequency_sharpened_targets(S)
    same(targets.exp().sum(-1), torch.ones(5))
    same(recipes.frequency_sharpened_targets(S, frequencies=UNIFORM.exp()), S.log_softmax(-1))
    sure = torch.where(torch.eye(7).bool(), 0.0, -torch.inf)[:5]
    for powers in ((1.0, 0.5), (2.0, 1.0)):
        got = recipes.frequency_sharpened_targets(sure, power=powers[0], frequency_power=powers[1])
        same(got.exp(), sure.exp())
    rare = torch.tensor([[0.0, 0.0, -200.0], [0.0, 1.0, -200.0]])
    assert recipes.frequency_sharpened_targets(rare).isfinite().all()
    same_rows = S[:1].expand(5, 7)
    got = recipes.frequency_sharpened_targets(same_rows)
    most = int(S[0].argmax())
    assert (got.exp()[:, most] < S[0].softmax(-1)[most]).all()


def test_depict_minimises_a_kl() -> None:
    """Its gradient is that of KL(Q‖P), (P − Q)/N, whatever the targets' sum is."""
    s, targets = trained(S), recipes.frequency_sharpened_targets(T, power=2.0, frequency_power=1.0)
    gradient = gradient_of(recipes.soft_cross_entropy(s, targets + 3.0), s)
    same(gradient, (S.softmax(-1) - targets.exp()) / 5)
    same(recipes.soft_cross_entropy(S, targets, temperature=2.0), recipes.soft_cross_entropy(S / 2, targets))


def test_marginal_kl_of_its_own_marginal_and_of_one_row() -> None:
    """0 for the prior that it is; of one row KL(q ‖ π), with the reverse KL's gradient."""
    s = trained(S)
    loss = recipes.marginal_kl(s, S.softmax(-1).mean(0).log())
    same(loss, torch.zeros(()))
    same(gradient_of(loss, s), torch.zeros(5, 7))
    one, prior = trained(S[:1]), T[0].log_softmax(-1)
    loss, expected = recipes.marginal_kl(one, prior), kk.reverse_kl(one, prior[None])
    same(loss, expected)
    same(gradient_of(loss, one), gradient_of(expected, one))
    # A class that no row has and the prior has not adds nothing, to the gradient neither.
    gone = torch.where(torch.arange(7) == 3, -torch.inf, S).requires_grad_()
    loss = recipes.marginal_kl(gone, torch.where(torch.arange(7) == 3, -torch.inf, UNIFORM))
    assert loss.isfinite()
    assert gradient_of(loss, gone).isfinite().all()


def test_repri_without_pixels() -> None:
    """An image without labels, or without valid pixels, counts 0, and NaN there changes nothing."""
    nothing = torch.zeros(5, dtype=torch.bool)
    s, q = trained(torch.full_like(S, torch.nan)), trained(torch.full_like(S, torch.nan))
    loss = recipes.repri_loss(s, torch.full((5,), -100), q, UNIFORM, query_mask=nothing)
    assert loss == 0
    for x in (s, q):
        assert (gradient_of(loss, x) == 0).all()


def test_consistency_of_equal_views_is_0() -> None:
    for distance in ("mse", "kl"):
        s = trained(S)
        loss = recipes.semixup_loss(s, s, s, s, distance=distance)  # type: ignore[arg-type]
        same(loss, torch.zeros(()))
        same(gradient_of(loss, s), torch.zeros(5, 7))
    same(recipes.mutual_kl(S, S + 2.0), torch.zeros(()))
    same(recipes.mutual_kl(S, S, double_softmax=True), torch.zeros(()))


def test_local_entropy_of_uniform_frequencies_is_the_entropy() -> None:
    s = trained(S)
    got, expected = recipes.local_entropy(s, UNIFORM, temperature=0.5), kk.entropy(s, temperature=0.5).mean()
    same(got, expected)
    same(gradient_of(got, s), gradient_of(expected, s))


def test_the_mean_entropy_is_largest_for_uniform_rows() -> None:
    same(recipes.mean_entropy_maximisation(torch.zeros(5, 7).double()), torch.zeros(()))
    sure = torch.zeros(5, 7).double()
    sure[:, 2] = 90.0
    same(recipes.mean_entropy_maximisation(sure), -2 * UNIFORM[0])


def test_legogcd_of_its_parts() -> None:
    """With all rows labelled it is SimGCD's; without labels and with a threshold of 1 there is no local entropy."""
    labels = torch.tensor([0, 1, 2, 3, 4])
    shared = {"known_classes": 7, "teacher_temperature": 0.05}
    got = recipes.legogcd_loss(S, T, labels, UNIFORM, supervised_weight=1.0, **shared)
    both = torch.cat([S, T])
    expected = -kk.selective_log_softmax(both, torch.cat([labels, labels]), temperature=0.1).mean()
    same(got, expected)
    none = torch.full((5,), -100)
    apart = [
        recipes.legogcd_loss(S, T, none, UNIFORM, supervised_weight=1.0, threshold=x, **shared) for x in (0.0, 2.0)
    ]
    same(apart[0], 2 * recipes.local_entropy(both, UNIFORM))
    assert apart[1] == 0


def test_priors_and_frequencies_get_no_gradient() -> None:
    prior, s = trained(UNIFORM), trained(S)
    labels = torch.tensor([0, -100, 2, -100, 1])
    for loss in (
        recipes.repri_loss(s, labels, T, prior), recipes.marginal_kl(s, prior),
        recipes.local_entropy(s, prior, temperature=0.7),
        recipes.soft_cross_entropy(s, recipes.frequency_sharpened_targets(T, frequencies=prior.exp())),
        recipes.legogcd_loss(s, T, labels, prior, known_classes=3, teacher_temperature=0.05),
    ):  # fmt: skip
        assert torch.autograd.grad(loss, prior, allow_unused=True, retain_graph=True)[0] is None
        assert gradient_of(loss, s).abs().max() > 1e-3


def test_bfloat16() -> None:
    s, t, old = (x.bfloat16() for x in (S, T, OLD))
    s.requires_grad_()
    labels = torch.tensor([0, -100, 2, -100, 1])
    for loss in (
        recipes.sinkd_loss(s, t, weight=1.0), recipes.marginal_kl(s, UNIFORM), recipes.softmax_mse(s, t),
        recipes.semixup_loss(s, t, old, t, distance="kl"), recipes.local_entropy(s, UNIFORM),
        recipes.legogcd_loss(s, t, labels, UNIFORM, known_classes=3, teacher_temperature=0.05),
        recipes.soft_cross_entropy(s, recipes.frequency_sharpened_targets(t)),
    ):  # fmt: skip
        assert gradient_of(loss, s).dtype == torch.bfloat16
        assert gradient_of(loss, s).isfinite().all()
        assert (gradient_of(loss, s) != 0).any()


def test_errors() -> None:
    for wrong in (
        lambda: recipes.sinkd_loss(S, T[:1]), lambda: recipes.sinkd_loss(S[0], T[0]),
        lambda: recipes.sinkd_loss(S, T, mask=torch.ones(1)), lambda: recipes.dro_loss(S, temperature=1.0, mask=S[:1]),
        lambda: recipes.frequency_sharpened_targets(S, frequencies=torch.ones(1)),
        lambda: recipes.soft_cross_entropy(S, T[:1]), lambda: recipes.marginal_kl(S, UNIFORM[:1]),
        lambda: recipes.marginal_kl(S, UNIFORM, mask=torch.ones(1)),
        lambda: recipes.repri_loss(S, torch.zeros(1).long(), T, UNIFORM),
        lambda: recipes.repri_loss(S, torch.zeros(5).long(), T, UNIFORM, query_mask=torch.ones(1)),
        lambda: recipes.softmax_mse(S, T[:1]), lambda: recipes.softmax_mse(S, T, mask=torch.ones(1)),
        lambda: recipes.semixup_loss(S, T, T, T[:1]), lambda: recipes.mutual_kl(S, T[:1]),
        lambda: recipes.mutual_kl(S, T[:1], double_softmax=True), lambda: recipes.local_entropy(S, UNIFORM[:1]),
        lambda: recipes.legogcd_loss(
            S, T, torch.zeros(1).long(), UNIFORM, known_classes=2, teacher_temperature=0.05),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="shape"):
            wrong()
    with pytest.raises(ValueError, match=r"sinkd_loss: epsilon is 0"):
        recipes.sinkd_loss(S, T, epsilon=0)
    with pytest.raises(ValueError, match=r"dro_loss: temperature is 0"):
        recipes.dro_loss(S, temperature=0)
    with pytest.raises(ValueError, match=r"semixup_loss: distance is 'js'; expected mse or kl"):
        recipes.semixup_loss(S, T, S, T, distance="js")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"legogcd_loss: known_classes is 9"):
        recipes.legogcd_loss(S, T, torch.zeros(5).long(), UNIFORM, known_classes=9, teacher_temperature=0.05)
