"""GRPOTrainer beside TRL's own from one seed: every logged number and the weights; and what TRL's cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

import tiny
import trl
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
from trl.trainer import grpo_trainer
from trl_runs import ROWS, TRAINING, assert_same_runs, assert_same_weights, make_models, train, weights

import kldiv_kernels as kk
from kldiv_kernels.adapters.trl import GRPOTrainer
from kldiv_kernels.adapters.trl.grpo_options import policy_arguments

# Off-policy from the second step on, in steps of two micro-batches.
OFF_POLICY = {"num_iterations": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 2, "max_steps": 3}
GENERATING = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "num_generations": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_models(tmp_path_factory.mktemp("models"))


def _reward(completions: list[str], **columns: Any) -> list[float]:
    return [len(set(text.split())) + 0.1 * (len(text) % 7) for text in completions]


def _grpo(
    trainer: Any, models: Any, folder: Path, *, config: Any = trl.GRPOConfig, model: str = "student", **options: Any
) -> Any:
    given = {"policy_loss_options": options.pop("policy_loss_options")} if "policy_loss_options" in options else {}
    args = config(output_dir=str(folder), max_completion_length=6, **{**TRAINING, **GENERATING, **options})
    return trainer(
        getattr(models, model), _reward, args=args, train_dataset=ROWS, eval_dataset=ROWS,
        processing_class=models.tokenizer, **given,
    )  # fmt: skip


CASES: dict[str, dict[str, Any]] = {
    loss_type: {"loss_type": loss_type, "beta": 0.1, "epsilon": 0.05, "epsilon_high": 0.1, **OFF_POLICY}
    for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
}
CASES["grpo"] |= {"delta": 1.2, "entropy_coef": 0.05}
CASES["dapo"] |= {"use_bias_correction_kl": False, "temperature": 0.7, "entropy_coef": 0.05, "delta": 1.05}
CASES["cispo"] |= {"epsilon_high": 1.02}
CASES["sapo"] |= {"sapo_temperature_pos": 2.0, "sapo_temperature_neg": 1.3, "entropy_coef": 0.02}
CASES["vespo"] |= {"vespo_k_pos": 1.5, "vespo_lambda_pos": 2.0, "vespo_k_neg": 2.5, "vespo_lambda_neg": 1.7}
CASES["luspo"] |= {"importance_sampling_level": "sequence"}
CASES |= {
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.01, **OFF_POLICY},
    "on-policy": {"loss_type": "dapo", "epsilon": 0.1, "gradient_accumulation_steps": 2},
    "truncated": {"mask_truncated_completions": True, "off_policy_mask_threshold": 0.05, **OFF_POLICY},
    "quantile": {"loss_type": "bnpo", "top_entropy_quantile": 0.6, "entropy_coef": 0.1, **OFF_POLICY},
    "adaptive up": {"entropy_target": 5.0, "top_entropy_quantile": 0.8},
    "adaptive down": {"entropy_target": 0.1},
    "experts": {"model": "experts", "gradient_accumulation_steps": 2, "loss_type": "grpo"},
}  # fmt: skip
for name in ("adaptive up", "adaptive down"):
    # The coefficient moves by more than its bounds allow.
    CASES[name] |= {
        "loss_type": "grpo", "use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_coef_delta": 0.04,
        "entropy_coef_min": 0.08, "entropy_coef_max": 0.12, **OFF_POLICY,
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_grpo(case: str, models: Any, tmp_path: Path) -> None:
    theirs, ours = (
        _grpo(trainer, models, tmp_path, **CASES[case]) for trainer in (grpo_trainer.GRPOTrainer, GRPOTrainer)
    )
    logs = assert_same_runs(theirs, ours, evaluates=case in ("dapo", "gspo"))
    # The cases are about something only if it happens.
    if case in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "gspo"):
        assert any(log.get("clip_ratio/region_mean", 0) > 0 for log in logs)
    if case == "cispo":
        assert any(log.get("cispo_clip_ratio", 0) > 0 for log in logs)
    if case.startswith("adaptive"):
        assert {log.get("entropy_coef") for log in logs} == {None, 0.12 if "up" in case else 0.08}
        assert ours._last_world_entropy == pytest.approx(theirs._last_world_entropy, rel=1e-5)
    if case == "experts":
        assert logs[0]["aux_loss"] > 0


class Engine:
    """Stands in for vLLM: samples that are the same for both trainers, with log-probabilities somewhat off."""

    def __init__(self, **settings: Any) -> None:
        self.model, self.generator = settings["model"], torch.Generator().manual_seed(7)

    def sync_weights(self) -> None:
        pass

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], **options: Any) -> tuple[Any, ...]:
        completions, logprobs = [], []
        for row, prompt in enumerate(prompts):
            ids = torch.randint(1, tiny.VOCAB, (2 + row % 5,), generator=self.generator)
            logits = self.model(torch.tensor([[*prompt, *ids.tolist()]])).logits[0, len(prompt) - 1 : -1]
            logprob = kk.selective_log_softmax(logits, ids) + 0.4 * torch.randn(len(ids), generator=self.generator)
            completions.append(ids.tolist())
            logprobs.append([[x] for x in logprob.tolist()])
        # vLLM could not score this one.
        logprobs[0][1] = [None]
        return prompts, completions, logprobs, None


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("token_truncate", {}),
        ("token_mask", {"vllm_importance_sampling_clip_min": 0.2, "loss_type": "vespo"}),
        ("sequence_truncate", {"vllm_importance_sampling_clip_min": 0.8, "importance_sampling_level": "sequence"}),
        ("sequence_mask", {"loss_type": "cispo", "epsilon_high": 5.0}),
        ("no correction", {"vllm_importance_sampling_correction": False, "off_policy_mask_threshold": 0.1}),
    ],
)
def test_grpo_with_samples_of_another_engine(
    mode: str, options: dict[str, Any], models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", Engine)
    if mode != "no correction":
        options = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1.3, **options}
    options = {"use_vllm": True, "vllm_mode": "colocate", "gradient_accumulation_steps": 2, **options}
    theirs, ours = (_grpo(trainer, models, tmp_path, **options) for trainer in (grpo_trainer.GRPOTrainer, GRPOTrainer))
    assert_same_runs(theirs, ours)


def test_a_loss_type_of_policy_loss(models: Any, tmp_path: Path) -> None:
    """GMPO, which TRL has as a trainer of its own."""
    theirs = _grpo(GMPOTrainer, models, tmp_path, config=GMPOConfig, **OFF_POLICY)
    ours = _grpo(GRPOTrainer, models, tmp_path, policy_loss_options={"loss_type": "gmpo"}, **OFF_POLICY)
    theirs.start = weights(theirs)
    for trainer in (theirs, ours):
        train(trainer)
    assert_same_weights(theirs, ours)


def _inputs(trainer: Any, tools: bool = False) -> dict[str, Any]:
    """A micro-batch as TRL would make it."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, tiny.VOCAB, (4, 9), generator=generator)
    prompt_mask, completion_mask = torch.ones(4, 3, dtype=torch.int64), torch.ones(4, 6, dtype=torch.int64)
    prompt_mask[0, :2], completion_mask[1, 4:] = 0, 0
    inputs = {
        "prompt_ids": ids[:, :3], "prompt_mask": prompt_mask, "completion_ids": ids[:, 3:],
        "completion_mask": completion_mask, "advantages": torch.tensor([1.0, -0.5, 0.3, -1.2]),
        "num_items_in_batch": torch.tensor(22),
    }  # fmt: skip
    scores = (torch.cat([prompt_mask, completion_mask], 1), 6)
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, *scores)
    inputs["old_per_token_logps"] = logps + 0.3 * torch.randn(logps.shape, generator=generator)
    if trainer.ref_model is not None:
        inputs["ref_per_token_logps"] = logps + 0.3 * torch.randn(logps.shape, generator=generator)
    if tools:
        inputs["tool_mask"] = (torch.rand(4, 6, generator=generator) > 0.3).long()
    return inputs


