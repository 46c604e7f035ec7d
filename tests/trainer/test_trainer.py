"""The trainer's loss, gradient and held-out numbers, against values computed by hand in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from kldiv_kernels.distillation import distillation_of
from kldiv_kernels.linear import hidden_states
from kldiv_kernels.sources import Logits
from kldiv_kernels.trainer import DistillationTrainer


def by_hand(
    logits: Tensor, teacher: Tensor, labels: Tensor, *, vocab: int = tiny.VOCAB, kind: str = "forward_kl",
    ce_weight: float, temperature: float = 1.0, temperature_squared: bool = False, beta: float = 0.5,
) -> Tensor:  # fmt: skip
    """Mean over target tokens of (1 − w)·D + w·CE, position by position."""
    total, count = logits.new_zeros((), dtype=torch.float64), 0
    for row in range(labels.shape[0]):
        for position in range(labels.shape[1] - 1):
            target = int(labels[row, position + 1])
            if target == -100:
                continue
            count += 1
            s, t = (x[row, position, :vocab].double() for x in (logits, teacher))
            q, p = (s / temperature).softmax(-1), (t / temperature).softmax(-1)
            if kind == "forward_kl":
                divergence = (p * (p / q).log()).sum()
            else:
                m = beta * p + (1 - beta) * q
                divergence = beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()
            if temperature_squared:
                divergence = divergence * temperature**2
            total = total + (1 - ce_weight) * divergence - ce_weight * s.log_softmax(-1)[target]
    return total / count


CASES: list[dict[str, Any]] = [
    {"ce_weight": 0.0},
    {"ce_weight": 1.0},
    {"ce_weight": 0.3},
    {"ce_weight": 0.3, "kind": "js", "beta": 0.2},
    {"ce_weight": 0.3, "temperature": 2.5},
    {"ce_weight": 0.7, "kind": "js", "beta": 0.8, "temperature": 0.5, "temperature_squared": True},
    {"ce_weight": 0.0, "temperature": 3.0, "temperature_squared": True},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_loss_and_gradient_equal_the_hand_computed_ones(options: dict[str, Any], tmp_path: Path) -> None:
    """From logits, and from hidden states and heads."""
    labels = tiny.batch(4)["labels"]
    hidden, weight = torch.randn(4, tiny.LENGTH, 8).requires_grad_(), torch.randn(tiny.VOCAB, 8).requires_grad_()
    theirs, their_weight = torch.randn(4, tiny.LENGTH, 6), torch.randn(tiny.VOCAB + 3, 6)
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    logits, teacher = hidden @ weight.t(), theirs @ their_weight.t()
    expected = by_hand(logits, teacher, labels, **options)
    expected_gradients = torch.autograd.grad(expected, (hidden, weight), retain_graph=True)
    for source in (Logits(logits, teacher), hidden_states("test", hidden, weight, theirs, their_weight)):
        loss = distillation_of(
            source, targets, tiny.arguments(tmp_path, **options).loss_options(),
            vocab_size=tiny.VOCAB, normalizer=(targets != -100).sum(),
        )  # fmt: skip
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for found, wanted in zip(torch.autograd.grad(loss, (hidden, weight)), expected_gradients, strict=True):
            assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("options", CASES[:4], ids=str)
def test_compute_loss_runs_both_models_and_shifts_the_labels(options: dict[str, Any], tmp_path: Path) -> None:
    student, teacher, batch = tiny.llama(1), tiny.llama(2, hidden=24), tiny.batch(5)
    loss = tiny.trainer(tmp_path, student=student, teacher=teacher, **options).compute_loss(student, batch)
    with torch.no_grad():
        logits, teacher_logits = (model(input_ids=batch["input_ids"]).logits for model in (student, teacher))
    assert loss.item() == pytest.approx(by_hand(logits, teacher_logits, batch["labels"], **options).item(), rel=1e-5)
    assert set(batch) == {"input_ids", "labels"}, "the caller's batch was changed"


def test_a_batch_without_targets_has_loss_zero_and_no_gradient(tmp_path: Path) -> None:
    batch = tiny.batch(2)
    batch["labels"][:, 1:] = -100
    trainer = tiny.trainer(tmp_path, ce_weight=0.5)
    for items in (None, torch.tensor(0)):
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)
        loss.backward()
        assert loss.item() == 0.0
        assert all(not p.grad.any() for p in trainer.model.parameters())


@pytest.mark.parametrize("wide", ["student", "teacher"])
@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
def test_padding_columns_of_the_wider_model_take_no_part(wide: str, ce_weight: float, tmp_path: Path) -> None:
    widths = {"student": tiny.VOCAB, "teacher": tiny.VOCAB} | {wide: tiny.VOCAB + 8}
    student = tiny.llama(1, vocab=widths["student"])
    teacher = tiny.llama(2, hidden=24, vocab=widths["teacher"])
    batch = tiny.batch(3)
    loss = tiny.trainer(tmp_path, student=student, teacher=teacher, ce_weight=ce_weight).compute_loss(student, batch)
    loss.backward()
    with torch.no_grad():
        logits, teacher_logits = (model(input_ids=batch["input_ids"]).logits for model in (student, teacher))
    expected = by_hand(logits, teacher_logits, batch["labels"], ce_weight=ce_weight)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradient = student.get_output_embeddings().weight.grad
    assert gradient[: tiny.VOCAB].any()
    assert not gradient[tiny.VOCAB :].any()


@pytest.mark.parametrize("ce_weight", [0.0, 1.0])
def test_evaluation_reports_cross_entropy_and_kl_per_token_whatever_the_loss(ce_weight: float, tmp_path: Path) -> None:
    student, teacher, rows = tiny.llama(1), tiny.llama(2, hidden=24), tiny.ragged(5)
    trainer = tiny.trainer(
        tmp_path, student=student, teacher=teacher, rows=rows, ce_weight=ce_weight, kind="js", temperature=2.0,
        per_device_eval_batch_size=2,
    )  # fmt: skip
    metrics = trainer.evaluate()
    batch = tiny.batch(5)
    with torch.no_grad():
        logits, teacher_logits = (model(input_ids=batch["input_ids"]).logits for model in (student, teacher))
    for name, weight in (("eval_loss", 1.0), ("eval_kl", 0.0)):
        expected = by_hand(logits, teacher_logits, batch["labels"], ce_weight=weight)
        assert metrics[name] == pytest.approx(expected.item(), rel=1e-5), name


def test_training_moves_the_student_towards_the_teacher_and_leaves_the_teacher_alone(tmp_path: Path) -> None:
    teacher = tiny.llama(2, hidden=24, dropout=0.5)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer = tiny.trainer(tmp_path, teacher=teacher, max_steps=20, learning_rate=1e-2)
    first = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert trainer.evaluate()["eval_kl"] < 0.8 * first
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_cross_entropy_alone_needs_no_teacher(tmp_path: Path) -> None:
    trainer = DistillationTrainer(
        tiny.llama(1), None, tiny.arguments(tmp_path, ce_weight=1.0), eval_dataset=tiny.ragged(3),
        data_collator=lambda rows: {k: torch.tensor([row[k] for row in rows]) for k in rows[0]},
    )  # fmt: skip
    assert set(trainer.evaluate()) >= {"eval_loss"}
    assert "eval_kl" not in trainer.evaluate()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "forwrd_kl"}, "kind: unknown statistic 'forwrd_kl'; did you mean forward_kl"),
        ({"kind": "js", "beta": 1.5}, "beta is 1.5; expected between 0 and 1 for js"),
        ({"kind": "renyi", "alpha": 1.0}, "alpha is 1.0; expected above 0"),
        ({"kind": "forward_kl", "beta": 0.9}, "beta is 0.9, which kind 'forward_kl' has no use for; it is for js"),
        ({"kind": "js", "alpha": 0.5}, "alpha is 0.5, which kind 'js' has no use for"),
        ({"temperature": 0.0}, "temperature is 0.0; expected above 0"),
        ({"ce_weight": 1.2}, "ce_weight is 1.2; expected between 0 and 1"),
        ({"backend": "cuda13"}, "backend is 'cuda13'; expected one of auto"),
    ],
)
def test_arguments_that_the_loss_does_not_allow(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.arguments(tmp_path, **options)


def test_a_missing_teacher_a_wrong_vocabulary_and_missing_labels_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher_model is None; ce_weight = 0\.5 needs one"):
        DistillationTrainer(tiny.llama(1), None, tiny.arguments(tmp_path, ce_weight=0.5))
    with pytest.raises(ValueError, match="vocab_size is 65; expected 1 to 64"):
        tiny.trainer(tmp_path, vocab_size=65)
    trainer = tiny.trainer(tmp_path)
    with pytest.raises(ValueError, match="the batch has no labels; it has input_ids"):
        trainer.compute_loss(trainer.model, {"input_ids": tiny.batch(1)["input_ids"]})
