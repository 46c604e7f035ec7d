"""policy_loss: every loss type, aggregations and metrics against the formulas of policy_oracle in float64."""

from __future__ import annotations

import policy_oracle as oracle
import pytest
import torch
from policy_oracle import AGGREGATION, TERMS, arguments_of, check, leaves, nan_where_masked
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.policy import highest_entropy
from kldiv_kernels.policy.options import LOSS_TYPES

AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum"]


@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("name", TERMS)
def test_terms(name: str, per_sequence: bool) -> None:
    """Value, per-token values and gradient, with NaN in every argument where the mask is False."""
    batch = oracle.batch()
    loss_type, _, term = TERMS[name]
    if per_sequence:
        batch.advantages = batch.advantages[:, :1].expand_as(batch.old)
    logits, again = leaves(batch)
    arguments = arguments_of(name)
    sequences = [term(*x) for x in batch.split(batch.gathered(logits), batch.old, batch.advantages) if len(x[0])]
    sequences.insert(3, torch.zeros(0, dtype=torch.float64))
    expected = oracle.aggregate(sequences, AGGREGATION.get(loss_type, "token-mean"), arguments.get("normalizer"))
    advantages = nan_where_masked(batch, batch.advantages)
    if per_sequence:
        advantages = batch.advantages[:, 0].clone()
        advantages[3] = torch.nan
    with torch.no_grad():
        again[~batch.mask] = torch.nan
    out = kk.policy_loss(
        again, batch.token_ids, advantages, old_logprobs=nan_where_masked(batch, batch.old), mask=batch.mask,
        **arguments,
    )  # fmt: skip
    check(batch, expected, logits, out, again)
    assert torch.allclose(out.per_token_loss[batch.mask], torch.cat(sequences), rtol=1e-10)
    assert not out.per_token_loss[~batch.mask].any()


def test_every_loss_type_has_a_formula() -> None:
    assert {loss_type for loss_type, _, _ in TERMS.values()} == set(LOSS_TYPES)


@pytest.mark.parametrize("count_empty", [True, False])
@pytest.mark.parametrize("normalizer", [None, 17.0, torch.tensor([23])], ids=str)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregations(aggregation: str, normalizer: float | Tensor | None, count_empty: bool) -> None:
    batch = oracle.batch()
    logits, again = leaves(batch)
    sequences = [-a * lp for lp, a in batch.split(batch.gathered(logits), batch.advantages)]
    divisor = None if normalizer is None else float(normalizer)
    expected = oracle.aggregate(sequences, aggregation, divisor, count_empty)
    out = kk.policy_loss(
        again, batch.token_ids, batch.advantages, loss_type="reinforce", mask=batch.mask.int(),
        aggregation=aggregation, normalizer=normalizer, count_empty_sequences=count_empty,
    )  # fmt: skip
    check(batch, expected, logits, out, again)


@pytest.mark.parametrize("how", ["loss", "token-mean"])
@pytest.mark.parametrize("quantile", [1.0, 0.45])
def test_entropy_bonus_and_quantile(how: str, quantile: float) -> None:
    batch = oracle.batch()
    logits, again = leaves(batch)
    log_q = (logits / 1.3).log_softmax(-1)
    entropy = -(log_q.exp() * log_q).sum(-1)
    threshold = torch.quantile(entropy[batch.mask].detach(), 1 - quantile)
    kept = batch.mask & (entropy >= threshold)
    assert quantile == 1 or 0 < kept.sum() < batch.mask.sum()
    lp = batch.gathered(logits, 1.3)
    terms = [term for (term,) in batch.split(-batch.advantages * lp * kept)]
    policy_term = oracle.aggregate(terms, "seq-mean-token-sum", 11.0)
    bonus = (entropy * kept).sum() / (11.0 if how == "loss" else kept.sum())
    out = kk.policy_loss(
        again, batch.token_ids, batch.advantages, loss_type="reinforce", mask=batch.mask, temperature=1.3,
        entropy_coef=0.3, entropy_quantile=quantile, entropy_aggregation=how, aggregation="seq-mean-token-sum",
        normalizer=11.0,
    )  # fmt: skip
    check(batch, policy_term - 0.3 * bonus, logits, out, again)


