"""What papers 2, 18, 20, 22, 28, 31, 42 say of their losses, as identities and exact expectations over four tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from recipe_case import S, T, batch, double, gradient_of, logprob, same
from torch import Tensor, nn

import kldiv_kernels as kk
from kldiv_kernels import recipes

BATCH = batch(sequences=6, seed=31)
LOGITS, IDS, MASK, ADVANTAGES = (BATCH[name] for name in ("logits", "token_ids", "mask", "advantages"))
OLD, REFERENCE = BATCH["old_logprobs"], BATCH["base_logprobs"]
GIVEN: dict[str, Any] = {"old_logprobs": OLD, "mask": MASK}
KL: dict[str, Any] = {"reference_logprobs": REFERENCE, "kl_coef": 0.3}
Q, P = (double(*x).softmax(-1) for x in (S, T))


def of(loss: kk.PolicyLoss, logits: Tensor) -> tuple[Tensor, Tensor]:
    return loss.loss.detach(), gradient_of(loss.loss, logits)


def alike(one: kk.PolicyLoss, other: kk.PolicyLoss, logits: Tensor) -> None:
    for x, y in zip(of(one, logits), of(other, logits), strict=True):
        same(x, y)
    assert gradient_of(one.loss, logits).abs().max() > 1e-3


def test_without_the_kl_each_is_its_clipped_loss() -> None:
    logits = LOGITS.clone().requires_grad_()
    free = GIVEN | {"reference_logprobs": REFERENCE, "kl_coef": 0.0}
    plain = {"loss_type": "grpo", "aggregation": "token-mean", **GIVEN}
    for version in (1, 2):
        alike(
            recipes.prorl_loss(logits, IDS, ADVANTAGES, version=version, **free),  # type: ignore[arg-type]
            kk.policy_loss(logits, IDS, ADVANTAGES, clip_high=0.4, **plain), logits,
        )  # fmt: skip
    apo = recipes.apo_loss(logits, IDS, ADVANTAGES, torch.rand(6), **free)
    alike(apo, kk.policy_loss(logits, IDS, ADVANTAGES, **plain), logits)
    grpo = kk.policy_loss(logits, IDS, ADVANTAGES, **GIVEN)
    alike(recipes.fg_expo_loss(logits, IDS, ADVANTAGES, 0.3, **free), grpo, logits)
    rapo: dict[str, Any] = {"kl_coef": 0.0, "entropy_coef": 0.0, **GIVEN}
    for kl in ("full", "f3", "f3_is"):
        one = recipes.rapo_loss(logits, BATCH["teacher_logits"], IDS, ADVANTAGES, torch.rand(6), kl=kl, **rapo)  # type: ignore[arg-type]
        alike(one, grpo, logits)


@pytest.mark.parametrize("version", [1, 2])
def test_prorl_after_a_reset(version: Any) -> None:
    """A reference that is the policy: no KL, and no pull of it."""
    logits = LOGITS.clone().requires_grad_()
    own = GIVEN | {"reference_logprobs": logprob(LOGITS, IDS), "version": version}
    found = recipes.prorl_loss(logits, IDS, ADVANTAGES, kl_coef=5.0, **own)
    assert found.metrics["kl"].abs() < 1e-15
    alike(found, recipes.prorl_loss(logits, IDS, ADVANTAGES, kl_coef=0.0, **own), logits)


def test_the_weights_of_apo() -> None:
    """The facts' table, by the difficulty, and the limit at its jump."""
    d = double(0, 0.125, 0.25, 0.5, 0.75, 0.875, 1, 1e-9)
    table = double(1, 0.9073, 0.8698, 0.7431, 0.4932, 0.2881, 1, 0.934)
    same(recipes.dads_weights(torch.ones(8).double(), 1 - d), table, 1e-4)
    assert (recipes.dads_weights(-torch.ones(8).double(), 1 - d) == 1).all()
    logits = LOGITS.clone().requires_grad_()
    whole = {"old_logprobs": OLD, "reference_logprobs": REFERENCE, "kl_coef": 0.3}
    alike(
        recipes.apo_loss(logits, IDS, ADVANTAGES, torch.ones(6), **whole),
        kk.policy_loss(logits, IDS, ADVANTAGES, aggregation="token-mean", **whole), logits,
    )  # fmt: skip


def test_the_advantages_of_apo_grow_with_the_length() -> None:
    lengths = torch.tensor([100, 50, 100, 101, 200, 10**6, 10**9])
    correct = torch.arange(7) == 0
    found = recipes.stcr_advantages(-torch.ones(7).double(), lengths, correct, torch.zeros(7, dtype=torch.int64))
    assert found[:3].tolist() == [-1, -1, -1]
    assert (found[2:].diff() < 0).all()
    assert found.min() >= -2
    alone = recipes.stcr_advantages(-torch.ones(7), lengths, correct & False, torch.zeros(7, dtype=torch.int64))
    assert (alone == -1).all()


