r"""Losses of OpenRLHF 0.11 and torchtune 0.6, written from their formulas, sequence by sequence in float64.

OpenRLHF's PolicyLoss, with d = log π − log π_old, r = exp(d clamped to ±20) and g = exp(mean d of the sequence):

    ppo, gspo          −min(x·A, clip(x)·A) with x = r (ppo) or g (gspo); dual clip: at most −c·A where A < 0
    vLLM correction    w = π_old/π_rollout. ppo: the loss times sg of w clamped (tis), of w inside its bounds (icepop),
                       or of w where the sequence's geometric mean is inside (seq-mask-tis). gspo: g against the rollout
    mean               over tokens, or over non-empty sequences of the mean over tokens (always for gspo); with the
                       numbers of all ranks, times the ranks
    KL                 k1 = log π − log π_ref, k2 = k1²/2, k3 = e^(−k1) − 1 + k1, each clamped to ±10

torchtune, p teacher and q student, the mean over targets other than -100: forward −Σ p log q, reverse
Σ q (log q − log p), symmetric a·forward + (1 − a)·reverse; columns at −∞ add 0. Its PPOLoss is ppo without bounds.
"""

from __future__ import annotations

from typing import Any

import policy_oracle as oracle
import pytest
import torch
from torch import Tensor

import kldiv_kernels as kk

LOW, HIGH, RANKS = 0.2, 0.28, 2
BOUNDS = (0.7, 1.4)


def _surrogate(x: Tensor, a: Tensor, dual: float | None) -> Tensor:
    low, high = torch.full_like(x, 1 - LOW), torch.full_like(x, 1 + HIGH)
    gain = torch.min(x * a, torch.max(torch.min(x, high), low) * a)
    return -gain if dual is None else -torch.where(a < 0, torch.max(gain, dual * a), gain)


def _openrlhf(
    lp: Tensor, old: Tensor, rollout: Tensor, a: Tensor, kind: str, dual: float | None, correction: str | None
) -> Tensor:
    if kind == "gspo":
        start = old if correction is None else rollout
        return _surrogate((lp - start).mean().exp().expand(lp.shape), a, dual)
    loss, drift = _surrogate((lp - old).clamp(-20, 20).exp(), a, dual), old - rollout
    low, high = BOUNDS
    if correction == "tis":
        return drift.exp().clamp(low, high) * loss
    if correction == "icepop":
        return drift.exp() * ((drift.exp() >= low) & (drift.exp() <= high)) * loss
    if correction == "seq-mask-tis":
        return drift.exp() * (low <= drift.mean().exp() <= high) * loss
    return loss


@pytest.mark.parametrize("ranks", [False, True])
@pytest.mark.parametrize("tokens", [True, False])
@pytest.mark.parametrize("dual", [None, 1.3])
@pytest.mark.parametrize(
    ("kind", "correction"),
    [("ppo", None), ("ppo", "tis"), ("ppo", "icepop"), ("ppo", "seq-mask-tis"), ("gspo", None), ("gspo", "any")],
)
def test_openrlhf_policy_loss(kind: str, correction: str | None, dual: float | None, tokens: bool, ranks: bool) -> None:
    batch = oracle.batch()
    logits, again = oracle.leaves(batch)
    how = "token-mean" if tokens and kind == "ppo" else "seq-mean-token-mean"
    normalizer = None if not ranks else 37.0 if how == "token-mean" else 9.0
    rows = batch.split(batch.gathered(logits), batch.old, batch.sampling, batch.advantages)
    losses = [_openrlhf(*row, kind, dual, correction) if len(row[0]) else row[0] for row in rows]
    expected = oracle.aggregate(losses, how, normalizer, count_empty=False) * (RANKS if ranks else 1)

    options: dict[str, Any] = {"dual_clip": dual, "clip_low": LOW, "clip_high": HIGH, "aggregation": how}
    if correction in ("tis", "icepop"):
        options |= {"off_policy_min": BOUNDS[0], "off_policy_max": BOUNDS[1], "sampling_logprobs": batch.sampling}
        options["off_policy"] = "token_truncate" if correction == "tis" else "token_mask"
    if correction == "seq-mask-tis":
        drift = (batch.old - batch.sampling) * batch.mask
        mean = (drift.sum(-1, keepdim=True) / batch.mask.sum(-1, keepdim=True).clamp_min(1)).exp()
        options["token_weights"] = drift.exp() * ((mean >= BOUNDS[0]) & (mean <= BOUNDS[1]))
    if kind == "gspo" and correction:
        options["anchor_logprobs"] = batch.sampling
    out = kk.policy_loss(
        again, batch.token_ids, batch.advantages, loss_type="gspo" if kind == "gspo" else "dapo", mask=batch.mask,
        old_logprobs=batch.old, normalizer=None if normalizer is None else normalizer / RANKS,
        count_empty_sequences=False, **options,
    )  # fmt: skip
    oracle.check(batch, expected, logits, out, again)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_openrlhf_kl(estimator: str) -> None:
    """With log-ratios beyond its clamp."""
    batch = oracle.batch()
    logits, again = oracle.leaves(batch)
    reference = batch.reference + torch.where(torch.rand(batch.mask.shape) < 0.3, 12.0, 0.0)
    losses, clamped = [], 0
    for lp, old, ref, a in batch.split(batch.gathered(logits), batch.old, reference, batch.advantages):
        k1 = lp - ref
        kl = {"k1": k1, "k2": k1**2 / 2, "k3": (-k1).exp() - 1 + k1}[estimator]
        clamped += int((kl.abs() > 10).sum())
        losses.append(_surrogate((lp - old).exp(), a, None) + 0.3 * kl.clamp(-10, 10))
    assert clamped > 2
    out = kk.policy_loss(
        again, batch.token_ids, batch.advantages, loss_type="dapo", clip_low=LOW, clip_high=HIGH, mask=batch.mask,
        old_logprobs=batch.old, reference_logprobs=reference, kl_coef=0.3, kl_estimator=estimator, kl_clamp=10.0,
    )  # fmt: skip
    oracle.check(batch, oracle.aggregate(losses, "token-mean", None), logits, out, again)


