"""policy_loss(preset="trl") against TRL's own `_compute_loss`, value and gradient with respect to the logits."""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import kldiv_kernels as kk

trainers = pytest.importorskip("trl.trainer.grpo_trainer")
GRPO_TRAINER = trainers.GRPOTrainer

LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"]
CLIPPED = LOSS_TYPES[:5]
LEVELS = ["token", "sequence"]
VARIANTS = ["plain", "bound", "kl", "kl corrected", "off-policy", "entropy", "all"]
SEQUENCES, TOKENS, VOCAB = 4, 6, 11
LONGEST, ACCUMULATION, STEPS_PER_GENERATION, PROCESSES = 9, 2, 4, 2
TOLERANCE = 1e-10
# TRL's 1.05, which it keeps in float32.
SAPO_NEGATIVE = torch.tensor(1.05).item()


@dataclass
class Case:
    """A batch, TRL's settings and inputs, and the same as arguments of policy_loss."""

    logits: Tensor
    token_ids: Tensor
    settings: dict[str, Any]
    trl_inputs: dict[str, Tensor]
    arguments: dict[str, Any]


def _case(loss_type: str, advantages_per_token: bool = False) -> Case:
    shape = (SEQUENCES, TOKENS)
    logits = 2 * torch.randn(*shape, VOCAB, dtype=torch.float64)
    token_ids = torch.randint(VOCAB, shape)
    now = logits.log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]
    mask = torch.ones(shape, dtype=torch.int64)
    mask[1, 4:], mask[2, 1:] = 0, 0
    advantages = torch.randn(*(shape if advantages_per_token else shape[:1]), dtype=torch.float64)
    old, reference = now + 0.4 * torch.randn_like(now), now + 0.5 * torch.randn_like(now)
    items = torch.tensor(71)
    normalizer = {
        **dict.fromkeys(("grpo", "sapo", "luspo", "gmpo"), SEQUENCES * ACCUMULATION),
        "bnpo": mask.sum() * ACCUMULATION,
        "dr_grpo": SEQUENCES * LONGEST * ACCUMULATION,
    }.get(loss_type, items / PROCESSES * ACCUMULATION / STEPS_PER_GENERATION)
    inputs = {
        "prompt_ids": torch.zeros(SEQUENCES, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(SEQUENCES, 1, dtype=torch.int64),
        "completion_ids": token_ids, "completion_mask": mask, "advantages": advantages,
        "old_per_token_logps": old, "ref_per_token_logps": reference, "num_items_in_batch": items,
    }  # fmt: skip
    arguments = {
        "advantages": advantages, "loss_type": loss_type, "old_logprobs": old, "mask": mask,
        "normalizer": normalizer, "clip_low": 0.2, "clip_high": 0.28,
    }  # fmt: skip
    settings = {"loss_type": loss_type, "epsilon_low": 0.2, "epsilon_high": 0.28}
    if loss_type == "cispo":
        # TRL's bound is the ratio itself, and there is no lower one.
        del arguments["clip_low"]
        settings["epsilon_high"] = arguments["clip_high"] = 1.3
    if loss_type in ("sapo", "vespo"):
        del arguments["clip_low"], arguments["clip_high"]
    if loss_type == "sapo":
        arguments["sapo_temperatures"] = (1.0, SAPO_NEGATIVE)
    return Case(logits, token_ids, settings, inputs, arguments)


def _add_kl(case: Case, corrected: bool) -> None:
    case.settings |= {"beta": 0.3, "use_bias_correction_kl": corrected}
    case.arguments |= {"reference_logprobs": case.trl_inputs["ref_per_token_logps"], "kl_coef": 0.3}
    if not corrected:
        case.arguments["kl_bias_correction"] = False


def _add_off_policy(case: Case, mode: str, low: float | None = None, high: float | None = 1.2) -> None:
    """TRL makes the weights when it generates: GRPOTrainer._generate_and_score_completions."""
    old, mask = case.trl_inputs["old_per_token_logps"], case.trl_inputs["completion_mask"]
    sampling = old + 0.2 * torch.randn_like(old)
    log_weight = (old - sampling) * mask
    if mode.startswith("sequence"):
        log_weight = log_weight.sum(-1, keepdim=True)
    weight = log_weight.exp()
    if mode.endswith("truncate"):
        weight = weight.clamp(min=low, max=high)
    else:
        weight = weight.masked_fill((weight < (low or 0)) | (weight > high), 0.0)
    assert (weight != log_weight.exp()).any()
    case.trl_inputs |= {"importance_sampling_ratio": weight, "sampling_per_token_logps": sampling}
    case.settings |= {"use_vllm": True, "vllm_importance_sampling_correction": True}
    case.arguments |= {"sampling_logprobs": sampling, "off_policy": mode, "off_policy_max": high}
    if low is not None:
        case.arguments["off_policy_min"] = low


def _add_variant(case: Case, variant: str) -> None:
    loss_type = case.arguments["loss_type"]
    if variant in ("bound", "all"):
        if loss_type in CLIPPED:
            case.settings["delta"] = case.arguments["delta"] = 1.35
        else:
            case.settings["top_entropy_quantile"] = case.arguments["entropy_quantile"] = 0.6
    if variant.startswith("kl") or variant == "all":
        _add_kl(case, corrected=variant != "kl")
    if variant in ("off-policy", "all"):
        _add_off_policy(case, "token_truncate" if loss_type == "vespo" else "sequence_mask")
    if variant in ("entropy", "all"):
        case.settings |= {"entropy_coef": 0.05, "_entropy_bonus_enabled": True}
        case.arguments["entropy_coef"] = 0.05 / ACCUMULATION


def _trl(case: Case, trainer_class: Any) -> tuple[Tensor, Tensor, dict[str, list[float]]]:
    logits = case.logits.clone().requires_grad_()
    log_q = logits.log_softmax(-1)
    logprob = log_q.gather(-1, case.token_ids[..., None])[..., 0]
    entropy = -(log_q.exp() * log_q).sum(-1)
    settings = {
        "beta": 0.0, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "aux_loss_enabled": False,
        "importance_sampling_level": "token", "use_vllm": False, "vllm_importance_sampling_correction": False,
        "_entropy_bonus_enabled": False, "use_adaptive_entropy": False, "max_completion_length": LONGEST,
        "current_gradient_accumulation_steps": ACCUMULATION,
    } | case.settings  # fmt: skip
    args = SimpleNamespace(
        delta=settings.pop("delta", None), use_bias_correction_kl=settings.pop("use_bias_correction_kl", False),
        sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0,
        vespo_lambda_neg=2.0, steps_per_generation=STEPS_PER_GENERATION,
    )  # fmt: skip
    accelerator = SimpleNamespace(
        num_processes=PROCESSES, sync_gradients=False, gather=lambda x: x, reduce=lambda x, reduction: x,
        pad_across_processes=lambda x, dim, pad_index: x, gather_for_metrics=lambda x: x,
    )  # fmt: skip
    metrics: dict[str, Any] = defaultdict(lambda: defaultdict(list))
    trainer = SimpleNamespace(
        args=args, accelerator=accelerator, model=SimpleNamespace(training=True), _metrics=metrics,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprob, entropy, None),
        get_off_policy_mask=GRPO_TRAINER.get_off_policy_mask, get_gamma_weights=GRPO_TRAINER.get_gamma_weights,
        **settings,
    )  # fmt: skip
    trainer.get_high_entropy_mask = functools.partial(GRPO_TRAINER.get_high_entropy_mask, trainer)
    loss = trainer_class._compute_loss(trainer, None, case.trl_inputs)
    return loss.detach(), torch.autograd.grad(loss, logits)[0], metrics["train"]


