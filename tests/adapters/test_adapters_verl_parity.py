"""The adapter's functions beside those of the installed verl: values, gradients, metrics; and its registry."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import verl_modules
from torch import Tensor

from kldiv_kernels.adapters import verl

MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]
RANKS = {"dp_size": 2, "batch_num_tokens": 41, "global_batch_size": 9, "loss_scale_factor": 7}
# All candidates, so that verl's random choice is none.
COVARIANCES = {"clip_cov_ratio": 1.0, "clip_cov_lb": -0.5, "clip_cov_ub": 3.0, "kl_cov_ratio": 0.3, "ppo_kl_coef": 0.7}
SETTINGS: dict[str, dict[str, Any]] = {
    "vanilla": {"clip_ratio_c": 1.3},
    "gspo": {"clip_ratio_low": 0.02, "clip_ratio_high": 0.03},
    "sapo": {"tau_pos": 0.8, "tau_neg": 1.2},
    "cispo": {},
    "geo_mean": {},
    "clip_cov": {"policy_loss": COVARIANCES},
    "kl_cov": {"policy_loss": COVARIANCES},
    "dppo_tv": {"clip_ratio_low": 0.02, "clip_ratio_high": 0.03},
    "dppo_kl": {"clip_ratio_low": 1e-3, "clip_ratio_high": 2e-3, "clip_ratio_c": 1.3},
    "gpg": {},
    "dro": {"policy_loss": {"dro_beta": 0.4}},
    "bypass_mode": {},
}


def _config(policy_loss: Any = None, **entries: Any) -> Any:
    configs = verl_modules.verl("verl.workers.config")
    given = {"clip_ratio_low": 0.15, "clip_ratio_high": 0.3, **entries}
    return configs.ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1,
        policy_loss=configs.PolicyLossConfig(**(policy_loss or {})), **given,
    )  # fmt: skip


def _batch(spread: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Old and new log-probabilities, an advantage a token and a mask with prompt, padding and an empty sequence.

    From near-certain to hopeless tokens; `spread` is that of the log-ratios. Masked tokens have values of their own.
    """
    old = -torch.rand(6, 11, dtype=dtype).pow(-0.7).sub(0.99)
    new = (old + spread * torch.randn_like(old)).clamp_max(-1e-4)
    advantages = torch.randn_like(old)
    mask = (torch.rand(6, 11) < 0.7).int()
    mask[0], mask[1], mask[2, 0], mask[2, 1:] = 0, 1, 1, 0
    return old, new, advantages, mask


def _compare(
    ours: Callable[..., Any], theirs: Callable[..., Any], batch: tuple[Tensor, ...], *arguments: Any, **options: Any
) -> dict[str, float]:
    old, new, advantages, mask = batch
    before = [x.clone() for x in batch]
    ends = []
    for function in (ours, theirs):
        at = new.clone().requires_grad_()
        loss, metrics = function(old, at, advantages, mask, *arguments, **options)
        ends.append((loss.double().item(), torch.autograd.grad(loss, at)[0].double(), metrics))
    (got, gradient, logged), (expected, wanted, theirs_logged) = ends
    close = 1e-7 if new.dtype == torch.float64 else 1e-5
    assert got == pytest.approx(expected, rel=close, abs=close * wanted.abs().max().item())
    assert wanted.abs().max() > 0
    assert torch.allclose(gradient, wanted, rtol=close, atol=close * wanted.abs().max().item())
    assert logged == pytest.approx(theirs_logged, rel=1e-5, abs=1e-6, nan_ok=True)
    assert all(torch.equal(x, y) for x, y in zip(batch, before, strict=True))
    return theirs_logged


