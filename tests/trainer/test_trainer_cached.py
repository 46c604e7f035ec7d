"""Training from a teacher cache: its data set, its loss, and that it is the training from the teacher in memory."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.distillation import LossOptions, topk_distillation_of
from kldiv_kernels.linear import hidden_states
from kldiv_kernels.sources import Logits
from kldiv_kernels.teacher_cache import CacheInfo, TeacherCache, TeacherCacheWriter
from kldiv_kernels.trainer import DistillationTrainer
from kldiv_kernels.trainer.cached import CachedSequences, collate

LENGTHS = [12, 5, 9, 2, 12, 7, 3, 10]


def write(
    folder: Path, lengths: list[int], *, k: int, teacher: Any = None, from_position: int = 0, **info: Any
) -> TeacherCache:
    """Sequences of `lengths` random tokens; rows after `from_position` and later tokens, but not after the last."""
    teacher = tiny.llama(2, hidden=24) if teacher is None else teacher
    generator = torch.Generator().manual_seed(5)
    about = CacheInfo(teacher="tiny", vocab_size=teacher.config.vocab_size, k=k, **info)
    with TeacherCacheWriter(folder, about) as writer, torch.no_grad():
        for length in lengths:
            tokens = torch.randint(0, tiny.VOCAB, (length,), generator=generator)
            logprobs = (teacher(input_ids=tokens[None]).logits[0] / about.temperature).log_softmax(-1)
            positions = torch.arange(from_position, length - 1)
            values, ids = logprobs[positions].topk(k)
            writer.append(tokens, ids, values, positions=positions)
    return TeacherCache(folder)


def trained(folder: Path, teacher: Any, rows: Any, **options: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Parameters after four steps, and the held-out numbers then. SGD: Adam would blow rounding up to steps."""
    student = tiny.llama(1)
    options = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.5, "optim": "sgd", "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant", **options,
    }  # fmt: skip
    trainer = DistillationTrainer(
        student, teacher, tiny.arguments(folder / "run", **options), train_dataset=rows, eval_dataset=rows,
        data_collator=None if teacher is None else collate,
    )  # fmt: skip
    trainer.train()
    return dict(student.state_dict()), trainer.evaluate()