def _check(case: Case, trainer_class: Any = GRPO_TRAINER) -> tuple[kk.PolicyLoss, dict[str, list[float]]]:
    expected, gradient, metrics = _trl(case, trainer_class)
    logits = case.logits.clone().requires_grad_()
    out = kk.policy_loss(logits, case.token_ids, preset="trl", backend="reference", **case.arguments)
    assert out.loss.item() == pytest.approx(expected.item(), abs=TOLERANCE, rel=TOLERANCE)
    out.loss.backward()
    assert gradient.abs().max() > 1e-3
    assert torch.allclose(logits.grad, gradient, rtol=0, atol=TOLERANCE * gradient.abs().max())
    return out, metrics


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_grid(loss_type: str, level: str, variant: str) -> None:
    case = _case(loss_type)
    case.settings["importance_sampling_level"] = case.arguments["importance_level"] = level
    _add_variant(case, variant)
    _check(case)


# VESPO refuses weights of a sequence, in TRL and here.
@pytest.mark.parametrize(
    ("loss_type", "mode"),
    [
        (loss_type, mode)
        for loss_type in ("dapo", "cispo", "vespo")
        for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
        if loss_type != "vespo" or mode.startswith("token")
    ],
)
@pytest.mark.parametrize("bounded_below", [False, True])
def test_off_policy_modes(loss_type: str, bounded_below: bool, mode: str) -> None:
    case = _case(loss_type)
    low, high = (0.7, 1.25) if mode.startswith("token") else (0.6, 1.4)
    _add_off_policy(case, mode, low if bounded_below else None, high)
    _check(case)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("with_sampling", [False, True])
