"""OpenRLHF's functions and losses: beside float64 from the definition, and beside OpenRLHF's own."""

from __future__ import annotations

import itertools
import sys
from types import ModuleType
from typing import Any

import peer_modules
import pytest
import torch
from torch import Tensor

from kldiv_kernels.adapters import openrlhf

RANKS = {"dp_size": 2, "batch_num_tokens": 41, "global_batch_size": 9}


def _logits() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 7, 301, dtype=torch.float64).mul(3), torch.randint(0, 301, (3, 7))


def _same(got: Tensor, expected: Tensor, at: Tensor, close: float, exact_at: Tensor | None = None) -> None:
    """Values, and gradients from an upstream of its own for each token."""
    torch.testing.assert_close(got.double(), expected.double(), rtol=close, atol=close)
    upstream = torch.rand(expected.shape, dtype=torch.float64) + 0.5
    first = torch.autograd.grad((got.double() * upstream).sum(), at, retain_graph=True)[0].double()
    other = at if exact_at is None else exact_at
    second = torch.autograd.grad((expected.double() * upstream).sum(), other, retain_graph=True)[0].double()
    assert second.abs().max() > 1e-4
    torch.testing.assert_close(first, second, rtol=0, atol=close * second.abs().max().item())


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_functions_of_logits(dtype: torch.dtype, close: float) -> None:
    exact, labels = _logits()
    exact = exact.to(dtype).double().requires_grad_()
    logits = exact.detach().to(dtype)
    before = logits.clone()
    logits.requires_grad_()
    for temperature in (1.0, 0.6):
        log_q = (exact / temperature).log_softmax(-1)
        got = openrlhf.log_probs_from_logits(logits, labels, temperature)
        assert got.dtype == torch.float32
        _same(got, log_q.gather(-1, labels[..., None]).squeeze(-1), logits, close, exact)
    log_q = exact.log_softmax(-1)
    _same(openrlhf.compute_entropy(logits), -(log_q.exp() * log_q).sum(-1), logits, close, exact)
    assert torch.equal(logits, before)


def test_functions_of_logits_beside_openrlhf() -> None:
    theirs = peer_modules.openrlhf("utils")
    logits, labels = _logits()
    logits = logits.float().requires_grad_()
    for temperature in (1.0, 0.6):
        expected = theirs.log_probs_from_logits(logits * 1.0, labels, temperature)
        _same(openrlhf.log_probs_from_logits(logits, labels, temperature), expected, logits, 1e-5)
    # Theirs is compiled; its formula is the same without.
    with torch.compiler.set_stance("force_eager"):
        _same(openrlhf.compute_entropy(logits), theirs.compute_entropy(logits), logits, 1e-5)


def test_distillation() -> None:
    exact, labels = _logits()
    labels[0, :3], labels[2] = -100, -100
    valid = labels != -100
    teacher = torch.randn_like(exact)
    log_p = teacher.log_softmax(-1)
    student = exact.float().masked_fill(~valid[..., None], torch.nan).requires_grad_()
    exact.requires_grad_()
    expected = (log_p.exp() * (log_p - exact.log_softmax(-1))).sum(-1)[valid].mean()
    _same(openrlhf.KDLoss()(student, teacher.float(), labels), expected, student, 1e-5, exact)
    nothing = openrlhf.KDLoss()(student, teacher.float(), labels.fill_(-100))
    assert nothing.item() == 0
    assert not torch.autograd.grad(nothing, student)[0].any()


def _tokens(spread: float) -> tuple[Tensor, ...]:
    """New, old, advantages, mask, rollout; no sequence is empty, and masked tokens have values of their own.

    From near-certain to hopeless tokens; `spread` is that of the log-ratios.
    """
    old = -torch.rand(6, 11, dtype=torch.float64).pow(-0.7).sub(0.99)
    new, rollout = ((old + size * torch.randn_like(old)).clamp_max(-1e-4) for size in (spread, 0.3))
    mask = (torch.rand(6, 11) < 0.7).double()
    mask[0], mask[1, 0], mask[1, 1:], mask[:, 5] = 1, 1, 0, 1
    return new, old, torch.randn_like(old), mask, rollout


CORRECTIONS: list[dict[str, Any]] = [
    {},
    *(
        {"is_correction_level": level, "is_correction_gating": gating, "is_correction_threshold": threshold}
        for level in ("token", "seq")
        for gating, threshold in (("ratio", (0.7, 1.4)), ("binary_kl", (0.0, 0.01)), ("tv", [0.0, 0.05]))
    ),
    {"is_correction_level": "token", "is_correction_mode": "clip", "is_correction_threshold": [0.8, 1.2]},
]


