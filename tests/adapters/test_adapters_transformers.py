"""The losses for transformers: against float64, against ForCausalLMLoss, and in Trainers that take two steps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments, default_data_collator
from transformers.loss.loss_utils import ForCausalLMLoss

from kldiv_kernels.adapters import transformers as adapter
from kldiv_kernels.adapters.transformers import cross_entropy_loss, distillation_loss

VOCAB = 37


def _case() -> tuple[Tensor, Tensor]:
    logits = (3 * torch.randn(3, 7, VOCAB)).requires_grad_()
    labels = torch.randint(0, VOCAB, (3, 7))
    labels[0, :3], labels[1, 5:], labels[2, 0] = -100, -100, 4
    return logits, labels


def _definition(logits: Tensor, labels: Tensor, coef: float, normalizer: float | None) -> Tensor:
    """Position by position in float64; columns at −inf have probability 0."""
    total, count = logits.new_zeros((), dtype=torch.float64), 0
    for row, wanted in zip(logits.double(), labels, strict=True):
        for t in range(len(wanted) - 1):
            if wanted[t + 1] == -100:
                continue
            logq = row[t][row[t] > -torch.inf].log_softmax(-1)
            total = total - row[t].log_softmax(-1)[wanted[t + 1]] + coef * (logq.exp() * logq).sum()
            count += 1
    return total / (count if normalizer is None else normalizer)


def _check(loss: Tensor, logits: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    (got,), (want,) = torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits)
    assert loss.dtype == torch.float32
    assert abs(loss.item() - expected.item()) <= relative * max(1, abs(expected.item()))
    largest = want.abs().amax(-1, keepdim=True)
    assert largest.max() > 1e-3
    assert ((got - want).abs() <= relative * largest).all()


@pytest.mark.parametrize("coef", [0.0, 0.3, -0.2])
@pytest.mark.parametrize("count", [None, 11, torch.tensor(23), torch.tensor([[9.5], [9.5]])])
def test_definition(coef: float, count: Any) -> None:
    logits, labels = _case()
    loss = cross_entropy_loss(entropy_coef=coef)(SimpleNamespace(logits=logits), labels, num_items_in_batch=count)
    number = None if count is None else torch.as_tensor(count).reshape(-1)[0].item()
    _check(loss, logits, _definition(logits, labels, coef, number))


@pytest.mark.parametrize("count", [None, 11, torch.tensor(23)])
@pytest.mark.parametrize("shifted", [False, True])
def test_is_for_causal_lm_loss(count: Any, shifted: bool) -> None:
    logits, labels = _case()
    call: dict[str, Any] = {"logits": logits, "labels": labels, "vocab_size": VOCAB, "num_items_in_batch": count}
    if shifted:
        call["shift_labels"] = labels.roll(2, 1)
    loss = cross_entropy_loss()(**call, output_attentions=False)
    _check(loss, logits, ForCausalLMLoss(**call))


def test_another_ignore_index() -> None:
    logits, labels = _case()
    expected = _definition(logits, labels, 0.1, None)
    marked = torch.where(labels == -100, 9999, labels)
    loss = cross_entropy_loss(entropy_coef=0.1)(logits, marked, ignore_index=9999)
    _check(loss, logits, expected)


def test_columns_at_minus_infinity_and_padding() -> None:
    logits, labels = _case()
    banned = torch.zeros(VOCAB, dtype=torch.bool)
    banned[torch.arange(3, VOCAB, 5)] = True
    labels = torch.where(banned[labels.clamp_min(0)] & (labels >= 0), 0, labels)
    masked = torch.where(banned, -torch.inf, logits.detach()).requires_grad_()
    loss = cross_entropy_loss(entropy_coef=0.2)(masked, labels)
    _check(loss, masked, _definition(masked, labels, 0.2, None))
    padded = torch.cat([masked.detach(), torch.full((3, 7, 5), torch.nan)], -1).requires_grad_()
    same = cross_entropy_loss(entropy_coef=0.2)(padded, labels, vocab_size=VOCAB)
    assert same == loss
    (gradient,) = torch.autograd.grad(same, padded)
    assert not gradient[..., VOCAB:].any()
    assert gradient.isfinite().all()


def test_no_target_is_zero() -> None:
    logits, labels = _case()
    for count in (None, torch.tensor(0)):
        loss = cross_entropy_loss(entropy_coef=0.2)(logits, torch.full_like(labels, -100), num_items_in_batch=count)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.item() == 0
        assert not gradient.any()
        with torch.no_grad():
            loss = cross_entropy_loss()(logits, torch.full_like(labels, -100), num_items_in_batch=count)
        assert loss.isnan()


class _OneAtATime(Trainer):
    """The loss of each batch of an evaluation, which the Trainer's own mean is made of."""

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        result = super().prediction_step(*args, **kwargs)
        self.seen.append(result[0].item())
        return result