@pytest.mark.parametrize(
    "options",
    [
        {"tail": "bucket"},
        {"tail": "renormalize", "kind": "js", "beta": 0.3},
        {"tail": "bucket", "kind": "reverse_kl", "ce_weight": 0.4},
        {"tail": "renormalize", "temperature": 2.0, "temperature_squared": True, "ce_weight": 0.4},
    ],
    ids=str,
)
def test_with_all_of_the_vocabulary_it_is_the_training_from_the_teacher(
    options: dict[str, Any], tmp_path: Path
) -> None:
    teacher = tiny.llama(2, hidden=24)
    temperature = options.get("temperature", 1.0)
    cache = write(tmp_path / "cache", LENGTHS, k=tiny.VOCAB, teacher=teacher, temperature=temperature)
    rows = CachedSequences(cache)
    found, evaluation = trained(tmp_path, None, rows, gradient_accumulation_steps=2, **options)
    text = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    del options["tail"]
    expected, expected_evaluation = trained(tmp_path, teacher, text, gradient_accumulation_steps=2, **options)
    start = tiny.llama(1).state_dict()
    for name, value in expected.items():
        moved = (value - start[name]).abs().max()
        assert moved > 0, name
        assert (found[name] - value).abs().max() <= 2e-5 * moved, name
    assert evaluation["eval_loss"] == pytest.approx(expected_evaluation["eval_loss"], rel=1e-5)
    if temperature == 1.0:
        assert evaluation["eval_topk_kl"] == pytest.approx(expected_evaluation["eval_kl"], rel=1e-4)
    assert "eval_kl" not in evaluation


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "renormalize_teacher", "none"])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_loss_is_the_divergence_where_there_are_rows_and_cross_entropy_at_every_target(
    tail: Any, weight: float
) -> None:
    hidden, weights = torch.randn(3, 9, 8).requires_grad_(), torch.randn(40, 8).requires_grad_()
    logits = hidden @ weights.t()
    values, ids = (3 * torch.randn(3, 9, 40)).log_softmax(-1).topk(6)
    targets = torch.randint(0, 40, (3, 9))
    targets[0, :4] = -100
    ids[1, :5], ids[2, 3, 4:] = -1, -1  # the first have targets without a row, the other a shorter row
    ids[0, 5, 2] = targets[0, 5]
    known = (ids >= 0).any(-1) & (targets != -100)
    cross_entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    sources = (Logits(logits), hidden_states("test", hidden, weights))
    for temperature, squared, source in itertools.product((1.0, 2.5), (False, True), sources):
        divergence = kk.topk_divergence_loss(
            logits, ids, values, tail=tail, mask=known, reduction="sum", temperature=temperature,
            temperature_squared=squared,
        )  # fmt: skip
        expected = ((1 - weight) * divergence + weight * cross_entropy) / 20
        expected_gradients = torch.autograd.grad(expected, (hidden, weights), retain_graph=True)
        options = LossOptions(
            "forward_kl", weight, tail=tail, temperature=temperature, temperature_squared=squared
        )  # fmt: skip
        loss = topk_distillation_of(source, ids, values, targets, options, vocab_size=40, normalizer=torch.tensor(20))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        found_gradients = torch.autograd.grad(loss, (hidden, weights), retain_graph=True)
        for found, wanted in zip(found_gradients, expected_gradients, strict=True):
            assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_rows_stand_where_the_cache_has_them_and_their_next_tokens_are_the_labels(tmp_path: Path) -> None:
    cache = write(tmp_path, [6, 4], k=3, from_position=2, dtype="float16")
    row, sequence = CachedSequences(cache)[0], cache[0]
    assert row["input_ids"].tolist() == sequence.token_ids.tolist()
    assert row["labels"].tolist() == [-100] * 3 + sequence.token_ids[3:].tolist()
    assert row["topk_ids"][2:5].tolist() == sequence.topk_ids.tolist()
    assert torch.equal(row["topk_logprobs"][2:5], sequence.topk_logprobs)
    for absent in (0, 1, 5):
        assert row["topk_ids"][absent].tolist() == [-1] * 3
        assert row["topk_logprobs"][absent].tolist() == [-torch.inf] * 3
    batch = collate(list(CachedSequences(cache)))  # type: ignore[call-overload]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 4 + [0] * 2]
    assert batch["labels"][1].tolist()[4:] == [-100] * 2
    assert (batch["topk_ids"][1, 4:] == -1).all()
    assert (batch["topk_logprobs"][1, 4:] == -torch.inf).all()
    with pytest.raises(ValueError, match="collate: unknown column 'weight'; expected input_ids"):
        collate([{"input_ids": [1], "weight": [2.0]}])


def test_the_split_is_apart_whole_neighbours_and_of_the_seed(tmp_path: Path) -> None:
    rows = CachedSequences(write(tmp_path / "cache", [3] * 20, k=2))
    places = set()
    for seed in range(8):
        train, held_out = rows.split(0.2, seed)
        assert sorted([*train.numbers, *held_out.numbers]) == list(range(20))
        assert list(held_out.numbers) == list(range(held_out.numbers[0], held_out.numbers[0] + 4))
        assert list(held_out.numbers) == list(rows.split(0.2, seed).held_out.numbers)
        places.add(held_out.numbers[0])
    assert len(places) > 3
    assert len(rows.split(0.001, 0).held_out) == 1
    assert len(rows.split(0.999, 0).train) == 1
    assert torch.equal(held_out[-1]["input_ids"], rows[held_out.numbers[-1]]["input_ids"])
    assert pickle.loads(pickle.dumps(held_out))[0].keys() == held_out[0].keys()
    with pytest.raises(ValueError, match=r"has 1 sequence\(s\); expected at least 2"):
        CachedSequences(write(tmp_path / "one", [3], k=2)).split(0.5, 0)


