"""The plugins of docs/adapters/axolotl.md, on a Trainer: the same weights as with `compute_loss_func`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch
from commands import stay_offline
from transformers import Trainer, TrainingArguments, default_data_collator

from kldiv_kernels.adapters.transformers import cross_entropy_loss, distillation_loss

PAGE = Path(__file__).parents[2] / "docs" / "adapters" / "axolotl.md"


def _plugins(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {})  # type: ignore[attr-defined]
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    (text,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    names: dict[str, Any] = {"__name__": "my_losses"}
    exec(compile(text, str(PAGE), "exec"), names)
    return names


def _trainer(folder: Path, loss: Any = None, student: Any = None) -> Trainer:
    student = tiny.llama(1) if student is None else student
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, seed=3,
    )  # fmt: skip
    return Trainer(
        student, arguments, train_dataset=tiny.ragged(8), data_collator=default_data_collator, compute_loss_func=loss
    )  # type: ignore[arg-type]


def _weights(trainer: Trainer) -> torch.Tensor:
    trainer.train()
    assert trainer.model is not None
    return torch.cat([x.detach().flatten() for x in trainer.model.parameters()])


@pytest.mark.parametrize("name", ["EntropyBonus", "Distillation"])
def test_the_plugins_of_the_page(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stay_offline(monkeypatch)
    monkeypatch.chdir(tmp_path)
    tiny.llama(2, hidden=24).save_pretrained(tmp_path / "models/teacher")
    trainer = _trainer(tmp_path)
    _plugins(monkeypatch)[name]().post_trainer_create({}, trainer)
    got = _weights(trainer)
    student = tiny.llama(1)
    losses = {
        "EntropyBonus": lambda: cross_entropy_loss(entropy_coef=0.01),
        "Distillation": lambda: distillation_loss(student, tiny.llama(2, hidden=24), "js", beta=0.9, ce_weight=0.1),
    }
    assert torch.equal(got, _weights(_trainer(tmp_path, losses[name](), student)))
    # And not those of the loss that the Trainer has by itself.
    assert not torch.allclose(got, _weights(_trainer(tmp_path)))