@pytest.mark.parametrize("way", ["compute_loss_func", "loss_function", "distillation", "transformers' own"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_batch_without_a_target_does_not_count_in_evaluate(tmp_path: Path, way: str, batch: int) -> None:
    """Rows 2 to 4 of six have no target: of the losses, three of six count, or two of three."""
    rows = tiny.ragged(6)
    for row in rows[2:5]:
        row["labels"] = [row["labels"][0]] + [-100] * (tiny.LENGTH - 1)  # the first label is nobody's target
    model, loss = tiny.llama(1), cross_entropy_loss()
    if way == "distillation":
        loss = distillation_loss(model, tiny.llama(2, hidden=24), ce_weight=1.0)
    if way == "loss_function":
        model.loss_function = loss
    arguments = TrainingArguments(
        str(tmp_path), report_to="none", disable_tqdm=True, use_cpu=True, per_device_eval_batch_size=batch
    )
    trainer = _OneAtATime(
        model, arguments, eval_dataset=rows, data_collator=default_data_collator,
        compute_loss_func=loss if way in ("compute_loss_func", "distillation") else None,
    )  # fmt: skip
    trainer.seen = []
    got = trainer.evaluate()["eval_loss"]
    means = []
    for at in range(0, 6, batch):
        data = default_data_collator(rows[at : at + batch])
        if (data["labels"][:, 1:] != -100).any():
            with torch.no_grad():
                logits = model(input_ids=data["input_ids"]).logits
            means.append(_definition(logits, data["labels"], 0.0, None).item())
    assert len(means) == (3 if batch == 1 else 2)
    assert got == pytest.approx(sum(means) / len(means), rel=1e-5)
    assert sum(x != x for x in trainer.seen) == len(trainer.seen) - len(means)


def test_logits_are_read_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """No shift, no upcast, no copy stands between the model's logits and the kernel."""
    logits, labels = _case()
    narrow = logits.detach().bfloat16()
    seen: list[Tensor] = []
    original = adapter.token_stats
    monkeypatch.setattr(adapter, "token_stats", lambda x, **options: seen.append(x) or original(x, **options))
    cross_entropy_loss()(narrow, labels)
    assert [x.data_ptr() for x in seen] == [narrow.data_ptr()]
    assert seen[0].shape == narrow.shape


def _train(folder: Path, model: Any, loss: Any = None, **options: Any) -> tuple[list[float], Trainer]:
    arguments = TrainingArguments(
        output_dir=str(folder), report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", max_steps=2,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1, learning_rate=0.1, optim="sgd",
        **options,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=tiny.ragged(8), data_collator=default_data_collator, compute_loss_func=loss
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


def _same(got: Any, expected: Any, relative: float = 1e-4) -> bool:
    pairs = zip(got.parameters(), expected.parameters(), strict=True)
    start = tiny.llama(1)
    moved = [(e - s).abs().max() for e, s in zip(expected.parameters(), start.parameters(), strict=True)]
    assert min(moved) > 1e-4  # every parameter has moved, in proportion to its gradient
    return all((g - e).abs().max() <= relative * m for (g, e), m in zip(pairs, moved, strict=True))


def test_two_steps_of_a_trainer(tmp_path: Path) -> None:
    expected_model, models = tiny.llama(1), [tiny.llama(1) for _ in range(3)]
    expected, _ = _train(tmp_path, expected_model)
    models[1].loss_function = cross_entropy_loss()
    runs = [
        _train(tmp_path, models[0], cross_entropy_loss())[0],
        _train(tmp_path, models[1])[0],
        _train(tmp_path, models[2], cross_entropy_loss(entropy_coef=0.5))[0],
    ]
    assert len(expected) == 2
    for model, losses in zip(models[:2], runs[:2], strict=True):
        assert losses == pytest.approx(expected, rel=2e-4)  # the Trainer logs four digits
        assert _same(model, expected_model)
    assert not _same(models[2], expected_model)
    assert runs[2][0] < expected[0] - 0.5


@pytest.mark.parametrize(
    "options", [{"kind": "js", "beta": 0.9}, {"kind": "reverse_kl", "ce_weight": 0.3, "temperature": 2.0}]
)
@pytest.mark.parametrize("way", ["compute_loss_func", "loss_function"])
def test_distillation_is_the_distillation_trainers(tmp_path: Path, options: dict[str, Any], way: str) -> None:
    reference = tiny.trainer(
        tmp_path, student=tiny.llama(1), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        logging_steps=1, learning_rate=0.1, optim="sgd", **options,
    )  # fmt: skip
    reference.train()
    expected = [entry["loss"] for entry in reference.state.log_history if "loss" in entry]
    student = tiny.llama(1)
    loss = distillation_loss(student, tiny.llama(2, hidden=24).train(), **options)
    if way == "loss_function":
        student.loss_function = loss
    losses, _ = _train(tmp_path, student, loss if way == "compute_loss_func" else None)
    assert losses == pytest.approx(expected, rel=2e-4)
    assert _same(student, reference.model)


def test_distillation_definition() -> None:
    """Against float64, with a teacher of another width and dropout, and the normaliser of a longer step."""
    student, teacher = tiny.llama(1), tiny.llama(2, hidden=24, vocab=tiny.VOCAB + 8, dropout=0.5).train()
    loss = distillation_loss(student, teacher, "forward_kl", ce_weight=0.25, temperature=2.0, temperature_squared=True)
    data = tiny.batch(3)
    outputs = student(input_ids=data["input_ids"])
    got = loss(outputs, data["labels"], num_items_in_batch=torch.tensor(40))
    with torch.no_grad():
        p = (teacher(input_ids=data["input_ids"]).logits[..., : tiny.VOCAB].double() / 2).log_softmax(-1)
    logits = outputs.logits
    q = (logits.double() / 2).log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1)[:, :-1][data["labels"][:, 1:] != -100].sum() * 4 / 40
    expected = 0.75 * divergence + 0.25 * _definition(logits, data["labels"], 0.0, 40)
    _check(got, logits, expected)


def test_ce_weight_one_runs_no_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = tiny.llama(1), tiny.llama(2)
    monkeypatch.setattr(teacher, "forward", lambda *_, **__: pytest.fail("the teacher ran"))
    data = tiny.batch(2)
    logits = student(input_ids=data["input_ids"]).logits
    got = distillation_loss(student, teacher, ce_weight=1.0)(logits, data["labels"])
    assert got.item() == pytest.approx(_definition(logits, data["labels"], 0.0, None).item(), rel=1e-5)


def test_the_teacher_sees_what_the_student_saw() -> None:
    """Positional and keyword inputs of the last call; those of a generation are not kept, nor used twice."""
    student, teacher = tiny.llama(1), tiny.llama(2)
    loss = distillation_loss(student, teacher)
    data = tiny.batch(2)
    padding = torch.ones_like(data["input_ids"])
    padding[0, :4] = 0
    seen: list[tuple[Any, Any]] = []
    teacher.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    first = student(data["input_ids"][:1])
    cache = first.past_key_values
    outputs = student(data["input_ids"], attention_mask=padding, labels=data["labels"], use_cache=True)
    student(data["input_ids"][:1, :1], past_key_values=cache)
    loss(outputs, data["labels"])
    ((args, kwargs),) = seen
    assert [x is data["input_ids"] for x in args] == [True]
    assert set(kwargs) == {"attention_mask", "use_cache"}
    assert kwargs["attention_mask"] is padding
    assert kwargs["use_cache"] is False
    with pytest.raises(RuntimeError, match="student was not called before the loss"):
        loss(outputs, data["labels"])
    loss.remove()
    outputs = student(data["input_ids"])
    with pytest.raises(RuntimeError, match="no remove"):
        loss(outputs, data["labels"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "entropy"}, "unknown statistic 'entropy'"),
        ({"ce_weight": 1.5}, "ce_weight is 1.5; expected between 0 and 1"),
        ({"temperature": 0.0}, "temperature is 0.0; expected above 0"),
        ({"kind": "js", "beta": 2.0}, "beta is 2.0"),
        ({"kind": "tvd", "alpha": 0.9}, "alpha is 0.9, which kind 'tvd' has no use for"),
        ({"vocab_size": tiny.VOCAB + 1}, "vocab_size is 65; expected 1 to 64"),
        ({"backend": "tpu"}, "backend is 'tpu'; expected one of auto, "),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distillation_loss(tiny.llama(1), tiny.llama(2), **options)


def test_bad_calls() -> None:
    logits, labels = _case()
    model = tiny.llama(1)
    with pytest.raises(ValueError, match="teacher is the student"):
        distillation_loss(model, model)
    with pytest.raises(TypeError, match="entropy_coef is 'high'; expected a number"):
        cross_entropy_loss(entropy_coef="high")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"labels is None; expected \[3, 7\]"):
        cross_entropy_loss()(logits)
    with pytest.raises(TypeError, match=r"logits is tuple; expected a torch.Tensor or a model output"):
        cross_entropy_loss()((logits,), labels)