@pytest.mark.parametrize("spread", [0.01, 0.5, 20.0])
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "bypass_mode"])
def test_policy_losses(name: str, spread: float) -> None:
    theirs = verl_modules.verl("verl.trainer.ppo.core_algos").get_policy_loss_fn(name)
    for weighted in (False, True):
        for info in ({}, RANKS):
            for mode in MODES:
                batch = _batch(spread)
                if name == "geo_mean":
                    batch = (*batch[:2], batch[2][:, :1].expand(batch[0].shape).contiguous(), batch[3])
                weights = torch.rand_like(batch[0]) * 2 if weighted else None
                config = _config(global_batch_info=info, **SETTINGS[name])
                _compare(verl.POLICY_LOSSES[name], theirs, batch, mode, config, weights)


def test_defaults_and_float32() -> None:
    core = verl_modules.verl("verl.trainer.ppo.core_algos")
    for name, loss in verl.POLICY_LOSSES.items():
        batch = _batch(0.3, torch.float32)
        if name == "geo_mean":
            batch[2].copy_(batch[2][:, :1].expand(batch[0].shape).clone())
        settings = {"dro_beta": 0.4, "clip_cov_ratio": 1.0}
        _compare(loss, core.get_policy_loss_fn(name), batch, config=_config(settings))
    assert {*verl.POLICY_LOSSES} == {name for name in core.POLICY_LOSS_REGISTRY if not name.startswith("kldiv_")}


REJECTIONS = [
    (None, None), ("token_k1", "0.6_1.5"), ("token_k1", 1.4), ("token_k2", 0.1), ("token_k3", "0.1"),
    ("seq_sum_k1", "0.3_2.5"), ("seq_sum_k2", 2.0), ("seq_sum_k3", 2.0), ("seq_mean_k1", "0.8_1.2"),
    ("seq_mean_k2", 0.12), ("seq_mean_k3", 0.12), ("seq_max_k2", 0.9), ("seq_max_k3", 0.7),
    ("token_k1,seq_mean_k3", "0.6_1.5,0.12"),
]  # fmt: skip


@pytest.mark.parametrize("loss_type", ["ppo_clip", "reinforce"])
@pytest.mark.parametrize(
    "weights",
    [
        {"rollout_is": None},
        {"rollout_is": "token"},
        {"rollout_is": "sequence", "rollout_is_threshold": 1.3},
        {"rollout_is": "token", "rollout_is_threshold": "0.7_1.4", "rollout_is_batch_normalize": True},
        {"rollout_is": "sequence", "rollout_is_batch_normalize": True},
        {"rollout_is": "token", "rollout_is_threshold": None},
    ],
)
def test_bypass_mode(loss_type: str, weights: dict[str, Any]) -> None:
    core = verl_modules.verl("verl.trainer.ppo.core_algos")
    correction_type = verl_modules.verl("verl.trainer.config.algorithm").RolloutCorrectionConfig
    partly = 0
    for index, (rejection, threshold) in enumerate(REJECTIONS):
        given = {"loss_type": loss_type, "rollout_rs": rejection, "rollout_rs_threshold": threshold, **weights}
        correction = given if index % 2 else correction_type(**given)
        config = _config({"rollout_correction": correction}, global_batch_info=RANKS if index % 3 == 0 else {})
        batch = _batch(0.4)
        metrics = _compare(
            verl.POLICY_LOSSES["bypass_mode"], core.compute_policy_loss_bypass_mode, batch, MODES[index % 5], config,
            torch.full_like(batch[0], torch.nan),
        )  # fmt: skip
        partly += 0 < metrics.get("rollout_corr/rollout_rs_masked_fraction", 0) < 1
        assert "rollout_corr/kl" in metrics
    assert partly > 5
    # All tokens rejected: 0, where verl divides by the number of the tokens that are left.
    given = {"loss_type": loss_type, "rollout_rs": "token_k2", "rollout_rs_threshold": 1e-30, **weights}
    loss, _ = verl.POLICY_LOSSES["bypass_mode"](*_batch(0.4), config=_config({"rollout_correction": given}))
    assert loss.item() == 0