@pytest.mark.parametrize("epsilon", [0.1, 0.3])
def test_torchtune_ppo(epsilon: float) -> None:
    batch = oracle.batch()
    logits, again = oracle.leaves(batch)
    losses = []
    for lp, old, a in batch.split(batch.gathered(logits), batch.old, batch.advantages):
        r = (lp - old).exp()
        losses.append(torch.max(-a * r, -a * r.clamp(1 - epsilon, 1 + epsilon)))
    out = kk.policy_loss(
        again, batch.token_ids, batch.advantages, loss_type="dapo", clip_low=epsilon, clip_high=epsilon,
        mask=batch.mask, old_logprobs=batch.old, log_ratio_clamp=torch.inf,
    )  # fmt: skip
    oracle.check(batch, oracle.aggregate(losses, "token-mean", None), logits, out, again)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("share", [None, 0.0, 0.3, 0.5, 1.0])
def test_torchtune_distillation(share: float | None, padding: bool) -> None:
    """Forward alone (None), and the symmetric loss at its share of forward; the cross-entropy beside it at ½."""
    logits, teacher = (2 * torch.randn(2, 7, 23, dtype=torch.float64) for _ in range(2))
    if padding:
        logits[..., 19:], teacher[..., 19:] = -torch.inf, -torch.inf
    labels = torch.randint(0, 19, (2, 7))
    labels[0, :3], labels[1, 6] = -100, -100
    exact, ours = logits.clone().requires_grad_(), logits.clone().requires_grad_()

    total: Any = 0.0
    for row, other, label in zip(exact.reshape(-1, 23), teacher.reshape(-1, 23), labels.reshape(-1), strict=True):
        if label == -100:
            continue
        q, p = row[row > -torch.inf].log_softmax(-1), other[other > -torch.inf].log_softmax(-1)
        forward, reverse = -(p.exp() * q).sum(), (q.exp() * (q - p)).sum()
        divergence = forward if share is None else share * forward + (1 - share) * reverse
        total = total + 0.5 * divergence - 0.5 * q[label]
    expected = total / (labels != -100).sum()

    def loss(kind: str) -> Tensor:
        return kk.divergence_loss(ours, teacher, kind, labels=labels, backend="reference")

    parts = loss("cross_entropy")
    if share is not None:
        parts = share * parts + (1 - share) * loss("reverse_kl")
    hard = -kk.selective_log_softmax(ours, labels, mask=labels != -100, backend="reference").sum()
    got = 0.5 * parts + 0.5 * hard / (labels != -100).sum()
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)
    (wanted,), (mine,) = torch.autograd.grad(expected, exact), torch.autograd.grad(got, ours)
    assert wanted.abs().max() > 1e-2
    assert torch.allclose(mine, wanted, rtol=0, atol=1e-12)
