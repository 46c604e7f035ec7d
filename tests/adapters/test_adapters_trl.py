"""`patch_trl` and `unpatch_trl`: what is replaced, that it is put back, and which versions are served."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
from importlib import metadata
from typing import Any

import pytest
import torch

import kldiv_kernels as kk

pytest.importorskip("trl")

from trl.experimental.gkd import GKDTrainer
from trl.experimental.gold import GOLDTrainer
from trl.experimental.iw_opd import IWOPDTrainer
from trl.trainer import utils
from trl_parity import rows

from kldiv_kernels.adapters.trl import patch_trl, patched_trl, unpatch_trl

TRAINERS = {trainer.__name__: trainer for trainer in (GKDTrainer, GOLDTrainer, IWOPDTrainer)}
SHARED_WITH_TRL = (
    "trl.trainer.utils.selective_log_softmax",
    "trl.trainer.utils.entropy_from_logits",
    "trl.trainer.utils.selective_log_softmax_and_entropy",
    "trl.experimental.sdft.sdft_trainer.selective_log_softmax",
    "trl.experimental.sdpo.loss_utils.selective_log_softmax",
    "trl.experimental.gkd.gkd_trainer.GKDTrainer.generalized_jsd_loss",
    "trl.experimental.gold.gold_trainer.GOLDTrainer.generalized_jsd_loss",
    "trl.experimental.iw_opd.iw_opd_trainer.IWOPDTrainer.generalized_jsd_loss",
    "trl.experimental.sdft.sdft_trainer.compute_topk_self_distillation_loss",
    "trl.experimental.sdft.loss_utils.compute_full_logit_self_distillation_loss",
    "trl.experimental.sdpo.sdpo_trainer.compute_sampled_token_self_distillation_loss",
    "trl.trainer.utils._ChunkedLogProbFunction",
    "trl.trainer.distillation_trainer._chunked_divergence_loss",
)


@pytest.fixture(autouse=True)
def _unpatched() -> Any:
    yield
    unpatch_trl()


def _names_in_trl() -> dict[str, Any]:
    """Every attribute of every module of TRL, and of the three trainers."""
    modules = {name: vars(module) for name, module in sys.modules.items() if name.split(".")[0] == "trl"}
    modules |= {name: vars(trainer) for name, trainer in TRAINERS.items()}
    return {f"{name}.{key}": value for name, attributes in modules.items() for key, value in attributes.items()}


def test_patch_and_unpatch() -> None:
    patch_trl()
    unpatch_trl()
    before = _names_in_trl()
    names = patch_trl()
    assert names == sorted(set(names))
    assert set(SHARED_WITH_TRL) <= set(names)
    after = _names_in_trl()
    changed = {name for name in before if after[name] is not before[name]}
    assert changed == {name.replace(".".join(name.split(".")[:-2]) + ".", "") if "Trainer." in name else name
                       for name in names}  # fmt: skip
    unpatch_trl()
    again = _names_in_trl()
    assert all(again[name] is value for name, value in before.items())
    unpatch_trl()


def test_a_module_imported_while_patched_is_put_back_too() -> None:
    original, later = utils.entropy_from_logits, types.ModuleType("trl.imported_later")
    sys.modules[later.__name__] = later
    try:
        patch_trl()
        later.entropy_of = utils.entropy_from_logits
        assert later.entropy_of is not original
        unpatch_trl()
        assert later.entropy_of is original
    finally:
        del sys.modules[later.__name__]


@pytest.mark.parametrize("error", [ModuleNotFoundError, NameError])
def test_a_module_that_cannot_be_imported_is_left_out(error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = patch_trl()
    unpatch_trl()

    def import_module(name: str) -> Any:
        if "gold" in name:
            raise error
        return importlib.import_module(name)

    monkeypatch.setattr("kldiv_kernels.adapters.trl.patch.import_module", import_module)
    assert set(everything) - set(patch_trl()) == {"trl.experimental.gold.gold_trainer.GOLDTrainer.generalized_jsd_loss"}


def test_twice_is_an_error_and_leaves_the_patch() -> None:
    original = utils.entropy_from_logits
    patch_trl()
    with pytest.raises(RuntimeError, match="patched already"):
        patch_trl()
    with pytest.raises(RuntimeError, match="patched already"), patched_trl():
        pass
    assert utils.entropy_from_logits is not original
    unpatch_trl()
    assert utils.entropy_from_logits is original


def test_unpatched_after_an_error() -> None:
    original = utils.entropy_from_logits
    with pytest.raises(KeyError), patched_trl():
        raise KeyError
    assert utils.entropy_from_logits is original


def test_the_backend_is_the_one_asked_for() -> None:
    with pytest.raises(ValueError, match="patch_trl: backend is 'gpu'; expected one of auto"):
        patch_trl("gpu")
    logits = rows(torch.float32)[0]
    with patched_trl("cuda"), pytest.raises(Exception, match="cuda"):
        utils.entropy_from_logits(logits)
    with patched_trl("reference"):
        reference = utils.entropy_from_logits(logits)
    assert torch.equal(reference, kk.entropy(logits, backend="reference"))
    with patched_trl("cpu"):
        assert utils.entropy_from_logits(logits.double()).dtype == torch.float64


@pytest.mark.parametrize("version", ["1.13.0", "1.17.0", "2.0.0", "1.16.0.dev0", None])
def test_other_versions_are_refused(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(name: str) -> str:
        assert name == "trl"
        if version is None:
            raise metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(metadata, "version", found)
    said = "trl is not installed; run: pip install kldiv_kernels\\[trl\\]"
    with pytest.raises(ImportError, match=f"{version}; expected TRL 1.14 to 1.16" if version else said):
        patch_trl()


def test_trainers_want_one_version_more(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("kldiv_kernels.adapters.trl")
    monkeypatch.setattr(metadata, "version", lambda name: "1.14.0")
    for name in ("GRPOTrainer", "DistillationTrainer"):
        with pytest.raises(ImportError, match=f"{name}: TRL is 1.14.0; expected TRL 1.15 to 1.16"):
            getattr(module, name)
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        _ = module.Trainer
    assert patch_trl()


def test_trl_is_imported_when_used() -> None:
    code = "import sys, kldiv_kernels.adapters.trl; assert 'trl' not in sys.modules; assert 'torch' in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
