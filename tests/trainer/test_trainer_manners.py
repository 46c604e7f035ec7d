"""What a training does when it is interrupted, when nobody watches, and when its model is not there."""

from __future__ import annotations

import io
import json
import logging
import os
import shlex
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import commands
import pytest
import tiny
import torch
from datasets import Dataset
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from processes import start_ranks
from rich.console import Console
from transformers import AutoModelForCausalLM, TrainerCallback

from kldiv_kernels import cli
from kldiv_kernels.trainer import progress, run
from kldiv_kernels.trainer.data import Blocks
from kldiv_kernels.trainer.interrupts import Stopped
from kldiv_kernels.trainer.quiet import quiet

STEPS, STOPPED_AT = 5, 2


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    commands.stay_offline(monkeypatch)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.pair(tmp_path_factory.mktemp("models"))


def words(models: Path, output: Path) -> list[str]:
    return [
        "train", "distill", "--student", str(models / "student"), "--teacher", str(models / "teacher"),
        "--data", str(models / "text.txt"), "--output", str(output), "--steps", str(STEPS), "--batch-size", "2",
        "--block-size", "16", "--lr", "1e-2", "--log-every", "1", "--eval-every", "4", "--save-every", "4",
    ]  # fmt: skip


def kldiv(given: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["/usr/bin/kldiv", *given])
    return commands.invoke(cli.app, *given)