def test_the_kl_of_fg_expo_loosens_where_few_answers_are_right() -> None:
    logits, correct = LOGITS.clone().requires_grad_(), double(1, 0, 0, 1, 0, 0)
    found = recipes.fg_expo_loss(logits, IDS, ADVANTAGES, correct, **GIVEN, **KL)
    alike(found, recipes.fg_expo_loss(logits, IDS, ADVANTAGES, 1 / 3, **GIVEN, **KL), logits)
    coef = recipes.schedules.accuracy_conditioned_coef(1 / 3, coef=0.3)
    alike(
        found, kk.policy_loss(logits, IDS, ADVANTAGES, reference_logprobs=REFERENCE, kl_coef=coef, **GIVEN), logits
    )  # fmt: skip
    table = [recipes.schedules.accuracy_conditioned_coef(x, coef=1.0) for x in (0.0, 0.5, 1.0)]
    assert table == pytest.approx([0.5, 0.7311, 0.8808], abs=1e-4)


def test_prompts_of_middling_difficulty_are_drawn_most() -> None:
    averages = None
    for _ in range(200):
        weights, averages = recipes.difficulty_sampling_weights(double(0.0, 0.5, 1.0, math.nan), averages)
    same(averages, double(0, 0.5, 1, 0.5), 1e-6)
    same(weights, double(math.exp(-0.25 / 0.245), 1, math.exp(-0.25 / 0.245), 1), 1e-6)


def test_the_mean_of_models() -> None:
    models = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(torch.bfloat16) for _ in range(3)]
    weights = (0.2, 0.3, 0.5)
    found = recipes.mixtures.average_weights(models, weights)
    for name, x in found.items():
        of_models = [model.state_dict()[name] for model in models]
        assert x.dtype == of_models[0].dtype
        assert all(x.data_ptr() != y.data_ptr() for y in of_models)
        wanted = sum(w * y.double() for w, y in zip(weights, of_models, strict=True))
        same(x, wanted if x.is_floating_point() else of_models[0])
    twice = recipes.mixtures.average_weights([models[0], models[0].state_dict()])
    assert all(torch.equal(x, models[0].state_dict()[name]) for name, x in twice.items())
    models[1].load_state_dict(found)
    for given in ((0.5, 0.5), (0.5, 0.5, 0.5)):
        with pytest.raises(ValueError, match=r"average_weights: weights is \[0.5, 0.5"):
            recipes.mixtures.average_weights(models, given)
    with pytest.raises(ValueError, match="average_weights: model 1 has other tensors than model 0"):
        recipes.mixtures.average_weights([models[0], nn.Linear(3, 4)])


