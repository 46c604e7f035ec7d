"""TRL's other trainers for two steps from one seed, with and without this library: the same losses and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

import tiny
import trl
from datasets import Dataset
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl_runs import ROWS, TRAINING, assert_same_results, assert_same_runs, make_models, train, weights

import kldiv_kernels as kk
from kldiv_kernels.adapters.trl import DistillationTrainer, patched_trl


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_models(tmp_path_factory.mktemp("models"))


def _distillation(trainer: Any, models: Any, folder: Path, options: dict[str, Any], **config: Any) -> Any:
    args = trl.DistillationConfig(
        output_dir=str(folder), max_completion_length=6, gradient_accumulation_steps=2, per_device_train_batch_size=2,
        per_device_eval_batch_size=2, **{**TRAINING, **config},
    )  # fmt: skip
    return trainer(
        models.student, models.teacher, args, ROWS, ROWS.select(range(2)), processing_class=models.tokenizer, **options
    )


@pytest.mark.parametrize(("beta", "from_hidden"), [(0.0, True), (0.4, True), (0.4, False), (1.0, True)])
def test_distillation(beta: float, from_hidden: bool, models: Any, tmp_path: Path) -> None:
    config = {"beta": beta, "temperature": 0.8}
    theirs = _distillation(trl.DistillationTrainer, models, tmp_path, {}, **config)
    ours = _distillation(DistillationTrainer, models, tmp_path, {}, **config)
    assert ours._from_hidden
    ours._from_hidden = from_hidden
    assert_same_runs(theirs, ours, evaluates=True)


def _sft(models: Any, folder: Path) -> Any:
    args = trl.SFTConfig(output_dir=str(folder), per_device_train_batch_size=2, max_length=32, **TRAINING)
    return trl.SFTTrainer(models.student, args, train_dataset=_messages(8), processing_class=models.tokenizer)


@pytest.mark.parametrize("kind", ["distillation", "sft"])
def test_trainers_with_trls_fused_head(kind: str, models: Any, tmp_path: Path) -> None:
    def make() -> Any:
        if kind == "sft":
            return _sft(models, tmp_path)
        return _distillation(trl.DistillationTrainer, models, tmp_path, {}, beta=0.4, temperature=0.8)

    theirs, ours = make(), make()
    unpatched = ours.train

    def train_patched() -> None:
        with patched_trl():
            unpatched()

    # Patched after it was made.
    ours.train = train_patched
    logs = assert_same_runs(theirs, ours)
    assert "entropy" in logs[0]


def test_distillation_with_another_divergence(models: Any, tmp_path: Path) -> None:
    options = {"kind": "alpha", "alpha": 0.3, "temperature_squared": True, "vocab_size": 60, "backend": "reference"}
    trainer = _distillation(DistillationTrainer, models, tmp_path, options, temperature=0.8)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, tiny.VOCAB, (2, 9), generator=generator)
    mask, tools = torch.ones(2, 9, dtype=torch.int64), torch.ones(2, 6, dtype=torch.int64)
    mask[0, 7:], tools[1, 2] = 0, 0
    inputs = {"prompt_ids": ids[:, :3], "prompt_mask": mask[:, :3], "completion_ids": ids[:, 3:],
              "completion_mask": mask[:, 3:], "tool_mask": tools}  # fmt: skip
    student, teacher = (
        model(input_ids=ids, attention_mask=mask).logits[:, 2:-1] for model in (trainer.model, trainer.teacher_model)
    )
    kept = mask[:, 3:] * tools
    expected = kk.alpha_divergence(student, teacher, alpha=0.3, mask=kept, temperature=0.8, vocab_size=60) * 0.64
    loss, entropy_sum, count = trainer._compute_loss(trainer.model, inputs, None)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() > 0.01
    assert count == 9
    entropies = kk.entropy(student, temperature=0.8, vocab_size=60, mask=kept)
    assert entropy_sum.item() == pytest.approx(entropies.sum().item(), rel=1e-5)
    with pytest.raises(ValueError, match=r"beta is 3.0; expected between 0 and 1"):
        _distillation(DistillationTrainer, models, tmp_path, {"beta": 3.0})
    # DistillationConfig's beta is TRL's default, not given for this kind.
    _distillation(DistillationTrainer, models, tmp_path, {"kind": "forward_kl"})
    with pytest.raises(ValueError, match=r"beta is 0.3, which kind 'forward_kl' has no use for"):
        _distillation(DistillationTrainer, models, tmp_path, {"kind": "forward_kl", "beta": 0.3})


def _messages(count: int) -> Dataset:
    def turn(role: str, seed: int) -> dict[str, str]:
        return {"role": role, "content": tiny.words(3 + seed % 3, seed)}

    return Dataset.from_list([{"messages": [turn("user", i), turn("assistant", i + 50)]} for i in range(count)])


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_gkd(beta: float, models: Any, tmp_path: Path) -> None:
    def make() -> Any:
        args = GKDConfig(
            output_dir=str(tmp_path), beta=beta, lmbda=0.5, max_new_tokens=4, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, max_length=32, **TRAINING,
        )  # fmt: skip
        return GKDTrainer(
            models.student, models.teacher, args, train_dataset=_messages(8), processing_class=models.tokenizer
        )

    theirs = make()
    theirs.start = weights(theirs)
    train(theirs)
    with patched_trl():
        ours = make()
        train(ours)
    assert_same_results(theirs, ours)


@pytest.mark.parametrize(
    "options",
    [
        {"distillation_mode": "full_logits", "distillation_alpha": 0.5, "num_iterations": 2},
        {"distillation_mode": "topk_logits", "distillation_topk": 5, "distillation_add_tail": True},
        {"distillation_mode": "sampled_token", "distillation_alpha": 1.0},
    ],
)
def test_sdft(options: dict[str, Any], models: Any, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": f"w{i} w{i + 3}", "privileged_context": f"w{i + 9}"} for i in range(8)])

    def make() -> Any:
        args = SDFTConfig(
            output_dir=str(tmp_path), max_completion_length=6, per_device_train_batch_size=2, num_generations=2,
            **{**TRAINING, **options},
        )  # fmt: skip
        return SDFTTrainer(models.student, args, rows, processing_class=models.tokenizer)

    theirs = make()
    theirs.start = weights(theirs)
    train(theirs)
    with patched_trl():
        ours = make()
        train(ours)
    assert_same_results(theirs, ours)
