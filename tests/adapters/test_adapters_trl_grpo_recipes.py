"""Recipes inside TRL's GRPO: what each call of policy_loss gets, that kdrl learns, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import commands
import pytest
import tiny
import torch

pytest.importorskip("trl")

import trl_runs
from transformers import AutoModelForCausalLM
from trl.trainer.grpo_config import GRPOConfig

import kldiv_kernels as kk
from kldiv_kernels import cli
from kldiv_kernels.adapters.trl import GRPOTrainer, grpo, recipe_of


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trl_runs.make_models(tmp_path_factory.mktemp("models"))


def trainer(models: Any, folder: Path, recipe: Any, other: Any = None, **config: Any) -> Any:
    options = {
        **trl_runs.TRAINING, "num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 5,
        "beta": 0.0, **config,
    }  # fmt: skip
    return GRPOTrainer(
        model=models.student, reward_funcs=lambda completions, **_: [float(len(c) % 3) for c in completions],
        args=GRPOConfig(output_dir=str(folder), **options), train_dataset=trl_runs.ROWS,
        processing_class=models.tokenizer, recipe=recipe, recipe_model=other,
    )  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []

    def noted(logits: Any, ids: Any, advantages: Any, **options: Any) -> Any:
        seen.append({"logits": logits.detach(), "ids": ids, **options})
        return kk.policy_loss(logits, ids, advantages, **options)

    monkeypatch.setattr(grpo, "policy_loss", noted)
    return seen


def of_completions(model: Any, prompt: Any, call: dict[str, Any]) -> Any:
    """The logits that another model has of the completions of one call, by its own forward pass."""
    sequences = torch.cat([prompt["prompt_ids"], call["ids"]], dim=1)
    mask = torch.cat([prompt["prompt_mask"], prompt["completion_mask"]], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = model(input_ids=sequences, attention_mask=mask, position_ids=positions).logits
    return logits[:, prompt["prompt_ids"].shape[1] - 1 : -1]


@pytest.mark.parametrize("name", ["dgpo", "kdrl"])
def test_a_second_model_reads_the_completions(
    name: str, models: Any, tmp_path: Path, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = AutoModelForCausalLM.from_pretrained(models.teacher if name == "kdrl" else models.student)
    if name == "dgpo":
        # A reference that is not the policy: else all weights are 1.
        other = tiny.llama(7)
    options = {"dgpo": {"credit_temperature": 0.05}, "kdrl": {"kd_coef": 0.3}}[name]
    made = trainer(models, tmp_path, recipe_of(name, options), other)
    prompts: list[Any] = []
    loss = GRPOTrainer._compute_loss
    monkeypatch.setattr(
        GRPOTrainer, "_compute_loss", lambda self, model, inputs: (prompts.append(inputs), loss(self, model, inputs))[1]
    )
    trl_runs.train(made)
    assert len(calls) == 2
    assert all(not p.requires_grad for p in other.parameters())
    for call, prompt in zip(calls, prompts, strict=True):
        mask = call["mask"] != 0
        theirs = of_completions(other, prompt, call)
        if name == "dgpo":
            weights = kk.recipes.dgpo_weights(call["logits"], theirs, mask, credit_temperature=0.05)
            torch.testing.assert_close(call["token_weights"][mask], weights[mask], rtol=1e-3, atol=1e-4)
            assert (weights[mask] - 1).abs().max() > 0.05
        else:
            expected = theirs.log_softmax(-1).gather(-1, call["ids"][..., None])[..., 0]
            torch.testing.assert_close(call["reference_logprobs"][mask], expected[mask], rtol=1e-4, atol=1e-4)
            assert (call["kl_coef"], call["kl_estimator"], call["kl_bias_correction"]) == (0.3, "k2", False)


def test_options_of_the_covariance_methods(models: Any, tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    for name, options, wanted in (
        ("kl_cov", {"percent": 25, "kl_coef": 0.5}, {"cov_selection": "kl", "cov_fraction": 0.25, "cov_kl_coef": 0.5,
                                                     "clip_low": 1.0, "clip_high": math.inf}),
        ("clip_cov", {"fraction": 0.1}, {"cov_selection": "clip", "cov_fraction": 0.1, "cov_bounds": (1.0, 5.0)}),
    ):  # fmt: skip
        trl_runs.train(trainer(models, tmp_path / name, recipe_of(name, options)))
        assert {key: calls[-1][key] for key in wanted} == wanted


def test_kdrl_goes_to_the_teacher(models: Any, tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(models.teacher)
    made = trainer(
        models, tmp_path, recipe_of("kdrl", {"kd_coef": 5.0}), teacher, max_steps=40, optim="adamw_torch",
        learning_rate=6e-2, per_device_train_batch_size=32,
    )  # fmt: skip
    trl_runs.train(made)
    apart = []
    for call in calls:
        mask = call["mask"] != 0
        logprob = kk.selective_log_softmax(call["logits"], call["ids"])
        apart.append((logprob - call["reference_logprobs"])[mask].square().mean().item())
    assert sum(apart[-5:]) < 0.6 * sum(apart[:5])


def test_what_does_not_go_together(models: Any, tmp_path: Path) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(models.teacher)
    for recipe, other, config, message in (
        (recipe_of("kdrl", {}), None, {}, "recipe_model is None; expected the teacher of kdrl"),
        (recipe_of("kl_cov", {}), teacher, {}, "recipe_model is given; expected None"),
        (None, teacher, {}, "recipe_model is given; expected None"),
        (recipe_of("kdrl", {}), teacher, {"beta": 0.1}, "beta is 0.1; expected 0 with kdrl"),
    ):
        with pytest.raises(ValueError, match=f"GRPOTrainer: {message}"):
            trainer(models, tmp_path, recipe, other, **config)
    for name, options, message in (
        ("kl_covs", {}, "recipe: 'kl_covs'; expected clip_cov, kl_cov, dgpo, kdrl; did you mean kl_cov?"),
        ("kl_cov", {"percnt": 1}, "percnt is no option of kl_cov; did you mean percent?"),
        ("kl_cov", {"percent": 0}, "percent is 0; expected above 0 and at most 100"),
        ("kl_cov", {"percent": "a"}, "kl_cov: "),
    ):
        with pytest.raises(ValueError, match=message.replace("?", r"\?")):
            recipe_of(name, options)


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("kl_cov", ["--set", "percent=5"]),
        ("dgpo", ["--set", "credit_temperature=0.1"]),
        ("kdrl", ["--set", "kd_coef=0.1"]),
    ],
    ids=["kl_cov", "dgpo", "kdrl"],
)
def test_the_command(
    recipe: str, more: list[str], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands.stay_offline(monkeypatch)
    tmp_path = tmp_path_factory.mktemp("grpo")
    small = [
        "--steps", "2", "--warm-up-steps", "2", "--batch-size", "2", "--group-size", "3", "--log-every", "1",
        "--eval-every", "2",
    ]  # fmt: skip
    teacher: list[str] = []
    if recipe == "kdrl":
        code, printed = commands.invoke(cli.app, "train", "grpo", *small, "--output", str(tmp_path / "first"))
        assert code == 0, printed
        teacher = ["--teacher", str(tmp_path / "first")]
    given = ["train", "grpo", *small, "--recipe", recipe, *more, *teacher, "--output", str(tmp_path / "run")]
    code, printed = commands.invoke(cli.app, *given)
    assert code == 0, printed
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["recipe"]["name"] == recipe
    for wrong, option, message in (
        (["--recipe", "kl_cov", "--clip-low", "0.1"], "--clip-low", "not with --recipe kl_cov, which sets it"),
        (["--recipe", "kl_cov", "--teacher", str(tmp_path)], "--teacher", "only with --recipe kdrl"),
        (["--recipe", "kdrl"], "--teacher", "missing; kdrl distils it"),
        (["--recipe", "kl_cov", "--loss-type", "gspo"], "--recipe", "kl_cov with --loss-type gspo: cov_"),
        (["--set", "percent=1"], "--set", "given without --recipe"),
        (["--recipe", "dpgo"], "--recipe", "did you mean dgpo?"),
    ):
        code, printed = commands.invoke(cli.app, "train", "grpo", *wrong, "--output", str(tmp_path / "other"))
        assert (code, option in printed, message in printed) == (2, True, True), printed
        assert not (tmp_path / "other").exists()