def test_masked_tokens_of_bypass_mode_are_not_looked_at() -> None:
    verl_modules.verl("verl.trainer.ppo.core_algos")
    correction = {
        "loss_type": "reinforce",
        "rollout_is": "token",
        "rollout_rs": "seq_max_k2",
        "rollout_rs_threshold": 1,
    }
    old, new, advantages, mask = _batch(0.4)
    hidden = [torch.where(mask != 0, x, torch.nan) for x in (old, new, advantages)]
    ends = [
        verl.POLICY_LOSSES["bypass_mode"](*x, mask, config=_config({"rollout_correction": correction}))
        for x in ((old, new, advantages), hidden)
    ]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("mode", MODES)
def test_agg_loss(mode: str) -> None:
    theirs = verl_modules.verl("verl.trainer.ppo.core_algos").agg_loss
    values, _, _, mask = _batch(1.0)
    for info in ({}, RANKS, {"global_batch_size": 3, "batch_num_tokens": torch.tensor(5)}):
        expected = theirs(values, mask, mode, **info).item()
        assert verl.agg_loss(values, mask, mode, **info).item() == pytest.approx(expected, rel=1e-7)


def test_functions_of_logits() -> None:
    functions = verl_modules.verl("verl.utils.torch_functional")
    theirs = verl_modules.verl("verl.trainer.distillation.fsdp.losses").compute_forward_kl_topk
    logits = (3 * torch.randn(1, 13, 53)).requires_grad_()
    labels = torch.randint(53, (1, 13))
    log_p, ids = torch.randn(1, 13, 53).mul(2).log_softmax(-1).topk(5)
    nested = [torch.nested.nested_tensor([x[0, :4], x[0, 4:]], layout=torch.jagged) for x in (log_p, ids)]
    pairs = [
        (verl.logprobs_from_logits(logits, labels), functions.logprobs_from_logits_v2(logits, labels)),
        (verl.entropy_from_logits(logits), functions.entropy_from_logits(logits)),
    ]
    for clamp, chunked in ((None, False), (-2.5, False), (None, True)):
        settings = SimpleNamespace(log_prob_min_clamp=clamp, use_chunked_topk=chunked)
        given = (logits, *nested, SimpleNamespace(distillation_loss=settings), "thd")
        got, expected = verl.compute_forward_kl_topk(*given), theirs(*given)
        assert got.keys() == expected.keys()
        pairs += [(got[key], expected[key]) for key in ("distillation_losses", "student_mass")]
        for key in ("teacher_mass", "overlap_count", "overlap_token_advantage"):
            assert torch.allclose(got[key].float(), expected[key].float(), rtol=1e-5, atol=1e-6)
    for got, expected in pairs:
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)
        upstream = torch.rand_like(expected) + 0.5
        first, second = (torch.autograd.grad(x, logits, upstream, retain_graph=True)[0] for x in (got, expected))
        assert second.abs().max() > 1e-2
        assert torch.allclose(first, second, rtol=1e-4, atol=1e-5 * second.abs().max().item())


def test_register(monkeypatch: pytest.MonkeyPatch) -> None:
    core = verl_modules.verl("verl.trainer.ppo.core_algos")
    places = [verl_modules.verl(f"verl.trainer.distillation.{name}losses") for name in ("fsdp.", "")]
    monkeypatch.setattr(core, "POLICY_LOSS_REGISTRY", dict(core.POLICY_LOSS_REGISTRY))
    monkeypatch.setattr(places[0], "compute_forward_kl_topk", places[0].compute_forward_kl_topk)
    names = [*verl.POLICY_LOSSES]
    hook = "verl.trainer.distillation.fsdp.losses.compute_forward_kl_topk"
    assert verl.register() == [*(f"kldiv_{name}" for name in names), hook]
    assert verl.register(prefix="") == [*names, hook]
    for name in names:
        assert core.get_policy_loss_fn(name) is core.get_policy_loss_fn(f"kldiv_{name}") is verl.POLICY_LOSSES[name]
    assert places[0].compute_forward_kl_topk is verl.compute_forward_kl_topk
    # The dispatcher of the same name is another function.
    assert places[1].compute_forward_kl_topk is not verl.compute_forward_kl_topk