def test_a_quantile_on_a_token_keeps_it() -> None:
    """0.2·5 is a little less than 1, and low + (high − low)·1 may be more than high: then no equal token was kept."""
    of_a_batch = torch.tensor([[0.7, 1.9, 1.9, 1.9, 1.9, 1.9]])
    assert highest_entropy(of_a_batch, torch.ones(1, 6, dtype=torch.bool), 0.8).sum() == 5
    for count in (6, 11, 91, 171, 181):
        for fraction in (0.8, 0.3, 0.1):
            low, high = torch.rand(300).sort().values.split(150)
            position = round((count - 1) * (1 - fraction), 9)
            few = -int(-position // 1)
            for one, other in zip(low[:40], high[:40], strict=True):
                entropy = torch.cat([one.expand(few), other.expand(count - few)])[None]
                kept = highest_entropy(entropy, torch.ones(1, count, dtype=torch.bool), fraction)
                assert kept[0, few:].all(), (count, fraction, one, other)
                assert not kept[0, :few].any()


def test_token_weights_and_anchor() -> None:
    """The ratio is against the anchor; the off-policy weight still starts from old_logprobs."""
    batch = oracle.batch()
    logits, again = leaves(batch)
    anchor, weights = batch.old + 0.2, torch.randn(batch.old.shape).double()
    off_policy = (batch.old - batch.sampling).exp().clamp(max=1.1)
    terms = [
        w * c * TERMS["dapo"][2](lp, start, a)
        for lp, start, a, w, c in batch.split(batch.gathered(logits), anchor, batch.advantages, weights, off_policy)
        if len(lp)
    ]
    out = kk.policy_loss(
        again, batch.token_ids, batch.advantages, loss_type="dapo", clip_high=oracle.HIGH, mask=batch.mask,
        old_logprobs=batch.old, anchor_logprobs=nan_where_masked(batch, anchor), sampling_logprobs=batch.sampling,
        off_policy_max=1.1, token_weights=nan_where_masked(batch, weights.requires_grad_()),
    )  # fmt: skip
    check(batch, oracle.aggregate(terms, "token-mean", None), logits, out, again)
    assert out.metrics["sampling_kl"].item() == pytest.approx((batch.sampling - batch.old)[batch.mask].mean().item())
    assert out.metrics["off_policy_weight"].item() == pytest.approx(off_policy[batch.mask].mean().item())


def test_only_the_logits_get_a_gradient() -> None:
    batch = oracle.batch()
    logits, _ = leaves(batch)
    names = ("old_logprobs", "anchor_logprobs", "reference_logits", "sampling_logprobs", "token_weights")
    given = (batch.old, batch.old + 0.1, batch.reference_logits, batch.sampling, batch.old)
    others = {name: x.detach().clone().requires_grad_() for name, x in zip(names, given, strict=True)}
    advantages = batch.advantages.clone().requires_grad_()
    out = kk.policy_loss(
        logits, batch.token_ids, advantages, **others, kl_coef=0.1, kl_estimator="reverse_kl", off_policy_max=5.0
    )
    out.loss.backward()
    assert logits.grad.any()
    assert all(x.grad is None for x in (advantages, *others.values()))


def test_columns_at_minus_infinity() -> None:
    """As if they were not there; the entropy p·log p at p = 0 is where TRL's NaN comes from."""
    batch = oracle.batch()
    logits, again = leaves(batch)
    options = {"old_logprobs": batch.old, "entropy_coef": 0.1, "kl_coef": 0.1, "kl_estimator": "js"}
    narrow = kk.policy_loss(
        logits, batch.token_ids, batch.advantages, reference_logits=batch.reference_logits, **options
    )
    gone = torch.full((5, 6, 4), -torch.inf, dtype=torch.float64)
    wide = kk.policy_loss(
        torch.cat([again, gone], -1), batch.token_ids, batch.advantages,
        reference_logits=torch.cat([batch.reference_logits, gone], -1), **options,
    )  # fmt: skip
    batch.mask[:] = True
    check(batch, narrow.loss, logits, wide, again)


@pytest.mark.parametrize("loss_type", ["grpo", "gspo", "sapo", "cispo", "gmpo", "topr", "dppo_kl"])
@pytest.mark.parametrize("apart", [300.0, -300.0])
def test_a_ratio_that_would_overflow(loss_type: str, apart: float) -> None:
    """e^300 is infinite in float32, and 0·inf in the gradient of a clip would be NaN."""
    batch = oracle.batch()
    logits = batch.logits.float().requires_grad_()
    old = batch.gathered(batch.logits).float() - apart
    out = kk.policy_loss(logits, batch.token_ids, batch.advantages.float(), loss_type=loss_type, old_logprobs=old)
    out.loss.backward()
    assert out.loss.isfinite()
    assert logits.grad.isfinite().all()


def test_metrics() -> None:
    batch = oracle.batch()
    out = kk.policy_loss(
        batch.logits.requires_grad_(), batch.token_ids, batch.advantages, mask=batch.mask, dual_clip=1.5,
        old_logprobs=nan_where_masked(batch, batch.old), reference_logprobs=batch.reference,
    )  # fmt: skip
    moved = (batch.gathered(batch.logits) - batch.old)[batch.mask].detach()
    ratio, a = moved.exp(), batch.advantages[batch.mask]
    log_q = batch.logits.log_softmax(-1)[batch.mask].detach()
    x = batch.reference[batch.mask].detach() - batch.gathered(batch.logits)[batch.mask].detach()
    expected = {
        "tokens": batch.mask.sum(),
        "entropy": -(log_q.exp() * log_q).sum(-1).mean(),
        "ratio_mean": ratio.mean(),
        "ratio_max": ratio.max(),
        "approx_kl": (ratio - 1 - moved).mean(),
        "clip_fraction_low": ((a < 0) & (ratio < 0.8)).double().mean(),
        "clip_fraction_high": ((a > 0) & (ratio > 1.2)).double().mean(),
        "clip_fraction_dual": ((a < 0) & (ratio > 1.5)).double().mean(),
        "kl": (x.exp() - 1 - x).mean(),
    }
    assert out.metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert out.metrics[name].item() == pytest.approx(value.item(), rel=1e-10), name
        assert value > 0
        assert out.metrics[name].shape == ()
        assert not out.metrics[name].requires_grad


def test_what_the_policy_says_of_each_token() -> None:
    batch = oracle.batch()
    out = kk.policy_loss(batch.logits.requires_grad_(), batch.token_ids, batch.advantages, mask=batch.mask)
    log_q = batch.logits.detach().log_softmax(-1)
    for got, expected in ((out.logprob, batch.gathered(log_q)), (out.entropy, -(log_q.exp() * log_q).sum(-1))):
        assert torch.allclose(got, torch.where(batch.mask, expected, 0.0), rtol=1e-12)
        assert not got.requires_grad
