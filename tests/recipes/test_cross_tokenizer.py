"""Losses for a teacher with another vocabulary, beside definitions outcome by outcome."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from checks import BACKENDS
from recipe_case import batch, gradient_of, same
from sorted_distance import sorted_l1
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels import recipes
from kldiv_kernels.recipes.cross_tokenizer import _OF_RATIOS

BATCH = batch(vocab=9, seed=41)
S, MASK = BATCH["logits"], BATCH["mask"]
T = 1.5 * batch(vocab=7, seed=42)["teacher_logits"]
# Columns of a teacher of 7 in a student of 9.
MAP = torch.tensor([4, -1, 0, 8, -1, 2, 5])
# And where one side, or neither, has others: an extended student, a pruned one, the same tokens in another order.
MAPS = {
    "both": (9, MAP), "extended": (9, torch.tensor([4, 7, 0, 8, 1, 2, 5])),
    "pruned": (5, torch.tensor([3, -1, 0, 2, -1, 4, 1])), "permuted": (7, torch.tensor([3, 5, 0, 2, 6, 4, 1])),
    "nothing": (9, torch.full((7,), -1)),
}  # fmt: skip
KINDS = [kind for kind in _OF_RATIOS if kind != "forward_kl"]


def trained(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def outcomes(s: Tensor, t: Tensor, vocab_map: Tensor, tail: str, tau: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the common tokens and of the rest, as two rows of few columns."""
    columns = [(j, i) for i, j in enumerate(vocab_map.tolist()) if j >= 0]
    sides = []
    for x, scale, own in ((s, tau, [j for j, _ in columns]), (t, theirs, [i for _, i in columns])):
        p = (x / (scale[..., None] if isinstance(scale, Tensor) else scale)).softmax(-1)
        parts = [p[..., k] for k in own]
        if tail == "bucket":
            parts.append(sum((p[..., k] for k in range(p.shape[-1]) if k not in own), torch.zeros(p.shape[:-1])))
        sides.append(torch.stack(parts, -1).log())
    return sides[0], sides[1]


def expected(s: Tensor, t: Tensor, vocab_map: Tensor, kind: str, tail: str = "bucket", tau: Any = 1.0,
             theirs: Any = None, **options: Any) -> Tensor:  # fmt: skip
    q, p = outcomes(s, t, vocab_map, tail, tau, tau if theirs is None else theirs)
    return kk.divergence_loss(q, p, kind, backend="reference", **options)


def compare(s: Tensor, t: Tensor, vocab_map: Tensor, kind: str, **options: Any) -> None:
    results = []
    for ours in (True, False):
        x, y = trained(s), trained(t)
        if ours:
            names = {"tau": "temperature", "theirs": "reference_temperature"}
            loss = recipes.mapped_divergence_loss(
                x, y, vocab_map, kind, backend="reference", **{names.get(k, k): v for k, v in options.items()}
            )
            assert torch.autograd.grad(loss.sum(), y, allow_unused=True, retain_graph=True)[0] is None
        else:
            loss = expected(x, y, vocab_map, kind, **options)
        results.append(
            (loss.detach(), gradient_of((loss * torch.arange(1, loss.numel() + 1).reshape(loss.shape)).sum(), x))
        )
    for got, wanted in zip(*results, strict=True):
        same(got, wanted)
    assert results[0][1].abs().max() > 1e-3


@pytest.mark.parametrize("kind", _OF_RATIOS)
def test_the_rest_is_one_outcome(kind: str) -> None:
    """Every kind, with values and gradients of an explicit distribution on common tokens and rest."""
    compare(S, T, MAP, kind, mask=MASK)
    compare(S, T, MAP, kind, mask=MASK, tau=1.7, theirs=0.8, normalizer=5.0)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_maps_of_every_kind(name: str, tail: str) -> None:
    size, vocab_map = MAPS[name]
    s = S[..., :size]
    if name == "nothing":
        if tail == "bucket":
            assert recipes.mapped_divergence_loss(s, T, vocab_map).abs() < 1e-12
        return
    # A rest that one side alone has makes the other direction infinite.
    kinds = {("pruned", "bucket"): ["reverse_kl", "js"], ("extended", "bucket"): ["forward_kl", "js"]}.get(
        (name, tail), ["forward_kl", "js", "jeffreys"]
    )
    for kind in kinds:
        compare(s, T, vocab_map, kind, tail=tail, mask=MASK)
    if tail == "renormalize":
        compare(s, T, vocab_map, "cross_entropy", tail=tail, mask=MASK)