def test_off_policy_sequence_mask(loss_type: str, with_sampling: bool) -> None:
    case = _case(loss_type)
    case.trl_inputs["advantages"] = case.arguments["advantages"] = torch.tensor([-1.0, 0.5, -2.0, -0.3]).double()
    case.settings["off_policy_mask_threshold"] = case.arguments["off_policy_threshold"] = 0.0
    if with_sampling:
        _add_off_policy(case, "token_truncate")
    out, _ = _check(case)
    dropped = [not row.any() for row in out.per_token_loss]
    assert True in dropped
    assert False in dropped


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("quantile", [0.2, 0.65])
def test_entropy_quantile_and_bonus(loss_type: str, quantile: float) -> None:
    case = _case(loss_type, advantages_per_token=True)
    _add_variant(case, "entropy")
    # Not where the threshold is a token's own entropy, which TRL rounds to float32.
    case.settings["top_entropy_quantile"] = case.arguments["entropy_quantile"] = quantile
    _check(case)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_without_old_logprobs(loss_type: str) -> None:
    case = _case(loss_type)
    del case.trl_inputs["old_per_token_logps"], case.arguments["old_logprobs"]
    _add_kl(case, corrected=True)
    out, _ = _check(case)
    assert out.metrics["ratio_mean"].item() == pytest.approx(1)


@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_metrics(loss_type: str) -> None:
    case = _case(loss_type)
    _add_kl(case, corrected=True)
    out, metrics = _check(case)
    names = {"kl": "kl", "entropy": "entropy", "clip_ratio/low_mean": "clip_fraction_low",
             "clip_ratio/high_mean": "clip_fraction_high", "cispo_clip_ratio": "clip_fraction_high"}  # fmt: skip
    compared = [name for name in names if name in metrics]
    assert len(compared) == (4 if loss_type == "dapo" else 3)
    for name in compared:
        # TRL logs from float32 counts.
        assert out.metrics[names[name]].item() == pytest.approx(metrics[name][0], rel=1e-6)
        assert metrics[name][0] > 0


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_gmpo(beta: float) -> None:
    gmpo = pytest.importorskip("trl.experimental.gmpo.gmpo_trainer")
    case = _case("gmpo")
    # What is clipped at 0.2 and 0.28 in the others.
    case.settings |= {"epsilon_low": 0.2, "epsilon_high": 0.28, "beta": beta}
    if beta:
        case.arguments |= {"reference_logprobs": case.trl_inputs["ref_per_token_logps"], "kl_coef": beta}
        case.arguments["kl_bias_correction"] = False
    _check(case, gmpo.GMPOTrainer)


def test_nan_where_masked_has_no_effect() -> None:
    """TRL's formulas would give NaN here; ours is what TRL gives without them."""
    case = _case("grpo")
    _add_variant(case, "all")
    gone = case.arguments["mask"] == 0
    for name in ("old_logprobs", "reference_logprobs", "sampling_logprobs"):
        case.arguments[name] = case.arguments[name].masked_fill(gone, torch.nan)
    case.arguments["advantages"] = case.arguments["advantages"][:, None].expand(gone.shape).masked_fill(gone, torch.nan)
    _check(case)
