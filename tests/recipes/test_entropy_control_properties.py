"""What papers 1, 81 and 83 say of their losses, as identities; and SAFE's controller beside its code's numbers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from recipe_case import S, batch, double, gradient_of, logprob, same
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels import recipes
from kldiv_kernels.recipes.schedules import SafeController

BATCH = batch(sequences=6, tokens=9, seed=32)
LOGITS, IDS, MASK, ADVANTAGES = (BATCH[name] for name in ("logits", "token_ids", "mask", "advantages"))
OLD, REFERENCE = BATCH["old_logprobs"], BATCH["base_logprobs"]
GIVEN: dict[str, Any] = {"old_logprobs": OLD, "mask": MASK}
TOKENS: dict[str, Any] = {"aggregation": "token-mean", **GIVEN}


def alike(one: kk.PolicyLoss, other: kk.PolicyLoss, logits: Tensor) -> None:
    same(one.loss, other.loss)
    same(gradient_of(one.loss, logits), gradient_of(other.loss, logits))
    assert gradient_of(one.loss, logits).abs().max() > 1e-3


def high() -> SafeController:
    controller = SafeController()
    controller.record(8.0)
    return controller


@pytest.mark.parametrize("detach", [True, False])
def test_safe_below_the_limit_is_ppo_with_an_entropy_bonus(detach: bool) -> None:
    logits = LOGITS.clone().requires_grad_()
    options = {"reference_logprobs": REFERENCE, "detach_penalty": detach, "controller": SafeController()}
    found = recipes.safe_loss(logits, IDS, ADVANTAGES, **options, **GIVEN)
    alike(found, kk.policy_loss(logits, IDS, ADVANTAGES, entropy_coef=0.01, **TOKENS), logits)
    assert found.metrics["penalty"] == 0


def test_the_released_penalty_of_safe_pulls_nothing() -> None:
    logits = LOGITS.clone().requires_grad_()
    found, elsewhere, pulling = (
        recipes.safe_loss(
            logits, IDS, ADVANTAGES, controller=high(), reference_logprobs=reference, detach_penalty=detach, **GIVEN
        )
        for reference, detach in ((REFERENCE, True), (REFERENCE - 1, True), (REFERENCE, False))
    )
    assert elsewhere.loss > found.loss
    same(gradient_of(found.loss, logits), gradient_of(elsewhere.loss, logits))
    same(found.loss, pulling.loss)
    assert (gradient_of(found.loss, logits) - gradient_of(pulling.loss, logits)).abs().max() > 1e-4


def test_the_penalty_of_safe() -> None:
    controller = SafeController(momentum=0.0)
    assert controller.penalty(0.5, 1.0) == pytest.approx(0.0072727273, abs=1e-10)
    # A high entropy halves it, and no more.
    assert controller.penalty(0.5, 50.0) == pytest.approx(0.5 * 0.1 * 0.04)
    kl = double(0.9).requires_grad_()
    controller = high()
    penalty = controller.penalty(kl, double(1.3))
    assert isinstance(penalty, Tensor)
    same(gradient_of(penalty.sum(), kl), double(float(controller.slope(0.9, 1.3))))
    same(recipes.soft_min(double(1, 2)), double(1.19743)[0], 1e-5)
    same(recipes.soft_min(double(2, 2, 2)), double(2)[0])


def test_the_controller_of_safe_as_its_code_has_it() -> None:
    controller, rewards = SafeController(), [0.1, 0.9, 0.5, -3.0, 8.0, 0.2, 0.2]
    phases, kls = [1.5, 1.5, 1.2, 0.8, 1.0, 0.8, 1.0], [0.1, 2.0, 4.0, 1.0, 0.5, 9.0, 0.0]
    short, average, integral, last = 0.0, None, 0.0, 0.0
    for reward, phase, kl in zip(rewards, phases, kls, strict=True):
        correction = 0.0
        if average is None:
            average = reward
        else:
            before, average = average, 0.95 * average + 0.05 * reward
            error = average - before - 0.001
            integral = max(-1.0, min(1.0, integral + error))
            correction = 0.3 * error + 0.01 * integral + 0.05 * (error - last)
            last = error
        limit = max(0.1, min(0.6, (0.3 + correction) * phase))
        short = 0.9 * short + 0.1 * kl
        wanted = 0.1 * (short - limit) ** 2 * max(0.5, 2.0 / (1.7 + 0.1)) if short > limit else 0.0
        assert controller.update(reward, phase=phase) == pytest.approx(limit, rel=1e-12)
        assert controller.penalty(kl, 1.7) == pytest.approx(wanted, rel=1e-9, abs=1e-15)
        controller.record(torch.tensor(kl, dtype=torch.float64))
        resumed = SafeController()
        resumed.load_state_dict(json.loads(json.dumps(controller.state_dict())))
        assert resumed.state_dict() == controller.state_dict()
        controller = resumed
    for wrong, message in (({"momentum": 1.0}, "momentum is 1.0"), ({"bounds": (0.6, 0.1)}, r"bounds is \(0.6, 0.1\)")):
        with pytest.raises(ValueError, match=f"SafeController: {message}"):
            SafeController(**wrong)  # type: ignore[arg-type]


def spine(logits: Tensor, **options: Any) -> kk.PolicyLoss:
    bands: dict[str, Any] = {"low_coef": 0.0, "high_coef": 0.0} | options
    return recipes.spine_loss(logits, IDS, ADVANTAGES, **GIVEN, **bands)


def test_spine_of_all_tokens_without_a_band_is_grpo() -> None:
    logits = LOGITS.clone().requires_grad_()
    alike(spine(logits, fraction=1.0), kk.policy_loss(logits, IDS, ADVANTAGES, **TOKENS), logits)


def test_the_band_of_spine() -> None:
    logits = double(1.0, 0.2, -0.3, 0.6).expand(1, 3, 4).clone().requires_grad_()
    entropy = kk.token_stats(logits, stats=("entropy",)).entropy
    slope = gradient_of(entropy.sum(), logits)
    every, level = torch.ones(1, 3, dtype=torch.bool), entropy.detach()[0, 0]
    for low, high, factor in ((level - 1, level + 1, 0.0), (level - 2, level - 1, 0.7), (level + 1, level + 2, -0.4)):
        found = recipes.entropy_band(entropy, every, low, high, low_coef=0.4, high_coef=0.7)
        same(gradient_of(found.sum(), logits), factor * slope)
    # All alike: Otsu's threshold is their entropy, all are chosen, and none is outside the band.
    ids, zero = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1).double()
    out = recipes.spine_loss(
        logits, ids, zero, old_logprobs=logprob(logits.detach(), ids), low_coef=9.0, high_coef=9.0, threshold="otsu"
    )
    assert out.metrics["selected_fraction"] == 1
    assert gradient_of(out.loss, logits).abs().max() < 1e-12


def test_otsu_of_each_sequence_is_that_of_its_tokens() -> None:
    scores = BATCH["teacher_logits"][..., 0]
    found = recipes.selection.otsu_threshold(scores, MASK, per_sequence=True)
    same(found, torch.stack([recipes.selection.otsu_threshold(x[m], m[m]) for x, m in zip(scores, MASK, strict=True)]))
    assert recipes.selection.otsu_threshold(scores[:, :0], MASK[:, :0], per_sequence=True).tolist() == [0] * 6
    assert recipes.selection.otsu_threshold(scores, MASK & False, per_sequence=True).tolist() == [0] * 6


def lp_reg(logits: Tensor, advantages: Tensor, proxy: Tensor, old: Tensor = OLD, **options: Any) -> kk.PolicyLoss:
    return recipes.lp_reg_loss(
        logits, IDS, advantages, old_logprobs=old, proxy_logprobs=proxy, mask=MASK, fraction=1.0, **options
    )


def test_lp_reg_leaves_ppo_where_it_has_nothing_to_do() -> None:
    logits, old = LOGITS.clone().requires_grad_(), OLD - torch.linspace(-4, 4, 54).reshape(6, 9)
    ppo = kk.policy_loss(logits, IDS, ADVANTAGES, old_logprobs=old, mask=MASK, aggregation="token-mean", clip_low=1.0,
                         clip_high=9.0)  # fmt: skip
    alike(lp_reg(logits, ADVANTAGES, OLD + 1, old, beta=0.0), ppo, logits)
    left_out = lp_reg(logits, ADVANTAGES, torch.full_like(OLD, -torch.inf), old)
    alike(left_out, ppo, logits)
    assert left_out.metrics["selected_fraction"] == 0
    assert lp_reg(logits, ADVANTAGES.abs(), OLD + 1, old).metrics["selected_fraction"] == 0
    # Nothing is filtered, and the policy is the one that sampled.
    whole, log_mass = recipes.min_p_proxy(LOGITS, IDS, kappa=0.0, mask=MASK)
    assert log_mass.abs().max() < 1e-12
    assert lp_reg(logits, -torch.ones(6), whole - 1e-12).metrics["selected_fraction"] == 0


def test_on_the_sampling_policy_the_kl_of_the_proxy_is_its_lost_mass() -> None:
    s = double(*S)[None, None]
    ids, minus = torch.tensor([[1, 1]]), -torch.ones(1).double()
    logits = s.expand(1, 2, 4).clone().requires_grad_()
    old = logprob(logits.detach(), ids)
    proxy, log_mass = recipes.min_p_proxy(logits.detach(), ids, kappa=0.1)
    keep = s[0, 0].exp() >= 0.1 * s.exp().max()
    assert keep.tolist() == [True, True, False, True]
    same(log_mass, s.softmax(-1)[..., keep].sum(-1).log().expand(1, 2))
    full = recipes.lp_reg_full_loss(logits, logits.detach(), ids, minus, old_logprobs=old, kappa=0.1, fraction=1.0)
    same(full.metrics["kl"], -log_mass[0, 0])
    target = torch.where(keep, s.softmax(-1), 0.0)
    target = target / target.sum(-1, keepdim=True)
    ratio = kk.policy_loss(logits, ids, minus, old_logprobs=old, aggregation="token-mean", clip_low=1.0, clip_high=9.0)
    pull = gradient_of(full.loss, logits) - gradient_of(ratio.loss, logits)
    same(pull, (s.softmax(-1) - target).expand(1, 2, 4) / 2)
    sampled = recipes.lp_reg_loss(logits, ids, minus, old_logprobs=old, proxy_logprobs=proxy, fraction=1.0)
    z = log_mass[0, 0].exp()
    same(sampled.loss - ratio.loss, 1 / z + z.log() - 1)
    assert recipes.lp_reg_loss(
        logits, ids, minus, old_logprobs=old, proxy_logprobs=proxy, fraction=0.5
    ).metrics["selected_fraction"] == 0  # fmt: skip


def test_min_p_in_bfloat16_drops_what_float32_drops() -> None:
    logits = torch.randn(40, 50).bfloat16()
    ids = torch.randint(0, 50, (40,))
    for vocab in (None, 37):
        found = recipes.min_p_proxy(logits, ids % 37, kappa=0.05, temperature=1.3, vocab_size=vocab)
        wanted = recipes.min_p_proxy(logits.float(), ids % 37, kappa=0.05, temperature=1.3, vocab_size=vocab)
        for x, y in zip(found, wanted, strict=True):
            torch.testing.assert_close(x, y)


def test_what_is_wrong_is_named() -> None:
    zero = torch.zeros(6).double()
    for call, message in (
        (lambda: recipes.soft_min(zero, temperature=0.0), "soft_min: temperature is 0.0; expected a number above 0"),
        (lambda: recipes.safe_value_loss(zero, zero[:1], zero), r"old_values has shape \[1\]; expected \[6\] like"),
        (lambda: spine(LOGITS, threshold="half"), "spine_loss: threshold is 'half'; expected top or otsu"),
        (lambda: spine(LOGITS, threshold="otsu", fraction=0.5), "fraction is 0.5, band None; threshold 'otsu' has"),
        (lambda: spine(LOGITS, fraction=1.5), "spine_loss: fraction is 1.5; expected above 0 and at most 1"),
        (lambda: spine(LOGITS, kl_coef=0.5), "reference_logits is None, kl_coef is 0.5; expected both or neither"),
        (lambda: spine(LOGITS, reference_logits=LOGITS), "reference_logits is given, kl_coef is 0.0; expected both"),
        (lambda: recipes.entropy_band(OLD, MASK, zero[:2], 1.0, low_coef=1.0, high_coef=1.0), r"low has shape \[2\]"),
        (lambda: recipes.min_p_proxy(LOGITS, IDS, kappa=2.0), "kappa is 2.0; expected 0 to 1"),
        (lambda: recipes.lp_reg_loss(LOGITS, IDS, zero, old_logprobs=OLD, proxy_logprobs=OLD, fraction=0.0),
         "lp_reg_loss: fraction is 0.0; expected above 0 and at most 1"),
        (lambda: recipes.lp_reg_full_loss(LOGITS, LOGITS[:1], IDS, zero, old_logprobs=OLD), "old_logits has shape"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()  # type: ignore[no-untyped-call]
