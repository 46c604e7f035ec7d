"""What recipes take from the policy losses: weights of the KL, a reference of its own temperature, and single terms."""

from __future__ import annotations

import math
from typing import Any

import policy_oracle as oracle
import pytest
import torch
from checks import BACKENDS
from policy_two_forms import VOCAB, both, check
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.policy import importance, kl_estimate, surrogate

CASES: dict[str, dict[str, Any]] = {
    "sampled": {"kl": True, "kl_estimator": "k2"},
    "corrected": {"kl": True, "kl_bias_correction": True, "aggregation": "token-mean"},
    "exact": {"exact": True, "kl_estimator": "forward_kl", "reference_temperature": 2.0},
    "sequences": {"kl": True, "loss_type": "gspo"},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_kl_weights(name: str, backend: str) -> None:
    """Value and gradient are those of the loss without a KL, and of each token's KL times its weight."""
    batch = oracle.batch(2, vocab=VOCAB)
    weights = torch.rand(batch.mask.shape).masked_fill(~batch.mask, torch.nan)
    out, logits, want, exact = both(batch, backend, torch.float32, kl_weights=weights, **CASES[name])
    check(out, logits, want, exact)
    plain, *_ = both(batch, backend, torch.float32, **CASES[name])
    none, *_ = both(batch, backend, torch.float32, **(CASES[name] | {"kl_coef": 0.0}))
    kl = plain.per_token_loss - none.per_token_loss
    wanted = none.per_token_loss + torch.where(batch.mask, weights * kl, 0.0)
    torch.testing.assert_close(out.per_token_loss, wanted, rtol=1e-5, atol=1e-6)
    assert (out.per_token_loss - plain.per_token_loss).abs().max() > 1e-2
    for metric in ("kl", "exact_kl"):
        assert out.metrics.get(metric) == plain.metrics.get(metric)


@pytest.mark.parametrize("temperature", [0.5, "per token"])
@pytest.mark.parametrize("estimator", ["forward_kl", "js", "k3"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reference_of_its_own_temperature(backend: str, estimator: str, temperature: float | str) -> None:
    batch = oracle.batch(3, vocab=VOCAB)
    tau = torch.rand(batch.mask.shape) + 0.5 if temperature == "per token" else temperature
    out, logits, want, exact = both(
        batch, backend, torch.float32, exact=True, kl_estimator=estimator, reference_temperature=tau, temperature=0.8
    )
    check(out, logits, want, exact)
    # Dividing the reference's logits by hand, at the policy's temperature, is the same.
    divisor = tau[..., None] if isinstance(tau, Tensor) else tau
    by_hand = kk.policy_loss(
        exact, batch.token_ids, batch.advantages, old_logprobs=batch.old, mask=batch.mask, kl_coef=0.3,
        kl_estimator=estimator, reference_logits=batch.reference_logits.float().double() / divisor * 0.8,
        temperature=0.8, backend="reference",
    )  # fmt: skip
    assert out.loss.item() == pytest.approx(by_hand.loss.item(), rel=1e-4)
    with pytest.raises(ValueError, match="reference_temperature is given; it divides reference_logits"):
        kk.policy_loss(logits, batch.token_ids, batch.advantages.float(), reference_temperature=2.0)


def test_the_surrogate_and_its_bounds() -> None:
    log_ratio = torch.tensor([-1.0, -0.1, 0.0, 0.5, 2.0, 90.0] * 2, dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.5] * 6 + [-0.5] * 6, dtype=torch.float64)
    term = surrogate(log_ratio, advantages, clip_low=0.1, clip_high=0.3, dual_clip=2.0)
    r = log_ratio.detach().exp()
    wanted = torch.maximum(-r * advantages, -r.clamp(0.9, 1.3) * advantages)
    wanted = torch.where(advantages < 0, torch.minimum(wanted, -2.0 * advantages), wanted)
    torch.testing.assert_close(term.per_token, wanted)
    (gradient,) = torch.autograd.grad(term.per_token.sum(), log_ratio)
    moves = torch.tensor([1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(gradient, -moves * r * advantages)
    assert term.clipped["high"].tolist() == [False] * 3 + [True] * 3 + [False] * 6
    assert term.clipped["dual"].tolist() == [False] * 10 + [True] * 2


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs", "k3_plus", "f3"])
def test_estimates_over_a_whole_vocabulary(estimator: str) -> None:
    """Exact expectations over eight tokens in place of samples, values and gradients by the table in weights.py."""
    generator = torch.Generator().manual_seed(1)
    s, t = (torch.randn(8, generator=generator, dtype=torch.float64) for _ in range(2))
    s.requires_grad_()
    logp, logq = t.log_softmax(-1), s.log_softmax(-1)
    q = logq.detach().exp()
    forward, reverse = (logp.exp() * (logp - logq)).sum(), (logq.exp() * (logq - logp)).sum()
    to_forward, to_reverse = (torch.autograd.grad(kl, s, retain_graph=True)[0] for kl in (forward, reverse))
    estimate = kl_estimate(logq, logp, estimator)
    value = {"f3": forward, "k1": reverse, "k3": reverse, "k3_plus": reverse}.get(estimator)
    if value is not None:
        torch.testing.assert_close((q * estimate).sum(), value)
    direction = {"k1": torch.zeros_like(s), "k2": to_reverse, "k3": to_forward, "k3_plus": to_reverse}.get(estimator)
    if direction is not None:
        (found,) = torch.autograd.grad((q * estimate).sum(), s, retain_graph=True)
        torch.testing.assert_close(found, direction)
    if estimator in ("k3", "f3"):
        # Times the ratio, with its gradient, the gradient is that of the value.
        corrected = importance(estimate, logq, logq.detach())
        (found,) = torch.autograd.grad((q * corrected).sum(), s)
        torch.testing.assert_close(found, to_reverse if estimator == "k3" else to_forward)


def test_estimates_where_numbers_end() -> None:
    """e^x overflows, underflows or is clamped: values and gradients are the formulas' limits, and none is NaN."""
    logprob = torch.tensor([-1.0, -800.0, -torch.inf, -1.0], requires_grad=True)
    reference = torch.tensor([-900.0, -1.0, -1.0, -torch.inf])
    found = kl_estimate(logprob, reference, "f3")
    assert found.tolist() == [1.0, math.inf, math.inf, 1.0]
    (gradient,) = torch.autograd.grad(found.sum(), logprob)
    assert gradient.tolist() == [0.0, -math.inf, -math.inf, 0.0]
    held = kl_estimate(logprob, reference, "f3", log_ratio_clamp=5.0, clamp=100.0)
    assert held.tolist() == pytest.approx([1 - 6 * math.exp(-5), 100.0, 100.0, 1 - 6 * math.exp(-5)], rel=1e-5)
    assert torch.autograd.grad(held.sum(), logprob)[0].tolist() == [0.0] * 4
    assert importance(torch.zeros(1), torch.tensor([500.0]), torch.zeros(1)).item() == 0.0


@pytest.mark.parametrize("loss_type", ["grpo", "gspo", "dapo"])
@pytest.mark.parametrize("form", ["one read", "per token", "without gradient"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sampled_token_without_probability_has_a_ratio_of_1_to_itself(
    backend: str, form: str, loss_type: Any
) -> None:
    logits = torch.tensor([[[0.0, 1.0, -torch.inf, 2.0], [0.0, 1.0, 0.0, 2.0]]])
    logits.requires_grad_(form != "without gradient")
    out = kk.policy_loss(
        logits, torch.tensor([[2, 0]]), torch.tensor([1.0]), loss_type=loss_type, backend=backend,
        per_token_gradient=form == "per token",
    )  # fmt: skip
    assert out.loss.item() == -1.0
    assert (out.metrics["ratio_mean"], out.metrics["approx_kl"]) == (1.0, 0.0)
    # What is NaN itself is seen.
    wrong = logits.detach().clone()
    wrong[0, 0, 0] = torch.nan
    again = kk.policy_loss(
        wrong.requires_grad_(logits.requires_grad), torch.tensor([[2, 0]]), torch.tensor([1.0]), loss_type=loss_type,
        backend=backend,
    )  # fmt: skip
    assert again.loss.isnan()
    assert again.metrics["ratio_mean"].isnan()
