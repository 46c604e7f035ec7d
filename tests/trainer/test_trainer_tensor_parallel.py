"""Models that are tensor parallel over two ranks give the losses, gradients' norms and evaluation of one process.

Of five held-out sequences in batches of three, each counts once: ranks of a tensor parallel group have the same ones.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import ParallelismConfig
from datasets import Dataset
from processes import start_ranks
from torch import distributed
from transformers import LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator
from transformers.distributed.configuration_utils import DistributedConfig

from kldiv_kernels.adapters import transformers as losses
from kldiv_kernels.trainer.opd import OnPolicyArguments, OnPolicyTrainer

SEQUENCES, STEPS, RANKS = 8, 2, 2
_OF_TRL = ["kldiv_kernels.adapters.trl"] if find_spec("trl") else []
TRAINING: dict[str, Any] = {
    "max_steps": STEPS, "logging_steps": 1, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant",
    "max_grad_norm": 0.5, "per_device_eval_batch_size": 3,
}  # fmt: skip
# Whole rows on each rank; each rank's columns; and a model that each rank has whole.
GATHERED, COLUMNS, WHOLE = "colwise_gather_output", "colwise", ""


@dataclass(frozen=True)
class Case:
    """A loss, and the plans of the heads. The widths of the vocabularies: see `_model`."""

    options: dict[str, Any]
    student: str = COLUMNS
    teacher: str = COLUMNS
    widths: tuple[int, int] = (tiny.VOCAB, tiny.VOCAB)
    tied: bool = False
    trainer: str = "ours"
    accumulation: int = 1
    more: dict[str, Any] = field(default_factory=dict)


CASES = {
    # 65 columns are 33 and 32, and the teacher's 72 fall on other places.
    "uneven columns": Case(
        {"kind": "js", "beta": 0.3, "temperature": 2.0, "ce_weight": 0.3}, widths=(65, 72), accumulation=2
    ),
    "equal columns": Case({"ce_weight": 0.4}, tied=True, more={"parallelism_config": ParallelismConfig(tp_size=RANKS)}),
    "whole rows": Case({"kind": "reverse_kl"}, student=GATHERED, tied=True),
    "k log-probs": Case({"kind": "js", "beta": 0.3, "ce_weight": 0.4}, trainer="rows"),
    "recipe": Case({"recipe": "asft_loss"}, teacher=GATHERED),
    "of any Trainer": Case({"kind": "reverse_kl", "ce_weight": 0.4}, teacher=WHOLE, trainer="theirs"),
}


def _model(folder: Path, seed: int, width: int, tied: bool, plan: str | None = None) -> LlamaForCausalLM:
    """With a head of that many columns; with a plan other than WHOLE this rank's part of it."""
    place = folder / f"{seed}-{width}-{tied}"
    if not place.exists():
        model = tiny.llama(seed, hidden=16 if seed == 1 else 24, vocab=width, tied=tied)
        model.save_pretrained(place)
    sharded = DistributedConfig(tp_size=RANKS, tp_plan={"lm_head": plan}) if plan else None
    return LlamaForCausalLM.from_pretrained(place, distributed_config=sharded)


