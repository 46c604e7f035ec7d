"""Options of policy_loss that stand beside the term: KL estimators and their gradients, covariance, off-policy
corrections, presets."""

from __future__ import annotations

import math

import policy_oracle as oracle
import pytest
import torch
from policy_oracle import check, leaves, nan_where_masked
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.policy.options import LOSS_TYPES, PolicyOptions, resolve

SAMPLED = {
    "k1": lambda lp, ref: lp - ref,
    "k2": lambda lp, ref: (lp - ref) ** 2 / 2,
    "k3": lambda lp, ref: (ref - lp).exp() - (ref - lp) - 1,
    "abs": lambda lp, ref: (lp - ref).abs(),
    "k3_plus": lambda lp, ref: ((ref - lp).exp() - (ref - lp) - 1) * (lp - lp.detach()).exp(),
}
EXACT = {
    "forward_kl": lambda q, p: (p.exp() * (p - q)).sum(-1),
    "reverse_kl": lambda q, p: (q.exp() * (q - p)).sum(-1),
    "js": lambda q, p: sum(
        (x.exp() * (x - ((q.exp() + p.exp()) / 2).log())).sum(-1) / 2 for x in (q, p)
    ),
    "hellinger": lambda q, p: 1 - ((q + p) / 2).exp().sum(-1),
}  # fmt: skip


@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize(
    ("estimator", "corrected"), [(name, x) for name in SAMPLED for x in (True, False) if name != "k3_plus" or not x]
)
def test_sampled_kl(estimator: str, corrected: bool, from_logits: bool) -> None:
    batch = oracle.batch()
    logits, again = leaves(batch)
    lp = batch.gathered(logits)
    kl = SAMPLED[estimator](lp, batch.reference)
    monitored = kl * (lp - batch.old).exp() if corrected else kl
    terms = [0.2 * d - a * x for d, a, x in batch.split(monitored, batch.advantages, lp)]
    reference = (
        {"reference_logits": batch.reference_logits.requires_grad_()}
        if from_logits
        else {"reference_logprobs": nan_where_masked(batch, batch.reference)}
    )
    out = kk.policy_loss(
        again, batch.token_ids, batch.advantages, loss_type="reinforce", mask=batch.mask, old_logprobs=batch.old,
        kl_coef=0.2, kl_estimator=estimator, kl_bias_correction=corrected, **reference,
    )  # fmt: skip
    check(batch, oracle.aggregate(terms, "token-mean", None), logits, out, again)
    assert out.metrics["kl"].item() == pytest.approx(monitored[batch.mask].mean().item())


@pytest.mark.parametrize("estimator", EXACT)
def test_exact_kl(estimator: str) -> None:
    batch = oracle.batch()
    logits, again = leaves(batch)
    kl = EXACT[estimator]((logits / 0.8).log_softmax(-1), (batch.reference_logits / 0.8).log_softmax(-1))
    lp = batch.gathered(logits, 0.8)
    terms = [0.7 * d - a * x for d, a, x in batch.split(kl, batch.advantages, lp)]
    out = kk.policy_loss(
        again, batch.token_ids, batch.advantages, loss_type="reinforce", mask=batch.mask, kl_coef=0.7,
        kl_estimator=estimator, reference_logits=batch.reference_logits, temperature=0.8,
    )  # fmt: skip
    check(batch, oracle.aggregate(terms, "token-mean", None), logits, out, again)
    assert out.metrics["exact_kl"].item() == pytest.approx(kl[batch.mask].mean().item())


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_kl_clamps(estimator: str) -> None:
    batch = oracle.batch()
    logits, again = leaves(batch)
    x = (batch.reference - batch.gathered(logits)).clamp(-0.6, 0.6)
    kl = SAMPLED[estimator](-x, torch.zeros(())).clamp(-0.15, 0.15)
    terms = [d for (d,) in batch.split(kl)]
    out = kk.policy_loss(
        again, batch.token_ids, 0 * batch.advantages, mask=batch.mask, kl_coef=1.0, kl_estimator=estimator,
        reference_logprobs=batch.reference, kl_log_ratio_clamp=0.6, kl_clamp=0.15,
    )  # fmt: skip
    check(batch, oracle.aggregate(terms, "seq-mean-token-mean", None), logits, out, again)


def test_a_reference_without_a_coefficient_is_a_metric() -> None:
    batch = oracle.batch()
    plain = kk.policy_loss(batch.logits, batch.token_ids, batch.advantages)
    watched = kk.policy_loss(batch.logits, batch.token_ids, batch.advantages, reference_logprobs=batch.reference)
    assert torch.equal(plain.loss, watched.loss)
    assert watched.metrics.keys() - plain.metrics.keys() == {"kl"}