class _Signals(TrainerCallback):
    """Sends them to this process at the beginning of the step after `STOPPED_AT - 1`."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == STOPPED_AT - 1:
            for number in self.numbers:
                os.kill(os.getpid(), number)


def interrupted(monkeypatch: pytest.MonkeyPatch, given: list[str], *numbers: int) -> tuple[int, str]:
    with monkeypatch.context() as patch:
        fit = run.fit
        patch.setattr(run, "fit", lambda *args, **options: fit(*args, **options, callbacks=[_Signals(*numbers)]))
        return kldiv(given, patch)


def weights(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight.detach()


@pytest.fixture(autouse=True)
def _ctrl_c() -> Iterator[None]:
    """As in a terminal: where the tests are started in the background, SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_has_a_checkpoint_and_says_how_it_goes_on(
    number: int, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    given = words(models, tmp_path / "a run")
    code, printed = interrupted(monkeypatch, given, number)
    assert code == 128 + number
    assert "stops after this step, with a checkpoint. A second Ctrl-C stops it at once." in capfd.readouterr().err
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert run.last_checkpoint(tmp_path / "a run") == tmp_path / "a run" / f"checkpoint-{STOPPED_AT}"
    told, _, command = printed.partition(" This continues the run: ")
    assert told.endswith(f"Stopped after step {STOPPED_AT}, whose checkpoint is written.")
    assert shlex.split(command) == ["kldiv", *given, "--resume"]

    code, printed = kldiv(shlex.split(command)[1:], monkeypatch)
    assert code == 0, printed
    whole = words(models, tmp_path / "whole")
    assert kldiv(whole, monkeypatch)[0] == 0
    assert torch.equal(weights(tmp_path / "a run"), weights(tmp_path / "whole"))
    steps = [json.loads(line) for line in (tmp_path / "a run" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in steps if "loss" in entry] == list(range(1, STEPS + 1))


def _rank(rank: int, port: int, folder: Path) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    rows = Dataset.from_list(tiny.ragged(8))
    arguments = run.training_arguments(
        folder, steps=STEPS, batch_size=1, learning_rate=1e-2, seed=3, log_every=1, eval_every=4, save_every=4,
        ce_weight=1.0, ddp_backend="gloo",
    )  # fmt: skip
    callbacks = [_Signals(signal.SIGTERM)] if rank == 1 else []
    with pytest.raises(Stopped) as stopped:
        run.fit(
            tiny.llama(1), None, Blocks(rows, rows), arguments, tokenizer=tiny.word_tokenizer(), callbacks=callbacks
        )
    assert (stopped.value.number, stopped.value.step) == (signal.SIGTERM, STOPPED_AT)
    torch.distributed.destroy_process_group()


def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_ranks(_rank, (port, tmp_path))
    assert run.last_checkpoint(tmp_path) == tmp_path / f"checkpoint-{STOPPED_AT}"


def test_a_second_ctrl_c_stops_at_once(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = words(models, tmp_path / "run")
    code, printed = interrupted(monkeypatch, given, signal.SIGINT, signal.SIGINT)
    assert (code, "Stopped at once. This continues the run: kldiv train distill " in printed) == (130, True), printed
    assert run.last_checkpoint(tmp_path / "run") is None
    assert kldiv([*given, "--resume"], monkeypatch)[0] == 0


def test_before_a_run_began_there_is_nothing_to_continue(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("transformers.AutoTokenizer.from_pretrained", stop)
        code, printed = kldiv(words(models, tmp_path / "run"), patch)
    assert (code, "continues" in printed) == (130, False), printed


def test_a_stopped_cache_says_how_it_goes_on(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [
        "cache-teacher", "--teacher", str(models / "teacher"), "--data", str(models / "text.txt"), "--k", "4",
        "--block-size", "16", "--batch-size", "2", "--shard-rows", "60", "--output", str(tmp_path / "cache"),
    ]  # fmt: skip
    show = progress.Lines.show

    def stop(self: progress.Lines, done: int, tokens: int, note: str = "") -> None:
        show(self, done, tokens, note)
        if done == 20:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(progress.Lines, "show", stop)
        code, printed = kldiv(given, patch)
    assert (code, f"{shlex.join(['kldiv', *given, '--resume'])}" in printed) == (130, True), printed
    code, printed = kldiv([*given, "--resume"], monkeypatch)
    assert code == 0, printed


def test_a_log_file_gets_lines_and_no_bar(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    code, printed = kldiv(words(models, tmp_path / "run"), monkeypatch)
    assert code == 0, printed
    for step in range(2, STEPS + 1):
        assert f"step {step}/{STEPS}, loss " in printed
    assert " tokens/s, 0:00:" in printed
    for noise in ("Loading weights", "Writing model", "Tokenising", "it/s", "━"):
        assert noise not in printed


def test_a_line_stands_for_ten_seconds_of_means(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, printed = [100.0], io.StringIO()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    lines = progress.Lines(Console(file=printed), "step", 120, 20, 1000)
    for step in range(21, 61):
        clock[0] += 0.5
        lines.show(step, 1000 + 500 * (step - 20), "loss 2.5000")
    assert printed.getvalue().splitlines() == [
        "step 40/120, loss 2.5000, 1,000 tokens/s, 0:00:40 left",
        "step 60/120, loss 2.5000, 1,000 tokens/s, 0:00:30 left",
    ]


def test_only_weights_that_are_really_missing_are_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    trainer = tiny.trainer(tmp_path)
    state = trainer.model.state_dict()
    del state["lm_head.weight"]
    trainer._issue_warnings_after_load(trainer.model.load_state_dict(state, strict=False))
    assert not caplog.records
    del state["model.norm.weight"]
    trainer._issue_warnings_after_load(trainer.model.load_state_dict(state, strict=False))
    assert "missing keys in the checkpoint model loaded: ['model.norm.weight']" in caplog.text
    caplog.clear()
    with quiet():
        logging.getLogger("transformers.trainer_utils").warning("The tokenizer has new PAD/BOS/EOS tokens that differ")
        logging.getLogger("transformers.trainer_utils").warning("something else")
    assert {record.getMessage() for record in caplog.records} == {"something else"}


def test_weights_that_a_model_folder_lacks_are_told_of(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kldiv_kernels.trainer.options import load_model

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    student = tiny.llama(1)
    state = {
        name: value for name, value in student.state_dict().items() if "norm" not in name and name != "lm_head.weight"
    }
    student.save_pretrained(tmp_path, state_dict=state)
    load_model(str(tmp_path), "--student")
    assert "MISSING" in caplog.text
    assert "model.norm.weight" in caplog.text


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RepositoryNotFoundError("404", response=mock.Mock(headers={})),
            "runs/teacher is no folder, and the hub shows no such model (a private one needs hf auth login); "
            "runs is a folder here, without teacher",
        ),
        (OSError("no network"), "runs/teacher is no folder, and the hub cannot be asked for it: no network; runs is"),
        (None, "runs/teacher is no folder, it is not in the hub's cache, and HF_HUB_OFFLINE forbids to ask the hub"),
    ],
    ids=["not found", "no network", "offline"],
)
@pytest.mark.parametrize("option", ["--student", "--teacher"])
def test_a_model_that_is_nowhere_costs_one_question_to_the_hub(
    option: str, error: Exception | None, message: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    asked = []

    def model_info(self: HfApi, source: str, *, timeout: float) -> None:
        asked.append((source, timeout))
        raise error

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", error is None)
    monkeypatch.setattr(HfApi, "model_info", model_info)
    code, printed = kldiv([*words(models, tmp_path / "run"), option, "runs/teacher"], monkeypatch)
    assert (code, f"for {option}: {message}" in printed) == (2, True), printed
    assert asked == ([] if error is None else [("runs/teacher", 5.0)])


def test_a_model_that_the_hub_has_or_had_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kldiv_kernels.trainer.options import require_model

    require_model(None, "--teacher")
    require_model(str(tmp_path), "--teacher")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda source, file: str(tmp_path / file))
    require_model("org/cached", "--teacher")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda source, file: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", lambda self, source, timeout: None)
    require_model("org/there", "--teacher")


def test_a_name_that_is_no_hub_id_is_told_without_a_question(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, printed = kldiv([*words(models, tmp_path / "run"), "--teacher", "my model"], monkeypatch)
    assert (code, "for --teacher: my model is no folder, and no hub id (expected org/name)" in printed) == (2, True), (
        printed
    )