def _loss_and_gradient(trainer: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    trainer.current_gradient_accumulation_steps = 2
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize(("level", "per_token"), [("token", False), ("token", True), ("sequence", False)])
def test_tool_masks_and_advantages_per_token(level: str, per_token: bool, models: Any, tmp_path: Path) -> None:
    results = []
    options = {"beta": 0.2, "loss_type": "grpo", "epsilon": 0.02, "importance_sampling_level": level}
    for trainer_class in (grpo_trainer.GRPOTrainer, GRPOTrainer):
        trainer = _grpo(trainer_class, models, tmp_path, **options)
        inputs = _inputs(trainer, tools=True)
        if per_token:
            inputs["advantages"] = inputs["advantages"][:, None] * torch.linspace(-1, 1, 6)
        results.append((*_loss_and_gradient(trainer, inputs), dict(trainer._metrics["train"])))
    (expected, gradient, metrics), (loss, ours, our_metrics) = results
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert gradient.abs().max() > 1e-3
    assert torch.allclose(ours, gradient, rtol=0, atol=1e-5 * gradient.abs().max())
    assert 0 < metrics["clip_ratio/region_mean"][0] < 1
    assert {name: pytest.approx(values, abs=1e-6) for name, values in metrics.items()} == our_metrics


def test_an_exact_kl_is_that_of_the_reference_model(models: Any, tmp_path: Path) -> None:
    options = {"kl_estimator": "reverse_kl", "loss_type": "dppo_tv", "clip_low": 0.1}
    trainer = _grpo(GRPOTrainer, models, tmp_path, beta=0.7, temperature=0.8, policy_loss_options=options)
    trainer.ref_model = tiny.llama(4)
    inputs = _inputs(trainer)
    loss, gradient = _loss_and_gradient(trainer, inputs)
    batch = {
        "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
    }
    trainer.model.zero_grad()
    expected = kk.policy_loss(
        trainer.model(**batch).logits[:, 2:-1], inputs["completion_ids"], inputs["advantages"], loss_type="dppo_tv",
        preset="trl", clip_low=0.1, kl_estimator="reverse_kl", kl_coef=0.7, temperature=0.8, normalizer=22.0 * 2 / 1,
        reference_logits=trainer.ref_model(**batch).logits[:, 2:-1].detach(), mask=inputs["completion_mask"],
        old_logprobs=inputs["old_per_token_logps"],
    )  # fmt: skip
    expected.loss.backward()
    own = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert torch.allclose(gradient, own, rtol=0, atol=1e-5 * own.abs().max())
    assert trainer._metrics["train"]["kl"] == pytest.approx([expected.metrics["exact_kl"].item()], rel=1e-5)
    assert expected.metrics["exact_kl"] > 0.1


@pytest.mark.parametrize("loss_type", ["topr", "dppo_kl"])
def test_a_loss_that_needs_the_old_policy_runs_on_policy(loss_type: str, models: Any, tmp_path: Path) -> None:
    trainer = _grpo(GRPOTrainer, models, tmp_path, policy_loss_options={"loss_type": loss_type})
    inputs = _inputs(trainer)
    del inputs["old_per_token_logps"]
    _, gradient = _loss_and_gradient(trainer, inputs)
    trainer._policy_arguments["loss_type"] = "reinforce"
    _, expected = _loss_and_gradient(trainer, inputs)
    assert expected.abs().max() > 1e-3
    assert torch.allclose(gradient, expected, rtol=0, atol=1e-6 * expected.abs().max())


def test_the_head_in_float32_stays_so_under_autocast(models: Any, tmp_path: Path) -> None:
    results = []
    for trainer_class in (grpo_trainer.GRPOTrainer, GRPOTrainer):
        trainer = _grpo(trainer_class, models, tmp_path, bf16=True, cast_lm_head_to_fp32=True)
        inputs = _inputs(trainer)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 6)
        results.append(logps * inputs["completion_mask"])
    assert torch.allclose(results[0], results[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kl_coef": 0.1}, r"policy_loss_options has 'kl_coef'; use GRPOConfig\(beta=\)"),
        ({"normalizer": 3}, "policy_loss_options has 'normalizer', which the trainer sets; expected any of loss_type"),
        ({"clip": 3}, "policy_loss_options has 'clip', which policy_loss does not know"),
        ({"loss_type": "ppo"}, "loss_type is 'ppo'; expected grpo"),
        ({"loss_type": "gspo", "importance_level": "token"}, "importance_level is 'token'; expected sequence"),
        ({"kl_estimator": "js", "kl_clamp": 3.0}, "kl_clamp is given"),
    ],
)
def test_options_that_do_not_go(given: dict[str, Any], message: str, models: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"GRPOTrainer: {message}"):
        policy_arguments(trl.GRPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True), given)
    if "clip" in given:
        with pytest.raises(ValueError, match=f"GRPOTrainer: {message}"):
            _grpo(GRPOTrainer, models, tmp_path, policy_loss_options=given)