def test_options_of_the_divergence_are_kept() -> None:
    per_token = torch.linspace(0.5, 2.0, 15, dtype=torch.float64).reshape(3, 5)
    for options in (
        {"reduction": "none", "tau": per_token}, {"beta": 0.2, "weight": per_token}, {"labels": BATCH["token_ids"] - 1,
        "ignore_index": -1, "reduction": "sum", "tau": 0.5, "temperature_squared": True},
    ):  # fmt: skip
        if "temperature_squared" in options:
            labelled = BATCH["token_ids"] > 0
            x = trained(S)
            got = recipes.mapped_divergence_loss(
                x, T, MAP, "js", labels=options["labels"], ignore_index=-1, reduction="sum", temperature=0.5,
                temperature_squared=True, backend="reference",
            )  # fmt: skip
            y = trained(S)
            wanted = 0.25 * expected(y, T, MAP, "js", tau=0.5, mask=labelled, reduction="sum")
            same(got, wanted)
            same(gradient_of(got, x), gradient_of(wanted, y))
        else:
            compare(S, T, MAP, "js", mask=MASK, **options)


def test_the_whole_vocabulary_in_order_is_the_divergence() -> None:
    s = S[..., :7]
    for tail in ("bucket", "renormalize"):
        got = recipes.mapped_divergence_loss(s, T, torch.arange(7), "js", tail=tail)  # type: ignore[arg-type]
        same(got, kk.js_divergence(s, T))


def test_masses_that_one_side_has_not() -> None:
    """A pruned student never has the rest; a student without mass there, or a teacher, are no NaN."""
    assert recipes.mapped_divergence_loss(S[..., :5], T, MAPS["pruned"][1]) == math.inf
    rest = [1, 3, 6, 7]
    empty = S.clone()
    empty[..., rest] = -torch.inf
    assert recipes.mapped_divergence_loss(empty, T, MAP) == math.inf
    x = trained(empty)
    loss = recipes.mapped_divergence_loss(x, T, MAP, "reverse_kl")
    same(loss, expected(empty, T, MAP, "reverse_kl"))
    assert gradient_of(loss, x).isfinite().all()
    known = T.clone()
    known[..., [1, 4]] = -torch.inf
    compare(S, known, MAP, "forward_kl")
    assert recipes.mapped_divergence_loss(S, known, MAP, "reverse_kl") == math.inf
    tiny = T.clone()
    tiny[..., [1, 4]] -= 300.0
    compare(S, tiny, MAP, "reverse_kl")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js"])
def test_on_every_backend(kind: str, backend: str) -> None:
    """float32, and bfloat16 logits with a rest that is not rounded to them."""
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 1e-2)):
        s, t = S.to(dtype), T.to(dtype)
        x, y = trained(s), trained(s.double())
        loss = recipes.mapped_divergence_loss(x, t, MAP, kind, mask=MASK, backend=backend)
        wanted = expected(y, t.double(), MAP, kind, mask=MASK)
        assert loss.dtype == torch.float32
        assert abs(loss.item() - wanted.item()) <= 2e-5
        gradient = gradient_of(wanted, y)
        assert (gradient_of(loss, x).double() - gradient).abs().max() <= tolerance * gradient.abs().max()


def test_one_read_and_masked_rows(passes: list[str]) -> None:
    """Value and gradient in one read. NaN in masked rows changes nothing and gets 0; no row is 0."""
    fill = torch.where(MASK[..., None], S, torch.nan).float(), torch.where(MASK[..., None], T, torch.nan).float()
    x = trained(fill[0])
    loss = recipes.mapped_divergence_loss(x, fill[1], MAP, "js", mask=MASK, backend="cpu")
    assert passes == ["loss"]
    same(loss, expected(S, T, MAP, "js", mask=MASK).float(), 1e-5)
    gradient = gradient_of(loss, x)
    assert (gradient[~MASK] == 0).all()
    assert gradient.isfinite().all()
    assert recipes.mapped_divergence_loss(x, fill[1], MAP, mask=torch.zeros_like(MASK)) == 0


