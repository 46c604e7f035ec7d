"""Schedules: the facts' numbers, and that a resumed run goes on exactly."""

from __future__ import annotations

import json

import pytest
import torch

import kldiv_kernels as kk

schedules = kk.recipes.schedules


def test_the_coefficient_of_kdrl() -> None:
    found = [schedules.linear_decay(step) for step in (0, 40, 80, 200)]
    assert found == pytest.approx([5e-3, 3e-3, 1e-3, 1e-3], rel=1e-12)
    assert schedules.linear_decay(7, start=1.0, end=0.0, rate=0.25) == 0


def test_the_coefficient_of_trace() -> None:
    found = [schedules.hold_then_linear(step) for step in (0, 9, 10, 25, 40, 1000)]
    assert found == pytest.approx([0.5, 0.5, 0.5, 0.25, 0.0, 0.0], abs=1e-12)
    assert schedules.hold_then_linear(3, value=2.0, hold=1, decay=4) == 1.0


def test_the_windows_of_tcod() -> None:
    assert [schedules.growing_window(step) for step in (0, 4, 5, 24)] == [1, 1, 2, 5]
    # The paper's: k = min(k_start + ⌊n/η⌋, T_max) with η = 2.
    assert [schedules.growing_window(step, start=1, every=2, limit=3) for step in range(6)] == [1, 1, 2, 2, 3, 3]
    assert [schedules.prefix_window(step, 6) for step in (0, 4, 5, 24, 25, 900)] == [5, 5, 4, 1, 0, 0]
    assert schedules.prefix_window(0, 1) == schedules.prefix_window(0, 0) == 0


def test_the_quantiles_start_as_those_of_the_first_scores() -> None:
    levels = [x / 20 for x in range(1, 20)]
    scores = torch.randn(37, dtype=torch.float64)
    tracker = schedules.QuantileTracker(levels)
    assert tracker.update(scores) == pytest.approx(scores.quantile(torch.tensor(levels).double()).tolist(), rel=1e-6)
    assert schedules.QuantileTracker([0.3]).update([4.0]) == (4.0,)


def test_the_quantiles_follow() -> None:
    tracker = schedules.QuantileTracker([0.2, 0.9], rate=0.1)
    assert tracker.update([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]) == (1.0, 4.5)
    # Half of the scores are below 1, all below 4.5; a score that is equal is not below.
    assert tracker.update([0.0, 0.0, 1.0, 2.0]) == pytest.approx((1.0 + 0.1 * (0.2 - 0.5), 4.5 + 0.1 * (0.9 - 1)))
    before = tracker.q
    assert tracker.update([]) == before
    for _ in range(4000):
        tracker.update(torch.rand(16))
    assert tracker.q == pytest.approx((0.2, 0.9), abs=0.05)


def test_a_resumed_run_goes_on_exactly() -> None:
    tracker = schedules.QuantileTracker([0.2, 0.9])
    other = schedules.QuantileTracker([0.2, 0.9])
    other.load_state_dict(json.loads(json.dumps(tracker.state_dict())))
    for _ in range(3):
        scores = torch.randn(8).tolist()
        assert tracker.update(scores) == other.update(scores)
        other = schedules.QuantileTracker([0.2, 0.9])
        other.load_state_dict(json.loads(json.dumps(tracker.state_dict())))
        assert other.q == tracker.q


