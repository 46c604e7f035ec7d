"""gold_loss and uld_loss beside TRL's ULDLoss, value and gradient: both ways to merge, with and without the hybrid."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recipe_case import gradient_of, same
from torch import Tensor

from kldiv_kernels import recipes

gold = pytest.importorskip("trl.experimental.gold.gold_trainer")

STUDENT_VOCAB = {"the": 0, "un": 1, "tied": 2, "a": 3, "b": 4, "ie": 5, "d": 6, "<pad>": 7, "x": 8}
TEACHER_VOCAB = {"unt": 0, "the": 1, "d": 2, "ied": 3, "b": 4, "<end>": 5, "a": 6}
PROMPT = 2
# In which both end at the last place, as a text that is whole: TRL makes one more span of what is left otherwise.
ENDS = torch.tensor([[3, 5, 8, 9, 12], [1, 2, 4, 7, 9]])
TEACHER_ENDS = torch.tensor([[3, 6, 9, 12], [2, 3, 5, 9]])


def text(ids: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, PROMPT + tokens, ids, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, ids, (2, PROMPT + tokens), generator=generator)


def theirs(settings: dict[str, Any], logits: Tensor, teacher: Tensor, ids: Tensor, teacher_ids: Tensor) -> Tensor:
    config = SimpleNamespace(
        uld_crossentropy_weight=0.0, uld_distillation_weight=1.0, uld_skip_student_eos=False,
        uld_skip_teacher_eos=False, use_extended_uld=True, **settings,
    )  # fmt: skip
    vocabularies = [SimpleNamespace(get_vocab=lambda vocab=vocab: vocab) for vocab in (STUDENT_VOCAB, TEACHER_VOCAB)]
    labels, offsets = [], []
    for x, ends in ((ids, ENDS), (teacher_ids, TEACHER_ENDS)):
        labels.append(torch.where(torch.arange(x.shape[1]) < PROMPT, -100, x))
        prompt = torch.zeros(2, PROMPT, 2, dtype=torch.long)
        starts = torch.cat([torch.zeros(2, 1, dtype=torch.long), ends[:, :-1]], dim=1)
        offsets.append(torch.cat([prompt, torch.stack([starts, ends], dim=-1)], dim=1))
    loss: Tensor = gold.ULDLoss(config, *vocabularies)(
        logits, teacher, *labels, ids, teacher_ids, student_byte_offsets=offsets[0], teacher_byte_offsets=offsets[1]
    )
    return loss


@pytest.mark.parametrize("merge", ["observed", "bayesian"])
@pytest.mark.parametrize(
    "hybrid", [None, {}, {"beta": 0.0}, {"beta": 1.0, "weights": (0.25, 1.5)}], ids=["uld", "js", "forward", "weights"]
)
def test_gold_is_trls(hybrid: dict[str, Any] | None, merge: str) -> None:
    logits, ids = text(9, 5, 0)
    teacher, teacher_ids = text(7, 4, 1)
    weights = (hybrid or {}).get("weights", (None, None))
    settings = {
        "uld_student_temperature": 1.5, "uld_teacher_temperature": 0.8, "uld_token_merge_strategy": merge,
        "uld_use_hybrid_loss": hybrid is not None, "beta": (hybrid or {}).get("beta", 0.5),
        "uld_hybrid_matched_weight": weights[0], "uld_hybrid_unmatched_weight": weights[1],
    }  # fmt: skip
    x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    wanted = theirs(settings, y, teacher, ids, teacher_ids)
    # TRL's "observed" takes the rows at the answer's tokens, "bayesian" those that predict them.
    first = PROMPT - (merge == "bayesian")
    columns = recipes.vocabulary_map(STUDENT_VOCAB, TEACHER_VOCAB)
    got = recipes.gold_loss(
        x[:, first : first + 5], teacher[:, first : first + 4], ids[:, PROMPT:], teacher_ids[:, PROMPT:],
        recipes.align_spans(ENDS, TEACHER_ENDS), None if hybrid is None else columns, beta=settings["beta"],
        matched_weight=weights[0], unmatched_weight=weights[1], merge=merge, temperature=1.5, teacher_temperature=0.8,
        backend="reference",
    )  # fmt: skip
    same(got, wanted)
    gradient = gradient_of(wanted, y)
    same(gradient_of(got, x), gradient)
    assert gradient.abs().max() > 1e-3


def test_spans_are_trls() -> None:
    """Of texts whose tokens each have a place of their own to end."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(40):
        sides = [(torch.randperm(11, generator=generator)[:size] + 1).sort().values for size in (6, 4)]
        sides = [torch.cat([x, torch.tensor([12])]) for x in sides]
        spans = recipes.align_spans(sides[0][None], sides[1][None])
        groups = gold.ULDLoss._align_by_byte_offsets(*([(0, end) for end in x.tolist()] for x in sides))
        for numbers, of_side in zip((spans.student, spans.teacher), groups, strict=True):
            assert numbers[0].tolist() == [k for k, group in enumerate(of_side) for _ in group]
        assert spans.total.tolist() == [len(groups[0])]


def test_uld_is_trls() -> None:
    """Without the extension: token by token, whatever the texts are."""
    logits, ids = text(9, 4, 4)
    teacher, teacher_ids = text(7, 4, 5)
    settings = {
        "uld_student_temperature": 1.0, "uld_teacher_temperature": 1.0, "uld_token_merge_strategy": "observed",
        "uld_use_hybrid_loss": False,
    }  # fmt: skip
    config = SimpleNamespace(
        uld_crossentropy_weight=0.0, uld_distillation_weight=1.0, uld_skip_student_eos=False,
        uld_skip_teacher_eos=False, use_extended_uld=False, **settings,
    )  # fmt: skip
    wanted = gold.ULDLoss(config)(logits, teacher, ids, teacher_ids, ids, teacher_ids)
    same(recipes.uld_loss(logits, teacher), wanted)
