"""The functions of the adapter beside Liger's own, whose kernels run on CPU tensors in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import INTERPRETED
from torch import Tensor

from kldiv_kernels.adapters import liger

if not INTERPRETED:
    pytest.skip("Liger's kernels run on CPU tensors under TRITON_INTERPRET=1 only", allow_module_level=True)
theirs = pytest.importorskip("liger_kernel.transformers.grpo_loss", reason="Liger is not installed")
functional = pytest.importorskip("liger_kernel.transformers.functional")

BATCH, LENGTH, VOCAB = 3, 5, 37


def _batch() -> dict[str, Tensor]:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[0, 3:], mask[2, 1:] = 0, 0
    ids = torch.randint(VOCAB, (BATCH, LENGTH))
    logits = 3 * torch.randn(BATCH, LENGTH + 1, VOCAB)
    now = (logits[:, :-1] / 0.9).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return {
        "logits": logits, "old_logp": now + 0.4 * torch.randn_like(now), "ref_logp": now + 0.4 * torch.randn_like(now),
        "completion_ids": ids, "advantages": torch.tensor([1.3, -0.7, 0.4]), "completion_mask": mask,
    }  # fmt: skip


def _both(batch: dict[str, Tensor], **options: Any) -> list[tuple[Tensor, list[Tensor], Tensor]]:
    ends = []
    for function in (liger.triton_grpo_loss, theirs.triton_grpo_loss):
        logits = batch["logits"].clone().requires_grad_()
        loss, *others = function(**{**batch, "logits": logits}, inplace=False, **options)
        metrics = others[0] if options.get("reduce") else [x for x in others if x is not None]
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        ends.append((loss.detach(), metrics, gradient))
    return ends


LEVELS = [(name, "token") for name in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")]
LEVELS += [(name, "sequence") for name in ("grpo", "bnpo", "dr_grpo", "dapo")]


@pytest.mark.parametrize("options", [{}, {"beta": 0.0}, {"use_bias_correction_kl": True}, {"vllm_is_ratio": 1.3}])
@pytest.mark.parametrize(("kind", "level"), LEVELS)
def test_grpo(kind: str, level: str, options: dict[str, Any]) -> None:
    batch = _batch()
    given = {"loss_type": kind, "importance_sampling_level": level, "temperature": 0.9, **options}
    if "vllm_is_ratio" in given:
        given["vllm_is_ratio"] = torch.rand(BATCH, 1) + 0.5
    for reduce in (True, False) if kind != "luspo" else (False,):  # whose sum over a sequence Liger takes twice
        (got, metrics, gradient), (expected, wanted_metrics, wanted) = _both(batch, reduce=reduce, **given)
        # What a masked token holds is nobody's: Liger leaves its memory as it was.
        kept = batch["completion_mask"] != 0 if not reduce else ...
        assert torch.allclose(got[kept], expected[kept], rtol=1e-5, atol=1e-6)
        assert len(metrics) == len(wanted_metrics)
        for mine, other in zip(metrics, wanted_metrics, strict=True):
            assert torch.allclose(mine[kept], other[kept], rtol=1e-5, atol=1e-6)
        assert wanted.abs().max() > 1e-4
        assert torch.allclose(gradient, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def test_fused_selective_log_softmax() -> None:
    batch = _batch()
    ids = torch.cat([torch.randint(VOCAB, (BATCH, 2)), batch["completion_ids"]], 1)
    for mask in (None, batch["completion_mask"]):
        calls = [f(batch["logits"], ids, 0.7, mask) for f in (liger.fused_selective_log_softmax,
                 theirs.fused_selective_log_softmax)]  # fmt: skip
        assert torch.allclose(*calls, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_jsd(beta: float) -> None:
    """Liger's other two divergences do not run in the interpreter."""
    x, y = (2 * torch.randn(2, 9, 53)).log_softmax(-1)
    labels = torch.where(torch.arange(9) % 4 == 1, -100, 1)
    ends = []
    for function in (liger.liger_jsd, functional.liger_jsd):
        leaf = x.clone().requires_grad_()
        loss = function(leaf, y, labels, beta)
        ends.append((loss, torch.autograd.grad(loss, leaf)[0]))
    (got, gradient), (expected, wanted) = ends
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-7)
    assert torch.allclose(gradient, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize(
    "wrong",
    [
        {"loss_type": "ppo"}, {"loss_type": "sapo", "delta": 2.0},
        {"loss_type": "cispo", "importance_sampling_level": "sequence"},
        {"loss_type": "vespo", "importance_sampling_level": "sequence"},
        {"loss_type": "sapo", "sapo_temperature_pos": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_messages(wrong: dict[str, Any]) -> None:
    """Ours has Liger's in it, but for the order of the list of loss types."""
    said = []
    for function in (liger.triton_grpo_loss, theirs.triton_grpo_loss):
        with pytest.raises(ValueError, match=r".") as caught:
            function(**_batch(), **wrong)
        said.append(str(caught.value).partition(" Supported types")[0])
    assert said[1] in said[0]
