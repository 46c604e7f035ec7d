"""The adapters of frameworks that spread the vocabulary over ranks: every case of adapter_cases.py on two of them."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kldiv_kernels.adapters import nemo_rl, torchtitan

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))

import ranks

_MODULE = "adapter_cases"


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[str]]:
    return ranks.run(2, _MODULE)


@pytest.mark.parametrize("name", ranks.cases_of(_MODULE))
def test_on_two_ranks(name: str, outcomes: dict[str, list[str]]) -> None:
    if name == f"{_MODULE}.case_beside_verls_own_for_megatron" and find_spec("verl") is None:
        pytest.skip("verl is not installed")
    assert not outcomes["start"], outcomes["start"][0]
    assert not outcomes[name], outcomes[name][0]


def _tree(monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, Any]:
    """Stand-ins for these modules and their packages."""
    packages = {".".join(name.split(".")[:i]) for name in names for i in range(1, name.count(".") + 1)}
    tree: dict[str, Any] = {name: ModuleType(name) for name in sorted({*packages, *names})}
    for name, module in tree.items():
        monkeypatch.setitem(sys.modules, name, module)
    return tree


def test_register_in_nemo_rl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nemo_rl", None)
    with pytest.raises(ImportError, match=r"^register: nemo_rl.distributed.model_utils cannot be imported"):
        nemo_rl.register()
    with pytest.raises(ImportError):
        _ = nemo_rl.DistillationLossFn().input_type
    defining = "nemo_rl.distributed.model_utils", "nemo_rl.algorithms.loss.loss_functions"
    importing, interfaces = "nemo_rl.algorithms.loss.utils", "nemo_rl.algorithms.loss.interfaces"
    tree = _tree(monkeypatch, *defining, importing, interfaces)
    with pytest.raises(ImportError, match="NeMo-RL has none of these functions"):
        nemo_rl.register()
    for home, name in ((defining[0], "get_next_token_logprobs_from_logits"), (defining[1], "DistillationLossFn")):
        original = object()
        for place in (home, importing):
            setattr(tree[place], name, original)
    tree[importing].another = original
    places = nemo_rl.register()
    assert len(places) == 4
    assert f"{importing}.get_next_token_logprobs_from_logits" in places
    assert tree[importing].get_next_token_logprobs_from_logits is nemo_rl.get_next_token_logprobs_from_logits
    assert tree[defining[1]].DistillationLossFn is nemo_rl.DistillationLossFn
    assert tree[importing].another is original
    tree[interfaces].LossType = type("LossType", (), {"TOKEN_LEVEL": "token_level"})
    tree[interfaces].LossInputType = type("LossInputType", (), {"DISTILLATION": "distillation"})
    loss = nemo_rl.DistillationLossFn()
    assert (loss.loss_type, loss.input_type) == ("token_level", "distillation")


def test_register_in_torchtitan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchtitan", None)
    with pytest.raises(ImportError, match=r"^register: torchtitan.components.loss cannot be imported"):
        torchtitan.register()
    home, importing = "torchtitan.components.loss", "torchtitan.experiments.rl.losses.dapo"
    tree = _tree(monkeypatch, home, importing)
    with pytest.raises(ImportError, match=r"has no compute_logprobs; expected torchtitan 0\.3"):
        torchtitan.register()
    tree[home].compute_logprobs = tree[importing].compute_logprobs = object()
    assert torchtitan.register() == [f"{home}.compute_logprobs", f"{importing}.compute_logprobs"]
    assert tree[importing].compute_logprobs is torchtitan.compute_logprobs


def test_options_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"^DistillationLossFn: cfg.kl_type is 'js'; expected one of forward, reverse"):
        nemo_rl.DistillationLossFn({"kl_type": "js"})
    with pytest.raises(ValueError, match=r"^DistillationLossFn: cfg.mixed_kl_weight is 2; expected 0 to 1"):
        nemo_rl.DistillationLossFn({"mixed_kl_weight": 2})
    with pytest.raises(ValueError, match="unknown statistic 'kl'; did you mean skew_kl"):
        torchtitan.DistillationLoss.Config(kind="kl").build()
    with pytest.raises(ValueError, match=r"beta .*forward_kl"):
        torchtitan.DistillationLoss.Config(beta=0.3).build()