@pytest.mark.parametrize(
    ("estimator", "corrected", "off_policy", "value", "gradient"),
    [
        ("k1", False, False, "reverse_kl", None),
        ("k2", False, False, None, "reverse_kl"),
        ("k3", False, False, "reverse_kl", "forward_kl"),
        ("k3_plus", False, False, "reverse_kl", "reverse_kl"),
        ("k3", True, False, "reverse_kl", "reverse_kl"),
        ("k3", True, True, "reverse_kl", "reverse_kl"),
        ("k1", True, True, "reverse_kl", "reverse_kl"),
    ],
)
def test_which_kl_the_gradient_is_of(
    estimator: str, corrected: bool, off_policy: bool, value: str | None, gradient: str | None
) -> None:
    """Exact expectations: every token of the vocabulary once, weighted by its probability of being sampled."""
    columns = 7
    logits, reference = torch.randn(columns).double(), torch.randn(columns).double()
    old = (logits + 0.5 * torch.randn(columns) * off_policy).log_softmax(-1)
    rows = logits.expand(1, columns, columns).clone().requires_grad_()
    out = kk.policy_loss(
        rows, torch.arange(columns)[None], torch.zeros(1).double(), old_logprobs=old[None], kl_coef=1.0,
        reference_logprobs=reference.log_softmax(-1)[None], kl_estimator=estimator, kl_bias_correction=corrected,
        per_token_gradient=True,
    )  # fmt: skip
    expectation = (old.exp() * out.per_token_loss[0]).sum()
    (got,) = torch.autograd.grad(expectation, rows)
    for name, is_value in ((value, True), (gradient, False)):
        q = logits.clone().requires_grad_()
        kl = EXACT[name or "reverse_kl"](q.log_softmax(-1), reference.log_softmax(-1))
        (wanted,) = torch.autograd.grad(kl, q)
        if is_value and name:
            assert expectation.item() == pytest.approx(kl.item(), rel=1e-10)
        if not is_value:
            wanted = wanted if name else torch.zeros_like(wanted)
            assert torch.allclose(got.sum((0, 1)), wanted, atol=1e-12)


def _covariance(batch: oracle.Batch) -> Tensor:
    now = batch.gathered(batch.logits)
    a = batch.advantages
    return (a - a[batch.mask].mean()) * (now - now[batch.mask].mean())


@pytest.mark.parametrize("fraction", [1e-6, 0.2, 1.0])
def test_clip_cov(fraction: float) -> None:
    """Drops that many tokens, drawn among those that are inside the bounds and not already clipped."""
    batch = oracle.batch()
    arguments = (batch.logits, batch.token_ids, batch.advantages)
    options = {"old_logprobs": batch.old, "mask": batch.mask}
    plain = kk.policy_loss(*arguments, **options)
    out = kk.policy_loss(*arguments, **options, cov_selection="clip", cov_fraction=fraction, cov_bounds=(0.1, 1.5))
    ratio = (batch.gathered(batch.logits) - batch.old).exp()
    clipped = ((batch.advantages < 0) & (ratio < 0.8)) | ((batch.advantages > 0) & (ratio > 1.2))
    candidates = batch.mask & ~clipped & (_covariance(batch) > 0.1) & (_covariance(batch) < 1.5)
    dropped = batch.mask & (out.per_token_loss == 0)
    wanted = min(max(int(fraction * batch.mask.sum()), 1), int(candidates.sum()))
    assert dropped.sum() == wanted
    assert not (dropped & ~candidates).any()
    assert torch.equal(out.per_token_loss[~dropped], plain.per_token_loss[~dropped])
    assert out.metrics["clip_fraction_cov"].item() == pytest.approx(wanted / batch.mask.sum().item())
    assert 1 < candidates.sum() < batch.mask.sum()


def test_clip_cov_draws() -> None:
    """Another draw of torch's random numbers, another token."""
    batch = oracle.batch()
    options = {"old_logprobs": batch.old, "cov_selection": "clip", "cov_bounds": (-9.0, 9.0)}
    dropped = {
        int(kk.policy_loss(batch.logits, batch.token_ids, batch.advantages, **options).per_token_loss.abs().argmin())
        for _ in range(20)
    }
    assert len(dropped) > 5


@pytest.mark.parametrize("fraction", [1e-6, 0.2])
def test_kl_cov(fraction: float) -> None:
    batch = oracle.batch()
    logits, again = leaves(batch)
    count = max(int(fraction * batch.mask.sum()), 1)
    highest = _covariance(batch).masked_fill(~batch.mask, -torch.inf).reshape(-1).topk(count).indices
    chosen = torch.zeros(batch.mask.numel()).double().index_fill(0, highest, 1.0).reshape(batch.mask.shape)
    d = batch.gathered(logits) - batch.old
    loss = -batch.advantages * d.exp() + 0.8 * chosen * d.abs()
    out = kk.policy_loss(
        again, batch.token_ids, batch.advantages, loss_type="dapo", old_logprobs=batch.old, mask=batch.mask,
        clip_low=1.0, clip_high=math.inf, cov_selection="kl", cov_fraction=fraction, cov_kl_coef=0.8,
    )  # fmt: skip
    check(batch, loss[batch.mask].mean(), logits, out, again)


