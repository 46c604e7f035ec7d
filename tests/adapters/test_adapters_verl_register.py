"""verl's registry with our losses in it, with and without verl, and what they refuse."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from verl_formulas import config_with

from kldiv_kernels.adapters import verl
from kldiv_kernels.adapters.verl import megatron


def test_bad_policy_calls() -> None:
    ones = torch.ones(2, 3)
    loss = verl.POLICY_LOSSES["vanilla"]
    calls: list[tuple[str, Callable[[], Any]]] = [
        (r"compute_policy_loss_vanilla: config is None", lambda: loss(ones, ones, ones, ones)),
        (
            r"advantages has shape \[2\]; expected \[2, 3\]",
            lambda: loss(ones, ones, ones[:, 0], ones, config=config_with()),
        ),
        (r"log_prob has shape \[3\]; expected \[batch", lambda: loss(ones, ones[0], ones, ones, config=config_with())),
        (r"loss_agg_mode is 'mean'; expected one of token-mean", lambda: verl.agg_loss(ones, ones, "mean")),
        (r"batch_num_tokens is None.*dp_size is 2", lambda: verl.agg_loss(ones, ones, "token-mean", dp_size=2)),
        (r"global_batch_size is None", lambda: verl.agg_loss(ones, ones, "seq-mean-token-sum", dp_size=2)),
        (r"config.clip_ratio_low is None", lambda: loss(ones, ones, ones, ones, config=SimpleNamespace())),
        (
            r"compute_policy_loss_dro: config.policy_loss.dro_beta is None; expected a number above 0",
            lambda: verl.POLICY_LOSSES["dro"](ones, ones, ones, ones, config=config_with()),
        ),
        (
            r"dro_beta is 0; expected a number above 0",
            lambda: verl.POLICY_LOSSES["dro"](
                ones, ones, ones, ones, config=config_with(policy_loss=SimpleNamespace(dro_beta=0))
            ),
        ),
        (
            r"bypass_mode: config.policy_loss.rollout_correction is None; expected verl's",
            lambda: verl.POLICY_LOSSES["bypass_mode"](ones, ones, ones, ones, config=config_with()),
        ),
        (
            r"rollout_correction.loss_type is 'ppo'; expected ppo_clip or reinforce",
            lambda: verl.POLICY_LOSSES["bypass_mode"](
                ones,
                ones,
                ones,
                ones,
                config=config_with(policy_loss=SimpleNamespace(rollout_correction={"loss_type": "ppo"})),
            ),
        ),
        (r"clip_low is -1", lambda: loss(ones, ones, ones, ones, config=config_with(clip_ratio_low=-1))),
    ]
    for message, call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_register_without_verl(monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in ("verl", "verl.trainer.ppo.core_algos", "verl.trainer.ppo.rollout_corr_helper"):
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"register_policy_loss cannot be imported .*expected verl 0.9.1"):
        verl.register()
    ones = torch.ones(2, 3)
    settings = SimpleNamespace(rollout_correction={})
    with pytest.raises(ImportError, match=r"bypass_mode: verl.*cannot be imported .*expected verl 0.9.1"):
        verl.POLICY_LOSSES["bypass_mode"](ones, ones, ones, ones, config=config_with(policy_loss=settings))
    old = ModuleType("verl.trainer.ppo.core_algos")
    for name in ("verl", "verl.trainer", "verl.trainer.ppo"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, old.__name__, old)
    with pytest.raises(ImportError, match=r"register_policy_loss"):
        verl.register()


def test_the_hook_of_top_k_distillation(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the module that has it and where it was imported by name, and nowhere else."""
    places = ["verl.trainer.distillation.fsdp.losses", "verl.trainer.distillation.losses"]
    of_megatron = "verl.trainer.distillation.megatron.losses"
    others = ["verl", "verl.trainer", "verl.trainer.ppo", "verl.trainer.distillation", "verl.trainer.distillation.fsdp"]
    tree = {name: ModuleType(name) for name in (*others, *places, "verl.trainer.ppo.core_algos")}
    for name, module in tree.items():
        monkeypatch.setitem(sys.modules, name, module)
    tree["verl.trainer.ppo.core_algos"].register_policy_loss = lambda name: lambda loss: loss  # type: ignore[attr-defined]
    assert len(verl.register()) == len(verl.POLICY_LOSSES)

    def original() -> None:
        """verl's."""

    for place in places:
        monkeypatch.setattr(tree[place], "compute_forward_kl_topk", original, raising=False)
    monkeypatch.setattr(tree["verl.trainer"], "another", original, raising=False)
    names = verl.register()[len(verl.POLICY_LOSSES) :]
    assert names == [f"{place}.compute_forward_kl_topk" for place in places]
    assert all(tree[place].compute_forward_kl_topk is verl.compute_forward_kl_topk for place in places)
    assert tree["verl.trainer"].another is original
    assert verl.register()[len(verl.POLICY_LOSSES) :] == names
    # With Megatron's file of the same name, whose logits are columns.
    for name in ("verl.trainer.distillation.megatron", of_megatron):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules[of_megatron], "compute_forward_kl_topk", lambda: None, raising=False)
    assert verl.register()[len(verl.POLICY_LOSSES) :] == [*names, f"{of_megatron}.compute_forward_kl_topk"]
    assert sys.modules[of_megatron].compute_forward_kl_topk is megatron.compute_forward_kl_topk