def expected(function: Any, logits: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_y w_y·loss(y) and its gradient: the four tokens in four sequences of one token."""
    each = logits[None, None].expand(4, 1, 4)
    per_token = function(each, torch.arange(4)[:, None]).per_token_loss
    value = (weights * per_token[:, 0]).sum()
    gradients = []
    for y in range(4):
        loss = function(each[y : y + 1], torch.tensor([[y]])).loss
        gradients.append(weights[y] * gradient_of(loss, logits))
    return value, sum(gradients)


@pytest.mark.parametrize(("generator", "factor"), [("forward_kl", 1), ("js", 2), ("alpha", 1)])
def test_dph_over_the_references_samples_is_the_divergence(generator: Any, factor: int) -> None:
    logits, reference = double(*S).requires_grad_(), P.log()

    def loss(x: Tensor, ids: Tensor) -> kk.PolicyLoss:
        return recipes.dph_loss(x, ids, reference[ids], coef=0.7, generator=generator)

    value, gradient = expected(loss, logits, P)
    exact = 0.7 * factor * kk.token_stats(logits[None], double(*T)[None], stats=(generator,), alpha=0.2)[generator][0]
    same(value, exact)
    same(gradient, gradient_of(exact, logits))
    assert gradient.abs().max() > 1e-2


@pytest.mark.parametrize("far", [-1e4, -200.0, 0.0, 50.0])
def test_dph_far_from_the_reference(far: float) -> None:
    logits = LOGITS.float().requires_grad_()
    reference = logprob(logits.detach(), IDS) - far
    for generator in ("forward_kl", "js", "alpha"):
        out = recipes.dph_loss(logits, IDS, reference, coef=1.0, generator=generator, mask=MASK)  # type: ignore[arg-type]
        assert out.loss.isfinite()
        assert gradient_of(out.loss, logits).isfinite().all()
        assert far != 0 or out.loss.abs() < 1e-6


def test_rapo_at_the_ends_of_the_power() -> None:
    logits, teacher = LOGITS.clone().requires_grad_(), BATCH["teacher_logits"]
    options: dict[str, Any] = {"kl_coef": 0.3, "entropy_coef": 0.1, **GIVEN}
    plain = kk.policy_loss(logits, IDS, ADVANTAGES, reference_logits=teacher, kl_estimator="forward_kl", **options)
    alike(recipes.rapo_loss(logits, teacher, IDS, ADVANTAGES, torch.ones(6).double(), **options), plain, logits)
    row, one = double(*S)[None, None], torch.zeros(1).double()
    uniform = recipes.rapo_loss(
        row, double(*T)[None, None], torch.tensor([[1]]), one, one, old_logprobs=Q[1].log()[None, None], kl_coef=1.0,
        entropy_coef=0.0,
    )  # fmt: skip
    same(uniform.loss, -math.log(4) - Q.log().mean(), 1e-5)


def test_the_sampled_form_of_rapo_times_the_ratio_has_the_kls_gradient() -> None:
    logits = double(*S).requires_grad_()

    def loss(x: Tensor, ids: Tensor) -> kk.PolicyLoss:
        zero = torch.zeros(len(ids)).double()
        return recipes.rapo_loss(
            x, double(*T).expand(x.shape), ids, zero, zero + 0.5, old_logprobs=Q.log()[ids], kl_coef=1.0,
            entropy_coef=0.0, kl="f3_is",
        )  # fmt: skip

    value, gradient = expected(loss, logits, Q)
    target = (double(*T) / 2).softmax(-1)
    same(value, (target * (target / Q).log()).sum())
    same(gradient, Q - target)


def test_chi2_of_the_reference_itself() -> None:
    logits = LOGITS.clone().requires_grad_()
    for root, wanted in (("batch", 0.01), ("token", 0.01), ("none", 0.0)):
        out = recipes.chi2_penalty(logits, LOGITS, coef=1.0, root=root, mask=MASK)  # type: ignore[arg-type]
        same(out, double(wanted)[0])
        assert gradient_of(out, logits).abs().max() < 1e-12


def test_the_sampled_chi2() -> None:
    logits = double(*S).requires_grad_()
    log_ratio = logits.log_softmax(-1) - P.log()
    kl, chi2 = recipes.chi2_estimate(log_ratio)
    assert (chi2 >= 0).all()
    same(chi2, 2 * log_ratio.cosh() - 2)
    same((Q * kl).sum(), (Q * (Q / P).log()).sum())
    same((Q * chi2).sum(), ((Q - P).square() / P).sum())
    exact = kk.token_stats(logits[None], double(*T)[None], stats=("reverse_chi2", "forward_kl"))
    same(gradient_of((Q * chi2).sum(), logits), gradient_of(exact.reverse_chi2[0] / 2 + exact.forward_kl[0], logits))
    for bound in (-10.0, 10.0):
        near = (double(bound - 1e-6, bound + 1e-6)).requires_grad_()
        for estimate in recipes.chi2_estimate(near):
            slopes = gradient_of(estimate.sum(), near)
            assert (slopes[0] - slopes[1]).abs() <= 1e-5 * slopes.abs().max()


def test_what_is_wrong_is_named() -> None:
    given = (LOGITS, IDS, ADVANTAGES)
    zero = torch.zeros(6).double()
    for call, message in (
        (lambda: recipes.prorl_loss(*given, version=3, **GIVEN, **KL), "prorl_loss: version is 3; expected 1 or 2"),
        (lambda: recipes.stcr_advantages(zero, IDS[:, 0], zero > 0, IDS[:, 0], base=1.0), "base is 1.0; expected a"),
        (lambda: recipes.stcr_advantages(zero, IDS[:1, 0], zero > 0, IDS[:, 0]), r"lengths has shape \[1\]; expected"),
        (lambda: recipes.dads_weights(zero, zero[:1]), r"accuracy has shape \[1\]; expected \[6\] like advantages"),
        (lambda: recipes.difficulty_sampling_weights(zero, width=0), "width is 0, momentum 0.9; expected width > 0"),
        (lambda: recipes.difficulty_sampling_weights(zero, zero[:1]), r"averages has shape \[1\]; expected \[6\]"),
        (lambda: recipes.dph_loss(LOGITS, IDS, OLD, coef=1.0, generator="tvd"), "generator is 'tvd'; expected forward"),
        (lambda: recipes.dph_loss(LOGITS, IDS, OLD, coef=1.0, alpha=0.5), "alpha is 0.5; generator 'forward_kl' has"),
        (lambda: recipes.rapo_loss(LOGITS, LOGITS, *given[1:], zero, kl="k3", kl_coef=1.0, entropy_coef=0.0, **GIVEN),
         "rapo_loss: kl is 'k3'; expected full, f3 or f3_is"),
        (lambda: recipes.chi2_penalty(LOGITS, LOGITS, coef=1.0, root="all"), "root is 'all'; expected batch, token or"),
        (lambda: recipes.chi2_penalty(LOGITS, LOGITS, coef=1.0, root="none", floor=0.1), "floor is 0.1; it is one of"),
        (lambda: recipes.occupancy_reward_penalty(zero, coef=1.0, kind="tv"), "kind is 'tv'; expected sqrt_chi2, chi2"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()  # type: ignore[no-untyped-call]