def test_the_weights_of_recap() -> None:
    weights = schedules.RecapWeights(3, window=4, temperature=2.0)
    torch.manual_seed(0)
    losses = torch.rand(11, 3, dtype=torch.float64) + torch.tensor([0.1, 1.0, 5.0])
    for step, row in enumerate(losses.tolist()):
        found = weights.update(row)
        assert sum(found) / 3 == pytest.approx(1)
        if step < 7:
            assert found == (1.0, 1.0, 1.0)
    before, now = losses[3:7], losses[7:]
    score = now.mean(0) / before.mean(0) + now.std(0, correction=0) / (now.mean(0) + before.mean(0))
    assert found == pytest.approx((3 * (score / 2).softmax(-1)).tolist(), rel=1e-12)
    # Losses in proportion have equal statistics, and one loss alone is what it is.
    alike = schedules.RecapWeights(2, window=2)
    for loss in (1.0, 3.0, 2.0, 0.5, 0.1):
        assert alike.update([loss, 10 * loss]) == pytest.approx((1.0, 1.0))
    alone = schedules.RecapWeights(1, window=1)
    assert alone.update([4.0]) == alone.update([0.0]) == alone.update([0.0]) == (1.0,)
    # The code's ½c + ½i is the paper's with twice the temperature.
    half = schedules.RecapWeights(3, window=4, temperature=4.0)
    half.load_state_dict(json.loads(json.dumps(weights.state_dict())))
    assert half.weights() == pytest.approx((3 * (score / 4).softmax(-1)).tolist(), rel=1e-12)
    assert half.update([1.0, 2.0, 3.0]) != weights.update([1.0, 2.0, 3.0])
    half.temperature = 2.0
    assert half.weights() == weights.weights()


def test_what_is_wrong_is_named() -> None:
    for wrong in ({"count": 0}, {"count": 2, "window": 0}, {"count": 2, "temperature": 0.0}):
        with pytest.raises(ValueError, match=r"RecapWeights: \w+ is 0"):
            schedules.RecapWeights(**wrong)
    with pytest.raises(ValueError, match="RecapWeights: losses has 1 numbers; expected 2"):
        schedules.RecapWeights(2).update([1.0])
    with pytest.raises(ValueError, match="the state has steps of 1 losses; expected 2"):
        schedules.RecapWeights(2).load_state_dict({"losses": [[1.0]]})
    for wrong in ([], [0.0], [0.5, 1.0], [-0.1], [float("nan")]):
        with pytest.raises(ValueError, match="QuantileTracker: levels is"):
            schedules.QuantileTracker(wrong)
    with pytest.raises(ValueError, match=r"QuantileTracker: rate is 0; expected a number above 0"):
        schedules.QuantileTracker([0.5], rate=0)
    with pytest.raises(RuntimeError, match="q is asked for before the first update"):
        _ = schedules.QuantileTracker([0.5]).q
    with pytest.raises(ValueError, match="the state's levels are"):
        schedules.QuantileTracker([0.5]).load_state_dict(schedules.QuantileTracker([0.4]).state_dict())
    with pytest.raises(ValueError, match="hold_then_linear: decay is 0"):
        schedules.hold_then_linear(0, decay=0)
    with pytest.raises(ValueError, match="growing_window: every is 0"):
        schedules.growing_window(0, every=0)
    with pytest.raises(ValueError, match="prefix_window: every is 0"):
        schedules.prefix_window(0, 4, every=0)


def test_the_reference_is_reset_when_the_score_stands_still() -> None:
    reset = schedules.ReferenceReset(3)
    scores = [0.1, 0.3, 0.3, 0.2, 0.4, 0.1, 0.4, 0.3, 0.0, 0.0, 0.1, 0.1, 0.0, 0.1]
    found = []
    for score in scores:
        found.append(reset.update(score))
        other = schedules.ReferenceReset(3)
        other.load_state_dict(json.loads(json.dumps(reset.state_dict())))
        reset = other
    assert [place for place, now in enumerate(found) if now] == [7, 13]
    with pytest.raises(ValueError, match="ReferenceReset: patience is 0"):
        schedules.ReferenceReset(0)


@pytest.mark.parametrize("forgets", [True, False])
def test_a_reset_copies_the_policy(forgets: bool) -> None:
    policy, reference = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(policy.parameters())
    policy(torch.ones(2)).sum().backward()
    optimizer.step()
    schedules.ReferenceReset(1, reset_optimizer=forgets).apply(policy, reference, optimizer)
    assert torch.equal(reference.weight, policy.weight)
    assert reference.weight.data_ptr() != policy.weight.data_ptr()
    assert (len(optimizer.state) == 0) == forgets
    optimizer.step()
