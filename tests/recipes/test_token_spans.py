"""Spans on which two tokenizations of a text agree, and GOLD's loss of them, beside definitions span by span."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recipe_case import batch, gradient_of, same
from sorted_distance import sorted_l1
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels import recipes
from kldiv_kernels.recipes.token_spans import span_logprobs

# Columns of a teacher of 7 in a student of 9: some, and all.
MAP, EXTENDED = torch.tensor([4, -1, 0, 8, -1, 2, 5]), torch.tensor([4, 7, 0, 8, 1, 2, 5])


def trained(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


# The ends of tokens in four texts. Equal cuts; no cut in common but the last; bytes of one character and masked tokens;
# a text cut off on one side.
ENDS = torch.tensor([[2, 5, 6, 9, 0, 0], [1, 3, 5, 7, 9, 12], [4, 4, 4, 7, 8, 0], [2, 4, 6, 9, 11, 0]])
KEPT = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0]]).bool()
OTHER_ENDS = torch.tensor([[0, 2, 5, 6, 9], [2, 4, 8, 11, 12], [0, 4, 6, 8, 0], [4, 7, 0, 8, 10]])
OTHER_KEPT = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0], [1, 1, 0, 1, 1]]).bool()
SPANS = recipes.align_spans(ENDS, OTHER_ENDS, mask=KEPT, teacher_mask=OTHER_KEPT)


def test_spans_end_where_both_have_a_boundary() -> None:
    assert SPANS.student.tolist() == [
        [0, 1, 2, 3, -1, -1], [0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, -1], [0, 0, -1, -1, -1, -1]
    ]  # fmt: skip
    assert SPANS.teacher.tolist() == [[-1, 0, 1, 2, 3], [0, 0, 0, 0, 0], [-1, 0, 1, 1, -1], [0, -1, -1, -1, -1]]
    assert SPANS.total.tolist() == [4, 1, 2, 1]


def by_hand(ends: list[int], others: list[int]) -> list[int]:
    """Span by span: all that ends up to the next common end."""
    common = sorted(set(ends) & set(others))
    return [next((k for k, end in enumerate(common) if x <= end), -1) for x in ends]


def test_spans_of_random_texts() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = torch.randint(0, 3, (60, 2, 8), generator=generator).cumsum(-1)
    kept = torch.rand(60, 2, 8, generator=generator) < 0.8
    spans = recipes.align_spans(draw[:, 0], draw[:, 1], mask=kept[:, 0], teacher_mask=kept[:, 1])
    for row in range(60):
        ends, others = (draw[row, side][kept[row, side]].tolist() for side in (0, 1))
        assert spans.student[row][kept[row, 0]].tolist() == by_hand(ends, others)
        assert spans.teacher[row][kept[row, 1]].tolist() == by_hand(others, ends)
        assert spans.total[row] == len(set(ends) & set(others))
        assert (spans.student[row][~kept[row, 0]] == -1).all()
    nothing = recipes.align_spans(draw[:, 0, :0], draw[:, 1])
    assert nothing.student.shape == (60, 0)
    assert (nothing.teacher == -1).all()


TEXTS = batch(4, 6, 9, seed=43)
OTHERS = batch(4, 5, 7, seed=44)
TOKENS: dict[str, Any] = {
    "token_ids": TEXTS["token_ids"], "teacher_token_ids": OTHERS["token_ids"], "spans": SPANS,
}  # fmt: skip


def merged(logits: Tensor, ids: Tensor, segments: Tensor, tau: float, merge: str, floor: float) -> list[list[Tensor]]:
    """The distribution of each span of each text, a product of probabilities."""
    out = []
    for row, of_row, numbers in zip(logits, ids.tolist(), segments.tolist(), strict=True):
        q = (row / tau).softmax(-1)
        spans = []
        for number in range(max(numbers) + 1):
            places = [t for t, n in enumerate(numbers) if n == number]
            base = places[0] if merge == "observed" else places[-1]
            product = q[base]
            for t in places:
                product = product if t == base else product * q[t, of_row[t]].clamp_min(floor)
            spans.append(product)
        out.append(spans)
    return out


def gold(logits: Tensor, teacher_logits: Tensor, token_ids: Tensor, teacher_token_ids: Tensor, spans: recipes.Spans,
         vocab_map: Tensor | None = None, beta: float = 0.5, matched_weight: float | None = None,
         unmatched_weight: float | None = None, merge: str = "observed", temperature: float = 1.0,
         teacher_temperature: float = 1.0, floor: float = 1e-8) -> Tensor:  # fmt: skip
    ours = merged(logits, token_ids, spans.student, temperature, merge, floor)
    theirs = merged(teacher_logits.detach(), teacher_token_ids, spans.teacher, teacher_temperature, merge, floor)
    texts = []
    for text, other in zip(ours, theirs, strict=True):
        values = []
        for q, p in zip(text, other, strict=True):
            if vocab_map is None:
                values.append(sorted_l1(q, p))
                continue
            pairs = [(j, i) for i, j in enumerate(vocab_map.tolist()) if j >= 0]
            share = len(pairs) / len(p)
            w_m, w_u = (share, 1 - share) if matched_weight is None else (matched_weight, unmatched_weight)
            total = torch.zeros((), dtype=torch.float64)
            for j, i in pairs:
                a, b = q[j].clamp_min(floor), p[i].clamp_min(floor)
                m = beta * b + (1 - beta) * a
                if beta == 0:
                    total = total + b * (b / a).log()
                elif beta == 1:
                    total = total + a * (a / b).log()
                else:
                    total = total + beta * b * (b / m).log() + (1 - beta) * a * (a / m).log()
            others = [[k for k in range(len(x)) if k not in known] for x, known in (
                (q, [j for j, _ in pairs]), (p, [i for _, i in pairs]))]  # fmt: skip
            unmatched = sorted_l1(q[others[0]], p[others[1]]) if all(others) else 0.0
            values.append(w_m * total + w_u * unmatched)
        texts.append(torch.stack(values).mean() if values else logits.sum() * 0)
    return torch.stack(texts).mean()


GOLD_CASES: dict[str, dict[str, Any]] = {
    "plain": {}, "js": {"vocab_map": MAP}, "forward": {"vocab_map": MAP, "beta": 0.0, "merge": "bayesian"},
    "reverse": {"vocab_map": MAP, "beta": 1.0, "temperature": 1.5, "teacher_temperature": 0.5},
    "weights": {"vocab_map": MAP, "beta": 0.9, "matched_weight": 0.3, "unmatched_weight": 2.0, "merge": "bayesian"},
    "extended": {"vocab_map": EXTENDED, "beta": 0.2},
    "floor": {"vocab_map": MAP, "floor": 0.05, "merge": "bayesian"},
}  # fmt: skip


@pytest.mark.parametrize("name", GOLD_CASES)
def test_gold_is_the_sum_over_spans(name: str) -> None:
    options = GOLD_CASES[name]
    x, y, teacher = trained(TEXTS["logits"]), trained(TEXTS["logits"]), trained(OTHERS["logits"])
    got = recipes.gold_loss(x, teacher, **TOKENS, **options, backend="reference")
    wanted = gold(y, teacher, **TOKENS, **options)
    same(got, wanted)
    gradient = gradient_of(wanted, y)
    same(gradient_of(got, x), gradient)
    assert gradient.abs().max() > 1e-3
    assert torch.autograd.grad(got, teacher, allow_unused=True)[0] is None
    lower = recipes.gold_loss(TEXTS["logits"].float(), OTHERS["logits"].float(), **TOKENS, **options)
    same(lower, wanted.float(), 1e-5)


def test_gold_of_one_tokenization_is_the_divergence_of_tokens() -> None:
    """Its spans are tokens and its common tokens all, so that JS is that of the package."""
    ends = torch.arange(1, 7).expand(4, 6)
    spans = recipes.align_spans(ends, ends)
    ids, teacher = TEXTS["token_ids"], TEXTS["teacher_logits"]
    got = recipes.gold_loss(TEXTS["logits"], teacher, ids, ids, spans, torch.arange(9), beta=0.3, floor=1e-30)
    same(got, kk.js_divergence(TEXTS["logits"], teacher, beta=0.3))
    other = OTHERS["logits"][:, [0, 1, 2, 3, 4, 0]]
    same(recipes.gold_loss(TEXTS["logits"], other, ids, ids % 7, spans), recipes.uld_loss(TEXTS["logits"], other))


def test_gold_without_spans_and_with_nan_outside_of_them() -> None:
    """What is in no span is not looked at; a text without spans counts 0 in the mean."""
    options = {"vocab_map": MAP, "backend": "reference"}
    filled = trained(torch.where((SPANS.student >= 0)[..., None], TEXTS["logits"], torch.nan))
    teacher = torch.where((SPANS.teacher >= 0)[..., None], OTHERS["logits"], torch.nan)
    loss = recipes.gold_loss(filled, teacher, **TOKENS, **options)
    same(loss, recipes.gold_loss(TEXTS["logits"], OTHERS["logits"], **TOKENS, **options))
    gradient = gradient_of(loss, filled)
    assert (gradient[SPANS.student < 0] == 0).all()
    assert gradient.isfinite().all()
    none = recipes.align_spans(2 * ENDS + 1, 2 * OTHER_ENDS, mask=KEPT)
    assert (none.total == 0).all()
    x = trained(TEXTS["logits"])
    loss = recipes.gold_loss(x, OTHERS["logits"], **(TOKENS | {"spans": none}), **options)
    assert loss == 0
    assert (gradient_of(loss, x) == 0).all()
    twice = recipes.gold_loss(TEXTS["logits"], OTHERS["logits"], **TOKENS, **options, normalizer=2.0)
    same(twice, 2 * recipes.gold_loss(TEXTS["logits"], OTHERS["logits"], **TOKENS, **options))


def test_the_chain_rule_of_a_span() -> None:
    """bayesian, summed over the last token, is the probability of the tokens before it; observed of those behind."""
    logits, ids = TEXTS["logits"][:1, :3], torch.tensor([[3, 1, 7]])
    one = torch.zeros(1, 3, dtype=torch.long)
    logprob = kk.selective_log_softmax(logits, ids)
    for merge, places in (("bayesian", [0, 1]), ("observed", [1, 2])):
        rows, others = span_logprobs(logits, ids, one, 1, merge=merge)  # type: ignore[arg-type]
        same((rows + others[..., None]).exp().sum(), logprob[0, places].sum().exp())


def test_errors() -> None:
    spans = SPANS._replace(student=SPANS.student[:, :2])
    for call in (
        lambda: recipes.align_spans(ENDS, OTHER_ENDS[:1]),
        lambda: recipes.align_spans(ENDS, OTHER_ENDS, mask=KEPT[:1]),
        lambda: recipes.align_spans(ENDS[0], OTHER_ENDS[0]),
        lambda: recipes.gold_loss(TEXTS["logits"], OTHERS["logits"], **(TOKENS | {"spans": spans})),
        lambda: recipes.gold_loss(TEXTS["logits"][:, :2], OTHERS["logits"], **TOKENS),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="shape"):
            call()
    for options, message in (
        ({"matched_weight": 1.0}, "matched_weight is 1.0 and unmatched_weight None"), ({"beta": 2.0}, "beta is 2.0"),
        ({"merge": "mean"}, "merge is 'mean'"), ({"floor": 0.0}, "floor is 0.0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            recipes.gold_loss(TEXTS["logits"], OTHERS["logits"], **TOKENS, vocab_map=MAP, **options)  # type: ignore[arg-type]
