"""Tiny models and data for TRL's trainers, and the comparison of two runs."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, set_seed

TRAINING = {
    "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
    "logging_steps": 1, "logging_nan_inf_filter": False, "learning_rate": 0.1, "max_grad_norm": 0.0, "optim": "sgd",
    "lr_scheduler_type": "constant", "max_steps": 2, "gradient_checkpointing": False,
}  # fmt: skip
WITHOUT_MEANING = ("runtime", "per_second", "step_time", "flos")
ROWS = Dataset.from_list([{"prompt": f"w{i} w{i + 3} w{2 * i}"} for i in range(8)])


def make_models(folder: Path) -> Any:
    """Folders of a student, a teacher and a mixture of experts, and their tokenizer."""
    tiny.llama(1).save_pretrained(folder / "student")
    tiny.llama(2, hidden=24).save_pretrained(folder / "teacher")
    torch.manual_seed(3)
    MixtralForCausalLM(
        MixtralConfig(
            vocab_size=tiny.VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=3, max_position_embeddings=64, initializer_range=0.5,
            bos_token_id=0, eos_token_id=0, router_aux_loss_coef=0.5, output_router_logits=True,
        )
    ).save_pretrained(folder / "experts")  # fmt: skip
    tokenizer = tiny.word_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w1 {% endif %}"
    )
    return SimpleNamespace(
        student=str(folder / "student"), teacher=str(folder / "teacher"), experts=str(folder / "experts"),
        tokenizer=tokenizer,
    )  # fmt: skip


def weights(trainer: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def train(trainer: Any) -> None:
    # What is sampled must not depend on what was made before.
    set_seed(11)
    trainer.train()


def assert_same_runs(theirs: Any, ours: Any, evaluates: bool = False) -> list[dict[str, Any]]:
    """Trains both: every logged number and the weights are those of the other, and the weights have moved."""
    for trainer in (theirs, ours):
        trainer.start = weights(trainer)
        train(trainer)
        if evaluates:
            trainer.evaluate()
    logs: list[dict[str, Any]] = theirs.state.log_history
    assert len(logs) == len(ours.state.log_history)
    for expected, found in zip(logs, ours.state.log_history, strict=True):
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            if value is None or not any(part in name for part in WITHOUT_MEANING):
                assert found[name] == (None if value is None else pytest.approx(value, rel=1e-4, abs=1e-5)), name
    assert_same_weights(theirs, ours)
    return logs


def assert_same_weights(theirs: Any, ours: Any) -> None:
    moved = (weights(theirs) - theirs.start).abs().max()
    assert moved > 1e-3
    assert (weights(ours) - weights(theirs)).abs().max() < 1e-3 * moved


def assert_same_results(theirs: Any, ours: Any) -> None:
    assert_same_weights(theirs, ours)
    losses = [[log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in (theirs, ours)]
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-4, abs=1e-6)