def _run(folder: Path, case: Case, *, parallel: bool) -> dict[str, list[float]]:
    """Losses and norms of the gradients of some steps, and the evaluation after them."""
    plans = (case.student, case.teacher) if parallel else (None, None)
    student, teacher = (
        _model(folder, seed, width, case.tied, plan)
        for seed, width, plan in zip((1, 2), case.widths, plans, strict=True)
    )
    options = {**TRAINING, "per_device_train_batch_size": SEQUENCES // case.accumulation}
    options["gradient_accumulation_steps"] = case.accumulation
    options |= {"ddp_backend": "gloo", **case.more} if parallel else {}
    rows, held_out = (
        tiny.with_rows(tiny.ragged(count)) if case.trainer == "rows" else tiny.ragged(count) for count in (SEQUENCES, 5)
    )
    if case.trainer == "theirs":
        loss = losses.distillation_loss(student, teacher, **case.options)
        arguments = TrainingArguments(
            output_dir=str(folder / "run"), report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no",
            **options,
        )  # fmt: skip
        trainer: Any = Trainer(
            student, arguments, train_dataset=rows, data_collator=default_data_collator, compute_loss_func=loss
        )
    else:
        trainer = tiny.trainer(
            folder / "run", student=student, teacher=None if case.trainer == "rows" else teacher, rows=rows, **options,
            **case.options,
        )  # fmt: skip
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    found = {name: [entry[name] for entry in steps] for name in ("loss", "grad_norm")}
    if case.trainer != "theirs":
        metrics = trainer.evaluate(eval_dataset=held_out)
        found["held out"] = [
            value for name, value in metrics.items() if name in ("eval_loss", "eval_kl", "eval_topk_kl")
        ]
    # As one process would load it.
    trainer.save_model(str(folder / "saved"))
    saved = LlamaForCausalLM.from_pretrained(folder / "saved")
    found["weights"] = [parameter.double().norm().item() for parameter in saved.parameters()]
    return found


def _refused(folder: Path) -> dict[str, str]:
    """What each of the wrong ways is told."""

    def made(student: str | None, teacher: str | None, **options: Any) -> Callable[[], Any]:
        models = [_model(folder, seed, tiny.VOCAB, False, plan) for seed, plan in ((1, student), (2, teacher))]
        return lambda: tiny.trainer(folder / "run", student=models[0], teacher=models[1], ddp_backend="gloo", **options)

    def on_policy() -> Any:
        arguments = OnPolicyArguments(output_dir=str(folder / "run"), report_to="none", use_cpu=True)
        student, teacher = (_model(folder, seed, tiny.VOCAB, False, COLUMNS) for seed in (1, 2))
        return OnPolicyTrainer(student, teacher, arguments, train_dataset=tiny.ragged(2))

    def any_trainer() -> Any:
        return losses.distillation_loss(_model(folder, 1, 64, False), _model(folder, 2, 64, False, COLUMNS))

    def of_trl(kind: str, given: Any) -> Any:
        import trl

        from kldiv_kernels.adapters.trl import DistillationTrainer, GRPOTrainer

        tokenizer = tiny.word_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        arguments = getattr(trl, f"{kind}Config")(
            output_dir=str(folder / "run"), report_to="none", use_cpu=True, bf16=False, save_strategy="no"
        )
        prompts = Dataset.from_list([{"prompt": "w1 w2"}] * 2)
        made = {"Distillation": DistillationTrainer, "GRPO": GRPOTrainer}[kind]
        student = _model(folder, 1, tiny.VOCAB, False, GATHERED)
        return made(student, given, args=arguments, train_dataset=prompts, processing_class=tokenizer)

    wrong = {
        "teacher alone": made(None, COLUMNS),
        "teacher alone, of any Trainer": any_trainer,
        "tokens of one rank": made(COLUMNS, COLUMNS, average_tokens_across_devices=False),
        "context parallel": made(None, None, parallelism_config=ParallelismConfig(cp_size=RANKS)),
        "sampling": on_policy,
    }
    if _OF_TRL:
        teacher = _model(folder, 2, tiny.VOCAB, False)
        wrong["TRL's distillation"] = partial(of_trl, "Distillation", teacher)
        wrong["TRL's GRPO"] = partial(of_trl, "GRPO", lambda completions, **_: [0.0 for _ in completions])
    told = {}
    for name, make in wrong.items():
        try:
            make()
        except ValueError as error:
            told[name] = str(error)
    return told


def _rank(rank: int, port: int, folder: Path) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    # accelerate has tensor parallelism on GPUs only; what it does there it does here.
    pytest.MonkeyPatch().setattr(ParallelismConfig, "_validate_accelerator", lambda self, accelerator: None)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    found: dict[str, Any] = {name: _run(folder, case, parallel=True) for name, case in CASES.items()}
    found["refused"] = _refused(folder)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one process finds, and each of the ranks."""
    folder = tmp_path_factory.mktemp("runs")
    alone = {name: _run(folder, case, parallel=False) for name, case in CASES.items()}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Imports once for all ranks.
    multiprocessing.set_forkserver_preload(
        ["transformers.models.llama.modeling_llama", "kldiv_kernels.trainer.run", *_OF_TRL]
    )
    start_ranks(_rank, (port, folder), RANKS)
    return alone, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one_process(name: str, runs: Any) -> None:
    alone, ranks = runs
    expected = alone[name]
    assert len(set(expected["loss"])) == STEPS
    for found in ranks:
        assert found[name].keys() == expected.keys()
        for what, values in expected.items():
            assert found[name][what] == pytest.approx(values, rel=1e-5), what


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("teacher alone", "the teacher is tensor parallel over 2 ranks and the student over 1"),
        ("teacher alone, of any Trainer", "expected the same tp_size for both, or a teacher without"),
        ("tokens of one rank", "average_tokens_across_devices is False .* expected True"),
        ("context parallel", r"parallelism_config has cp_size = 2; expected 1.*use tp_size"),
        ("sampling", "OnPolicyTrainer: model is tensor parallel over 2 ranks.*load it without"),
        *(
            (f"TRL's {name}", "Trainer: model is tensor parallel over 2 ranks, and TRL samples on each rank by itself")
            for name in ("distillation", "GRPO")
            if _OF_TRL
        ),
    ],
)
def test_what_cannot_work_is_refused(name: str, expected: str, runs: Any) -> None:
    for found in runs[1]:
        assert re.search(expected, found["refused"].get(name, "")), found["refused"]