@pytest.mark.parametrize("bounds", [(0.0, 1.5), (0.7, 1.4)], ids=str)
@pytest.mark.parametrize("mode", ["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_off_policy(mode: str, bounds: tuple[float, float]) -> None:
    batch = oracle.batch()
    batch.sampling[0, 0] = torch.nan
    logits, again = leaves(batch)
    terms = []
    for lp, old, sampling, a in batch.split(batch.gathered(logits), batch.old, batch.sampling, batch.advantages):
        w = (old - sampling).nan_to_num(0.0)
        w = (w.sum().expand(w.shape) if mode.startswith("sequence") else w).exp()
        inside = (w >= bounds[0]) & (w <= bounds[1])
        w = w.clamp(*bounds) if mode.endswith("truncate") else w * inside
        terms.append((1 if mode == "none" else w) * -a * lp)
    out = kk.policy_loss(
        again, batch.token_ids, batch.advantages, loss_type="reinforce", mask=batch.mask, old_logprobs=batch.old,
        sampling_logprobs=batch.sampling.masked_fill(~batch.mask, torch.nan), off_policy=mode,
        off_policy_min=bounds[0], off_policy_max=bounds[1],
    )  # fmt: skip
    check(batch, oracle.aggregate(terms, "token-mean", None), logits, out, again)


@pytest.mark.parametrize("engine", [True, False])
def test_off_policy_threshold(engine: bool) -> None:
    batch = oracle.batch()
    batch.advantages = torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0]).double()[:, None].expand(batch.old.shape)
    logits, again = leaves(batch)
    source = batch.sampling if engine else batch.old
    drift = [(x - now).mean() for x, now in batch.split(source, batch.gathered(batch.logits))]
    threshold = sorted(float(x) for x in drift[:3])[1]
    terms = [
        -a * lp if a.sum() >= 0 or drift[b] <= threshold else 0 * lp
        for b, (a, lp) in enumerate(batch.split(batch.advantages, batch.gathered(logits)))
    ]
    sampling = {"sampling_logprobs": batch.sampling, "off_policy": "none"} if engine else {}
    out = kk.policy_loss(
        again, batch.token_ids, batch.advantages[:, 0], loss_type="reinforce", mask=batch.mask, old_logprobs=batch.old,
        off_policy_threshold=threshold, **sampling,
    )  # fmt: skip
    check(batch, oracle.aggregate(terms, "token-mean", None), logits, out, again)


def test_verl_preset() -> None:
    """Dual clip 3, log-ratio ±20, k3 with ±20 and ±10, token mean, TIS 2."""
    batch = oracle.batch(spread=1.5)
    logits, again = leaves(batch)
    lp = batch.gathered(logits)
    r, a = (lp - batch.old).clamp(-20, 20).exp(), batch.advantages
    loss = torch.max(-a * r, -a * r.clamp(0.8, 1.2))
    loss = torch.where(a < 0, torch.min(loss, -3 * a), loss)
    reference = batch.reference + 4
    x = (reference - lp).clamp(-20, 20)
    loss = loss * (batch.old - batch.sampling).exp().clamp(max=2) + 0.1 * (x.exp() - x - 1).clamp(-10, 10)
    out = kk.policy_loss(
        again, batch.token_ids, a, preset="verl", old_logprobs=batch.old, sampling_logprobs=batch.sampling,
        reference_logprobs=reference, kl_coef=0.1, mask=batch.mask,
    )  # fmt: skip
    check(batch, loss[batch.mask].mean(), logits, out, again)
    assert out.metrics["clip_fraction_dual"] > 0


def test_nemo_rl_preset() -> None:
    """No dual clip, k3 clamped and multiplied by exp(x − sg x), token mean."""
    batch = oracle.batch(spread=1.5)
    logits, again = leaves(batch)
    lp = batch.gathered(logits)
    r, a = (lp - batch.old).exp(), batch.advantages
    loss = torch.max(-a * r, -a * r.clamp(0.8, 1.2))
    reference = batch.reference + 4
    x = (reference - lp).clamp(-20, 20)
    loss = loss + 0.1 * (x.exp() - x - 1).clamp(-10, 10) * (lp - lp.detach()).exp()
    out = kk.policy_loss(
        again, batch.token_ids, a, preset="nemo_rl", old_logprobs=batch.old, reference_logprobs=reference,
        kl_coef=0.1, mask=batch.mask,
    )  # fmt: skip
    check(batch, loss[batch.mask].mean(), logits, out, again)


@pytest.mark.parametrize("loss_type", [None, *LOSS_TYPES])
@pytest.mark.parametrize("preset", [None, "trl", "verl", "nemo_rl"])
def test_presets_contradict_nothing(preset: str | None, loss_type: str | None) -> None:
    for estimator in (None, "k1", "k3", "k3_plus", "reverse_kl"):
        options = resolve("policy_loss", preset, {"loss_type": loss_type, "kl_estimator": estimator})
        assert loss_type in (None, options.loss_type)


def test_what_is_given_counts_over_the_preset() -> None:
    options = resolve("policy_loss", "verl", {"clip_low": 0.1, "delta": 2.0, "kl_clamp": math.inf})
    assert options == PolicyOptions(
        loss_type="dapo", clip_low=0.1, delta=2.0, kl_log_ratio_clamp=20.0, count_empty_sequences=False
    )
