"""A run that is killed and resumed ends with the parameters and metrics of one that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import TrainerCallback, get_cosine_schedule_with_warmup

from kldiv_kernels.teacher_cache import CacheInfo, TeacherCache, TeacherCacheWriter
from kldiv_kernels.trainer import run
from kldiv_kernels.trainer.cached import CachedSequences, CachedSplit
from kldiv_kernels.trainer.data import Blocks

STEPS, SAVE_EVERY, KILLED_AT = 12, 3, 8
# Others depend on the clock.
COMPARED = ("step", "loss", "eval_loss", "eval_kl", "eval_topk_kl", "grad_norm")


class _Kill(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)


def cached(folder: Path) -> CachedSplit:
    """19 sequences of 2 to 12 tokens for training, 5 held out; written by the first call."""
    if not folder.exists():
        with TeacherCacheWriter(folder, CacheInfo(teacher="tiny", vocab_size=tiny.VOCAB, k=5)) as writer:
            for number, row in enumerate(tiny.with_rows(tiny.ragged(24))):
                tokens = 2 + number % (tiny.LENGTH - 1)
                writer.append(*(row[name][:tokens] for name in ("input_ids", "topk_ids", "topk_logprobs")))
    return CachedSequences(TeacherCache(folder)).split(5 / 24, seed=3)


def fit(
    folder: Path, *callbacks: TrainerCallback, cache: Path | None = None, steps: int = STEPS, **options: Any
) -> dict[str, Any]:
    """Dropout and shuffling on, an epoch that ends between checkpoints: what a resumed run can get wrong."""
    rows = Dataset.from_list(tiny.ragged(19))
    return run.fit(
        tiny.llama(1, dropout=0.2),
        tiny.llama(2, hidden=24) if cache is None else None,
        Blocks(rows, rows.select(range(5))) if cache is None else cached(cache),
        run.training_arguments(
            folder, steps=steps, batch_size=2, learning_rate=1e-2, seed=3, log_every=1, eval_every=4,
            save_every=SAVE_EVERY, gradient_accumulation_steps=2, ce_weight=0.5, **options,
        ),
        tokenizer=tiny.word_tokenizer(),
        callbacks=callbacks,
    )  # fmt: skip


def _killed(_: int, folder: Path, cache: Path | None) -> None:
    torch.set_num_threads(1)
    fit(folder, _Kill(), cache=cache)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Two runs are compared bit by bit: matrix products round by the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def uninterrupted(_one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    fit(folder)
    return folder


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import LlamaForCausalLM

    return dict(LlamaForCausalLM.from_pretrained(folder).state_dict())


def metrics(folder: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (folder / run.METRICS).read_text().splitlines()]
    return [
        {name: value for name, value in entry.items() if name in COMPARED}
        for entry in entries
        if "loss" in entry or "eval_loss" in entry
    ]


def assert_same_run(found: Path, expected: Path) -> None:
    assert metrics(found) == metrics(expected)
    assert parameters(found).keys() == parameters(expected).keys()
    for name, value in parameters(expected).items():
        assert torch.equal(parameters(found)[name], value), name


@pytest.mark.parametrize("from_cache", [False, True], ids=["teacher", "cache"])
def test_killed_and_resumed_equals_uninterrupted(from_cache: bool, uninterrupted: Path, tmp_path: Path) -> None:
    folder, cache = tmp_path / "run", tmp_path / "cache" if from_cache else None
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        torch.multiprocessing.spawn(_killed, args=(folder, cache), nprocs=1)
    assert run.last_checkpoint(folder) == folder / f"checkpoint-{KILLED_AT - KILLED_AT % SAVE_EVERY}"
    assert metrics(folder)[-1]["step"] > KILLED_AT - KILLED_AT % SAVE_EVERY, "nothing to take back"
    assert not run.is_finished(folder)
    summary = fit(folder, cache=cache)
    expected = uninterrupted
    if from_cache:
        expected = tmp_path / "expected"
        assert summary == fit(expected, cache=cache)
        assert summary["teacher_student_topk_kl"] > 0
    assert_same_run(folder, expected)


def test_a_checkpoint_cut_off_while_it_was_written_is_passed_over(uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    newest, before = (tmp_path / f"checkpoint-{STEPS - back}" for back in (0, SAVE_EVERY))
    state = newest / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    (tmp_path / "model.safetensors").unlink()
    assert run.last_checkpoint(tmp_path) == before
    fit(tmp_path)
    assert_same_run(tmp_path, uninterrupted)


def test_a_run_from_hidden_states_goes_on_from_logits(uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / f"checkpoint-{STEPS}")
    assert run.read_json(uninterrupted / run.SUMMARY)["fused_linear"] is True
    assert fit(tmp_path, fused_linear=False)["fused_linear"] is False
    start, end, found = tiny.llama(1).state_dict(), parameters(uninterrupted), parameters(tmp_path)
    for name, value in end.items():
        assert (found[name] - value).abs().max() <= 1e-3 * (value - start[name]).abs().max(), name


def test_killed_after_the_last_step_takes_no_step_more(uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    for name in ("model.safetensors", run.SUMMARY, run.PLOT):
        (tmp_path / name).unlink()
    summary = fit(tmp_path)
    assert_same_run(tmp_path, uninterrupted)
    assert summary == run.read_json(uninterrupted / run.SUMMARY)
    assert (tmp_path / run.PLOT).exists()


class _Rates(TrainerCallback):
    """The learning rate that each step is made with."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.found.append(given["optimizer"].param_groups[0]["lr"])


def test_more_steps_follow_the_schedule_of_their_number(uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    rates, longer = _Rates(), STEPS + 3
    assert fit(tmp_path, rates, steps=longer)["steps"] == longer
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, longer // 20), longer)
    expected = []
    for _ in range(longer):
        expected += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert rates.found == expected[STEPS:]
    assert min(rates.found) > 0


def test_a_run_keeps_its_options(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match=r"--resume: .* holds no run"):
        run.check_run(folder, {"lr": 0.1}, resume=True)
    run.check_run(folder, {"lr": 0.1, "batch_size": 2}, resume=False)
    run.begin_run(folder, {"lr": 0.1, "batch_size": 2})
    run.check_run(folder, {"lr": 0.1, "batch_size": 2}, resume=True)
    with pytest.raises(ValueError, match=r"--resume: --batch-size is 4, but the run in .* began with 2"):
        run.check_run(folder, {"lr": 0.1, "batch_size": 4}, resume=True)
    for batch_size, longer in ((2, False), (4, True)):
        given = {"lr": 0.1, "batch_size": batch_size}
        assert run.check_run(folder, given, resume=True, extendable="batch_size") == longer
    with pytest.raises(ValueError, match=r"--batch-size is 1, .* may have more of them, not fewer"):
        run.check_run(folder, {"lr": 0.1, "batch_size": 1}, resume=True, extendable="batch_size")
    with pytest.raises(ValueError, match=r"--output: .* holds a run; pass --resume"):
        run.check_run(folder, {"lr": 0.1, "batch_size": 2}, resume=False)