def test_vocabularies() -> None:
    student, teacher = {"the": 0, "un": 1, "tied": 2}, {"tied": 4, "unt": 0, "the": 2}
    assert recipes.vocabulary_map(student, teacher).tolist() == [-1, -1, 0, -1, 2]
    assert recipes.vocabulary_map(student, teacher, teacher_size=6).tolist() == [-1, -1, 0, -1, 2, -1]
    assert recipes.vocabulary_map(student, {}).tolist() == []
    columns = recipes.VocabularyMap.of(MAP, 9)
    assert (columns.student_size, columns.teacher_size) == (9, 7)
    assert sorted([*columns.student_ids.tolist(), *columns.student_rest.tolist()]) == list(range(9))
    assert columns.student_ids.tolist() == MAP[columns.teacher_ids].tolist()
    same(recipes.mapped_divergence_loss(S, T, columns, "js"), recipes.mapped_divergence_loss(S, T, MAP, "js"))


def test_uld_is_the_distance_of_sorted_probabilities() -> None:
    for s, t in ((S, T), (S[..., :5], T)):
        x, y = trained(s), trained(s)
        got = recipes.uld_loss(x, t, temperature=1.3, teacher_temperature=0.7, mask=MASK)
        rows = [
            sorted_l1((y[i] / 1.3).softmax(-1), (t[i] / 0.7).softmax(-1)) for i in map(tuple, MASK.nonzero().tolist())
        ]
        wanted = torch.stack(rows).mean()
        same(got, wanted)
        same(gradient_of(got, x), gradient_of(wanted, y))
    # The names of tokens do not matter, and the order of a row of equal ones neither.
    same(recipes.uld_loss(T.flip(-1), T), torch.zeros(()))
    assert recipes.uld_loss(T.flip(-1), T, reduction="none").shape == (3, 5)
    filled = trained(torch.where(MASK[..., None], S, torch.nan))
    assert (gradient_of(recipes.uld_loss(filled, T, mask=MASK), filled)[~MASK] == 0).all()
    assert recipes.uld_loss(S.bfloat16(), T.bfloat16()).dtype == torch.float32


def test_errors() -> None:
    for wrong, message in (
        (torch.tensor([0, 1, 2, 3, 4, 5, 9]), "values from 0 to 9; expected -1 to 8"),
        (torch.tensor([0, 1, 2, 3, -2, 5, 6]), "values from -2 to 6"),
        (torch.tensor([0, 1, 2, 3, 3, 5, 6]), "column 3 of the student is there 2 times"),
        (MAP[None], r"shape \[1, 7\]"), (MAP[:6], "teacher_logits has 7 columns; expected 6"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            recipes.mapped_divergence_loss(S, T, wrong)
    with pytest.raises(TypeError, match=r"dtype torch\.float32"):
        recipes.VocabularyMap.of(MAP.float(), 9)
    with pytest.raises(ValueError, match="logits has 9 columns; expected 10"):
        recipes.mapped_divergence_loss(S, T, recipes.VocabularyMap.of(MAP, 10))
    for options, message in (
        ({"kind": "cross_entropy"}, "kind is 'cross_entropy'; with tail 'bucket'"),
        ({"tail": "none"}, "tail is 'none'"), ({"vocab_size": 5}, "vocab_size is given"),
        ({"exclude": MASK}, "exclude is given"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            recipes.mapped_divergence_loss(S, T, MAP, **options)  # type: ignore[arg-type]
    for call in (
        lambda: recipes.mapped_divergence_loss(S, T[:1], MAP), lambda: recipes.uld_loss(S, T[:1]),
        lambda: recipes.uld_loss(S, T, mask=MASK[:1]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="shape"):
            call()
    with pytest.raises(ValueError, match="teacher_size is 1; expected 3"):
        recipes.vocabulary_map({}, {"a": 2}, teacher_size=1)