@pytest.mark.parametrize("kind", ["ppo", "gspo"])
@pytest.mark.parametrize("spread", [0.02, 0.6, 15.0])
def test_policy_loss_beside_openrlhf(kind: str, spread: float) -> None:
    theirs = peer_modules.openrlhf("loss").PolicyLoss
    clipped = dropped = 0.0
    for correction, dual_clip, by_token in itertools.product(CORRECTIONS, (None, 1.5), (True, False)):
        for numbers in ({}, RANKS):
            options = {
                "clip_eps_low": 0.15, "clip_eps_high": 0.3, "dual_clip": dual_clip, "token_level_loss": by_token,
                "policy_loss_type": kind, **correction,
            }  # fmt: skip
            new, old, advantages, mask, rollout = _tokens(spread)
            if spread > 1:
                # A ratio beyond e²⁰, at which OpenRLHF bounds it.
                new[0, 1], old[0, 1], rollout[0, 1], advantages[0, 1] = -0.5, -25.0, -25.1, -1.0
            ends = []
            for loss in (openrlhf.PolicyLoss(**options), theirs(**options)):
                at = new.clone().requires_grad_()
                found = loss(at, old, advantages, mask, rollout, **numbers)
                ends.append((found, torch.autograd.grad(found[0], at)[0]))
            (got, gradient), (expected, wanted) = ends
            for one, other in zip(got, expected, strict=True):
                assert (one is None) == (other is None)
                if other is not None:
                    assert one.item() == pytest.approx(other.item(), rel=1e-6, abs=1e-7 * wanted.abs().max().item())
            torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-7 * wanted.abs().max().item())
            clipped += expected[1].item()
            dropped += 0.0 if expected[4] is None else expected[4].item()
    assert clipped > 0 or spread < 0.1
    assert (dropped > 0) == (kind == "ppo")


def test_policy_loss_without_a_mask_and_without_a_token() -> None:
    new, old, advantages, mask, rollout = _tokens(0.5)
    new.requires_grad_()
    ratio = (new - old).exp()
    terms = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    _same(openrlhf.PolicyLoss()(new, old, advantages)[0], terms.mean(), new, 1e-9)
    # Masked tokens may be NaN; without any token the loss is 0.
    options: list[dict[str, Any]] = [*CORRECTIONS, {"policy_loss_type": "gspo"}]
    for given in options:
        loss = openrlhf.PolicyLoss(**given)
        clean = loss(new, old, advantages, mask, rollout)
        dirty = [x.detach().masked_fill(mask == 0, torch.nan) for x in (new, old, advantages, rollout)]
        dirty[0].requires_grad_()
        other = loss(*dirty[:3], mask, dirty[3])
        assert [x if x is None else x.item() for x in other] == [x if x is None else x.item() for x in clean]
        assert torch.autograd.grad(other[0], dirty[0])[0].isfinite().all()
        empty = loss(dirty[0], *dirty[1:3], torch.zeros_like(mask), dirty[3])
        assert all(x is None or x.item() == 0 for x in empty)
        assert not torch.autograd.grad(empty[0], dirty[0])[0].any()


def test_errors() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"policy_loss_type": "grpo"}, "policy_loss_type is 'grpo'; expected ppo, gspo"),
        ({"is_correction_level": "sequence"}, "is_correction_level is 'sequence'; expected off, token, seq"),
        ({"dual_clip": 1.0}, "dual_clip is 1.0; expected a number above 1"),
        ({"is_correction_mode": "clip", "is_correction_level": "seq"}, "expected the level 'token'"),
        ({"is_correction_level": "token", "is_correction_gating": "tv"}, "expected a lower bound of 0"),
        ({"clip_eps_low": -0.1}, "clip_low is -0.1; expected 0 or more"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            openrlhf.PolicyLoss(**options)
    ones = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"advantages has shape \[2, 1\]; expected \[2, 3\], as log_probs"):
        openrlhf.PolicyLoss()(ones, ones, ones[:, :1])
    with pytest.raises(ValueError, match="rollout_log_probs is None; expected log-probabilities"):
        openrlhf.PolicyLoss(is_correction_level="token")(ones, ones, ones)


def test_register(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openrlhf", None)
    with pytest.raises(ImportError, match=r"cannot be imported .*expected OpenRLHF 0.11.2"):
        openrlhf.register()
    names = ("openrlhf", "openrlhf.models", "openrlhf.models.utils", "openrlhf.models.loss", "openrlhf.models.actor")
    tree = {name: ModuleType(name) for name in names}
    for name, module in tree.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ImportError, match="have none of these names"):
        openrlhf.register()
    utils, actor = tree["openrlhf.models.utils"], tree["openrlhf.models.actor"]
    for name in ("log_probs_from_logits", "compute_entropy"):
        theirs = object()
        setattr(utils, name, theirs)
        setattr(actor, name, theirs)
    for module in (tree["openrlhf.models"], tree["openrlhf.models.loss"]):
        module.PolicyLoss = object  # type: ignore[attr-defined]
    assert sorted(openrlhf.register()) == [
        "openrlhf.models.PolicyLoss", "openrlhf.models.actor.compute_entropy",
        "openrlhf.models.actor.log_probs_from_logits", "openrlhf.models.loss.PolicyLoss",
        "openrlhf.models.utils.compute_entropy", "openrlhf.models.utils.log_probs_from_logits",
    ]  # fmt: skip
    assert actor.log_probs_from_logits is openrlhf.log_probs_from_logits
    assert tree["openrlhf.models"].PolicyLoss is openrlhf.PolicyLoss