def test_padding_and_workers_change_nothing(tmp_path: Path) -> None:
    rows = CachedSequences(write(tmp_path / "cache", LENGTHS, k=8))
    trainer = DistillationTrainer(tiny.llama(1), None, tiny.arguments(tmp_path, ce_weight=0.3), train_dataset=rows)
    student = trainer.model
    whole = trainer.compute_loss(student, collate([rows[number] for number in range(8)])).item()
    parts = [collate([rows[number]]) for number in range(8)]
    counts = [(part["labels"] != -100).sum().item() for part in parts]
    assert sum(counts) == sum(LENGTHS) - len(LENGTHS)
    one_by_one = sum(trainer.compute_loss(student, p).item() * n for p, n in zip(parts, counts, strict=True))
    assert whole == pytest.approx(one_by_one / sum(counts), rel=1e-5)
    alone, _ = trained(tmp_path, None, rows)
    by_workers, _ = trained(tmp_path, None, rows, dataloader_num_workers=2)
    assert all(torch.equal(alone[name], value) for name, value in by_workers.items())


def test_columns_of_a_data_set_of_ones_own_are_kept(tmp_path: Path) -> None:
    rows = CachedSequences(write(tmp_path / "cache", LENGTHS, k=8))
    mine = Dataset.from_list([{name: value.tolist() for name, value in row.items()} for row in rows])
    expected, evaluation = trained(tmp_path, None, rows)
    found, again = trained(tmp_path, None, mine.add_column("source", ["cache"] * len(rows)))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert again["eval_topk_kl"] == evaluation["eval_topk_kl"]


def test_held_out_numbers_are_per_token_and_the_kl_on_k_and_one_outcomes(tmp_path: Path) -> None:
    student, teacher = tiny.llama(1), tiny.llama(2, hidden=24)
    rows = CachedSequences(write(tmp_path / "cache", LENGTHS, k=8, teacher=teacher, temperature=2.0))
    trainer = DistillationTrainer(
        student, None, tiny.arguments(tmp_path, kind="js", temperature=2.0, tail="renormalize"), eval_dataset=rows
    )
    metrics = trainer.evaluate()
    cross_entropy, kl, full, count = 0.0, 0.0, 0.0, 0
    for row in rows:
        with torch.no_grad():
            s, t = (m(input_ids=row["input_ids"][None]).logits[0].double() for m in (student, teacher))
        for position in range(len(row["input_ids"]) - 1):
            cross_entropy -= s[position].log_softmax(-1)[row["labels"][position + 1]].item()
            q, p = ((x[position] / 2.0).softmax(-1) for x in (s, t))
            ids = p.topk(8).indices
            q8, p8 = (torch.cat([x[ids], 1 - x[ids].sum(0, keepdim=True)]) for x in (q, p))
            kl += (p8 * (p8 / q8).log()).sum().item()
            full += (p * (p / q).log()).sum().item()
            count += 1
    assert metrics["eval_loss"] == pytest.approx(cross_entropy / count, rel=1e-5)
    assert metrics["eval_topk_kl"] == pytest.approx(kl / count, rel=1e-5)
    assert kl < 0.99 * full


