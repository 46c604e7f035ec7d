"""What the papers say of Drift, RepE, CK-PLUG, Ghosts of Softmax, RLG and logits fusion, as identities; and reads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recipe_case import double, same
from recipe_cases.inference import SIDES, ck_plug

import kldiv_kernels as kk
from kldiv_kernels import recipes

generator = torch.Generator().manual_seed(0)
S, T, B = torch.randn(3, 2, 6, 9, dtype=torch.float64, generator=generator)
TURNS = torch.tensor([[0, 0, 0, 1, 2, 2], [0, 1, 1, 1, 1, -1]])


def test_a_model_does_not_drift_from_itself_and_turns_add_up_to_the_mean() -> None:
    assert (recipes.turn_divergence(S, S, TURNS, 3) == 0).all()
    assert (recipes.intervention_divergence(S, S).forward_kl == 0).all()
    sizes = torch.stack([(turn == TURNS).sum(-1) for turn in range(3)], -1)
    found = recipes.turn_divergence(S, T, TURNS, 3)
    same((found * sizes).sum() / sizes.sum(), kk.reverse_kl(S, T, mask=TURNS >= 0))
    assert found[1, 2] == 0


def test_all_of_the_reference_is_its_top_k() -> None:
    """Of tokens in any order; with fewer, coarser outcomes are no further apart."""
    full = recipes.turn_divergence(S, T, TURNS, 3)
    top = T.log_softmax(-1).topk(9)
    got = recipes.topk_turn_divergence(S, top.indices, top.values, TURNS, 3, tail="renormalize")
    same(got, full)
    top = T.log_softmax(-1).topk(4)
    got = recipes.topk_turn_divergence(S, top.indices, top.values, TURNS, 3, tail="bucket")
    assert (got <= full + 1e-12).all()


def test_a_uniform_prediction_has_all_bits() -> None:
    for vocab in (2, 7, 1024):
        out = recipes.intervention_divergence(torch.full((1, vocab), 3.0), torch.zeros(1, vocab))
        same(out.entropy_bits, double(math.log2(vocab)), 1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda: recipes.turn_divergence(S, T, TURNS, 3),
        lambda: recipes.intervention_divergence(S, T),
        lambda: recipes.knowledge_gain(S, T),
    ],
)
def test_measures_read_once_and_leave_no_graph(call: Callable[[], object], passes: list[str]) -> None:
    S.requires_grad_()
    out = call()
    S.requires_grad_(False)
    assert len(passes) == 1
    assert not any(x.requires_grad for x in (out if isinstance(out, tuple) else (out,)))


def test_the_same_logits_have_no_gain_and_no_conflict() -> None:
    assert (recipes.knowledge_gain(S, S) == 0).all()
    assert torch.equal(recipes.ck_plug_logits(S, S), S)


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("plausible", [{}, {"k": 3, "relative": 0.2}])
def test_implausible_tokens_are_left_out_where_the_context_confuses(plausible: dict[str, Any], form: Any) -> None:
    got, wanted = (f(**SIDES, **plausible, form=form) for f in (recipes.ck_plug_logits, ck_plug))
    same(got.softmax(-1), wanted.softmax(-1))
    left_out = (got == -torch.inf).sum(-1)
    gain = recipes.knowledge_gain(**SIDES)
    assert (left_out > 0).any()
    assert torch.equal(got == -torch.inf, wanted == -torch.inf)
    if form == "paper":
        conflict = gain < 0
        assert conflict.any()
        assert not conflict.all()
        assert torch.equal(got[~conflict], SIDES["context_logits"][~conflict])


def test_alpha_one_is_the_model_alone_and_half_flattens_the_context() -> None:
    every = {"threshold": torch.inf, "relative": 0.0}
    same(recipes.ck_plug_logits(S, T, alpha=1.0, **every).softmax(-1), S.softmax(-1))
    same(recipes.ck_plug_logits(S, T, alpha=0.5, **every).softmax(-1), (T / 2).softmax(-1))
    assert torch.equal(recipes.ck_plug_logits(S, T, alpha=1.0, threshold=-torch.inf), T)
    certain = torch.tensor([[0.0, -torch.inf]])
    assert torch.equal(recipes.ck_plug_logits(certain, certain), certain)
    assert recipes.ck_plug_logits(certain, certain, form="code").softmax(-1).tolist() == [[1.0, 0.0]]


def test_a_step_within_the_bound() -> None:
    """KL(q_0‖q_τ) is ½τ²·variance but for τ³Δ³/(36√3), and the variance is at most Δ²/4."""
    logits, tangent = torch.randn(2, 500, 6, dtype=torch.float64, generator=generator)
    found = recipes.logit_range_and_variance(logits, tangent)
    assert (found.variance <= found.range.square() / 4 + 1e-12).all()
    for step in (-0.7, 0.1, 1.0):
        moved = kk.divergence_loss(logits + step * tangent, logits, "forward_kl", reduction="none")
        error = (moved - 0.5 * step**2 * found.variance).abs()
        assert (error <= abs(step) ** 3 * found.range**3 / (36 * math.sqrt(3)) + 1e-12).all()


def test_at_the_radius_the_partition_function_of_two_classes_vanishes() -> None:
    gap, extent = double(0.0, 1.3, -4.0), double(0.5, 2.0, 3.0)
    radius = recipes.step_radius(extent, gap)
    # 1 + e^(δ + τΔ) = 0 at τ = (±iπ − δ)/Δ.
    root = torch.complex(-gap / extent, math.pi / extent)
    same((1 + torch.exp(gap + root * extent)).abs(), torch.zeros(3), 1e-12)
    same(radius, root.abs())
    assert (recipes.step_radius(extent) <= radius + 1e-12).all()
    assert recipes.step_radius(torch.zeros(1)).isinf().all()


def test_columns_that_are_none_have_no_range() -> None:
    logits, tangent = torch.tensor([[1.0, 2.0, -torch.inf]]), torch.tensor([[1.0, 3.0, torch.nan]])
    found = recipes.logit_range_and_variance(logits, tangent)
    kept = recipes.logit_range_and_variance(logits[:, :2], tangent[:, :2])
    assert torch.equal(found.range, kept.range)
    same(found.variance, kept.variance, 1e-6)


def test_guidance_is_a_smaller_penalty() -> None:
    same(recipes.guided_logits(S, T, weight=0.0), S)
    same(recipes.guided_logits(S, T, weight=1.0), T)
    reward, beta = B, 0.5
    tuned = S + reward / beta
    for weight in (0.5, 1.0, 2.5):
        got = recipes.guided_logits(S, tuned, weight=weight).softmax(-1)
        same(got, (S + weight * reward / beta).softmax(-1))
        mixed = (1 - weight) * S.log_softmax(-1) + weight * T.log_softmax(-1)
        same(recipes.guided_logits(S, T, weight=weight).log_softmax(-1), mixed.log_softmax(-1))


def test_fusion_moves_the_large_model_as_tuning_moved_the_small_one() -> None:
    found = recipes.fused_logits(S, S, T)
    same(found.weight, torch.ones(2, 6))
    same(found.logits.softmax(-1), T.softmax(-1))
    still = recipes.fused_logits(S, T, T)
    same(still.logits, S)
    assert (still.weight == 0).all()
    same(recipes.fused_logits(S, T, B, grid=(0.7,)).weight, torch.full((2, 6), 0.7, dtype=torch.float64))
    # Of equals the first: a pair that does not differ fits with every weight.
    assert (recipes.fused_logits(S, T, T, grid=(0.5, 0.0, 2.0)).weight == 0.5).all()


def test_what_is_wrong_is_named() -> None:
    ids, values = torch.zeros(2, 6, 1, dtype=torch.long), torch.full((2, 6, 1), -1.0)
    for call, message in (
        (lambda: recipes.turn_divergence(S, T, TURNS[:1], 3), r"turns has shape \[1, 6\]"),
        (lambda: recipes.turn_divergence(S[0], T[0], TURNS[0], 3), "turns has shape"),
        (lambda: recipes.turn_divergence(S, T, TURNS, 0), "count is 0"),
        (lambda: recipes.topk_turn_divergence(S, ids[:1], values[:1], TURNS, 3, tail="bucket"), "topk_ids has shape"),
        (lambda: recipes.ck_plug_logits(S, T[:1]), "ck_plug_logits: context_logits has shape"),
        (lambda: recipes.ck_plug_logits(S, T, form="text"), "form is 'text'"),  # type: ignore[arg-type]
        (lambda: recipes.ck_plug_logits(S, T, form="code", threshold=1.0), "threshold is 1.0 with form='code'"),
        (lambda: recipes.ck_plug_logits(S, T, k=0), "k is 0"),
        (lambda: recipes.logit_range_and_variance(S, T[:1]), "tangent has shape"),
        (lambda: recipes.step_radius(S[0], S), "gap has shape"),
        (lambda: recipes.guided_logits(S, T[:1], weight=1.0), "tuned has shape"),
        (lambda: recipes.guided_logits(S, T, weight=torch.ones(6)), r"weight has shape \[6\]; expected \[2, 6\]"),
        (lambda: recipes.fused_logits(S, T, T[0]), "tuned_logits has shape"),
        (lambda: recipes.fused_logits(S, T, T, grid=()), "grid is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