def test_mixed_precision_is_near(tmp_path: Path) -> None:
    rows = CachedSequences(write(tmp_path / "cache", LENGTHS, k=8))
    exact, rounded = (
        trained(tmp_path, None, rows, learning_rate=0.1, bf16=bf16)[1]["eval_topk_kl"] for bf16 in (False, True)
    )
    assert rounded == pytest.approx(exact, rel=0.05)
    assert rounded != exact


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    cache = write(tmp_path / "cache", LENGTHS, k=8)
    rows, arguments = CachedSequences(cache), tiny.arguments(tmp_path)
    narrow = tiny.llama(1, vocab=48)

    def trainer(model: Any, rows: Any, arguments: Any = arguments) -> DistillationTrainer:
        return DistillationTrainer(model, None, arguments, train_dataset=rows)

    with pytest.raises(ValueError, match=r"temperature is 2.0; the log-probs in .*cache were taken at 1.0"):
        trainer(tiny.llama(1), rows, tiny.arguments(tmp_path, temperature=2.0))
    with pytest.raises(ValueError, match=r"cache has ids up to 63; the student has 48 columns"):
        trainer(narrow, rows)
    with pytest.raises(ValueError, match=r"sequence 0 of .*cache has the to.* expected below vocab_size = 48"):
        CachedSequences(cache, vocab_size=48)
    with pytest.raises(ValueError, match=r"vocab_size is 65; expected 1 to 64, the width of the narrower of model and"):
        trainer(tiny.llama(1, vocab=80), rows, tiny.arguments(tmp_path, vocab_size=65))
    assert trainer(tiny.llama(1, vocab=80), rows).vocab_size == tiny.VOCAB, "the student's own columns are padding"
    short = tiny.llama(1)
    short.config.max_position_embeddings = 10
    with pytest.raises(ValueError, match=r"sequence 0 of .* has 12 tokens; the student has 10 positions"):
        trainer(short, rows)
    text = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    with pytest.raises(ValueError, match=r"ce_weight = 0.0 needs one \(1 does not\), or data with topk_ids and topk"):
        trainer(tiny.llama(1), text)
    unpaired = trainer(tiny.llama(1), rows)
    with pytest.raises(ValueError, match="the batch has no topk_ids and topk_logprobs; it has input_ids, labels"):
        unpaired.compute_loss(unpaired.model, tiny.batch(2))
    with pytest.raises(ValueError, match=r"kind is 'js'; expected forward_kl, reverse_kl.* where tail is 'none'"):
        tiny.arguments(tmp_path, kind="js", tail="none")
    with pytest.raises(ValueError, match="tail is 'buckets'; expected bucket"):
        tiny.arguments(tmp_path, tail="buckets")


def test_a_student_narrower_than_the_teacher_learns_where_the_ids_are_its_own(tmp_path: Path) -> None:
    teacher = tiny.llama(2, hidden=24, vocab=tiny.VOCAB + 16)
    # No mass on the columns that the student does not have: they are never among the most probable.
    teacher.get_input_embeddings().weight.data[tiny.VOCAB :] = 0.0
    cache = write(tmp_path / "cache", LENGTHS, k=2, teacher=teacher)
    rows = CachedSequences(cache, vocab_size=tiny.VOCAB)
    _, before = trained(tmp_path, None, rows, learning_rate=0.0)
    _, after = trained(tmp_path, None, rows, max_steps=20, learning_rate=0.1)
    assert after["eval_topk_kl"] < 0.8 * before["eval_topk_kl"]


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_whole_vocabulary_has_no_rest(weight: float) -> None:
    """1 − Σ is rounding there, of an outcome that the student does not have."""
    columns, generator = 7, torch.Generator().manual_seed(3)
    logits, teacher = torch.randn(2, 1, 20, columns, generator=generator)
    ids, targets = torch.arange(columns).expand(1, 20, columns), torch.zeros(1, 20, dtype=torch.int64)
    logprobs = teacher.log_softmax(-1) - 1e-6
    loss = topk_distillation_of(
        Logits(logits),
        ids,
        logprobs,
        targets,
        LossOptions(ce_weight=weight),
        vocab_size=columns,
        normalizer=torch.tensor(20),
    )
    full = kk.forward_kl(logits, teacher)
    expected = (1 - weight) * full - weight * logits.log_softmax(-1)[..., 0].mean()
    assert torch.allclose(loss, expected, rtol=1e-4)
