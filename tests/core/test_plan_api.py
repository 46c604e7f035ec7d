"""kldiv_kernels.plan: what a loss or statistics would run as, on which backend, and how many bytes it would move."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from cuda_plans import ROWS, plan

import kldiv_kernels as kk

pytestmark = pytest.mark.usefixtures("no_cuda_plan")


def test_a_top_k_loss_by_name() -> None:
    shape = {"rows": 8192, "vocab": 151_936, "kind": "topk_loss"}
    found = kk.plan(**shape, device="sm_90")
    assert (found.kernel, found.cluster, found.stages) == ("one-read", 4, 3)
    assert found.bytes == 2 * 8192 * 151_936 * 2
    assert kk.plan(**shape, device="sm_86").kernel == "two-sweep"
    assert kk.plan(**shape).bytes == found.bytes


@pytest.mark.parametrize("device", ["cpu", "sm_90"])
@pytest.mark.parametrize(("kind", "moved"), [("forward_kl", 5), ("topk_loss", 3), ("policy_loss", 3)])
def test_float16_losses_read_again(kind: str, moved: int, device: str) -> None:
    """Their gradients wait for the loss scale, which comes in with backward."""
    shape = {"rows": 64, "vocab": 32_000, "kind": kind, "device": device}
    found = kk.plan(**shape, dtype=torch.float16)
    assert "one-read" not in found.kernel
    assert found.bytes == moved * 64 * 32_000 * 2
    assert found.reason.endswith("backward reads float16 logits again, with the loss scale")
    assert "one-read" in kk.plan(**shape, dtype=torch.bfloat16).kernel
    assert "float16" not in kk.plan(**shape, dtype=torch.float16, gradient=False).reason


def test_the_api_plans_a_loss_and_statistics() -> None:
    loss = kk.plan(rows=ROWS, vocab=151_936, kind="js", device="sm_90a")
    assert (loss.backend, loss.kernel, loss.sweeps) == ("cuda", "one-read", 3)
    assert (loss.cluster, loss.stages, loss.threads) == (8, 3, 576)
    assert loss.shared_memory == plan(90, 151_936).shared_bytes > 3 * 151_936 // 8 * 4
    assert loss.bytes == 3 * ROWS * 151_936 * 2
    statistics = kk.plan(rows=ROWS, vocab=151_936, stats=["logprob", "entropy"], device="sm_90")
    assert (statistics.kernel, statistics.cluster, statistics.bytes) == ("two-sweep", 1, 3 * ROWS * 151_936 * 2)
    values = kk.plan(rows=ROWS, vocab=151_936, kind="js", gradient=False, device="sm_90")
    assert (values.kernel, values.sweeps) == ("two-sweep", 2)
    assert kk.plan(rows=ROWS, vocab=151_936, dtype=torch.float32, device="sm_90").cluster == 16


def test_the_api_needs_no_module_of_one_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says is what `_C`, which has the planner as well, says."""
    monkeypatch.setitem(sys.modules, "kldiv_kernels._C", None)
    for shape in (
        {"kind": "js"}, {"kind": "policy_loss"}, {"kind": "topk_loss", "dtype": torch.float16},
        {"stats": ["logprob", "entropy"], "gradient": False},
    ):  # fmt: skip
        found = kk.plan(rows=ROWS, vocab=151_936, **shape, device="sm_90")
        assert (found.backend, found.cluster is not None) == ("cuda", True)
    found, stated = kk.plan(rows=ROWS, vocab=151_936, device="sm_90"), plan(90, 151_936)
    for name in ("kernel", "sweeps", "cluster", "stages", "threads", "bytes", "reason"):
        assert getattr(found, name) == getattr(stated, name)
    assert found.shared_memory == stated.shared_bytes


def test_the_api_names_the_device_of_a_refused_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="plan: device is 'sm_75'; the cuda backend serves sm_80 to sm_129"):
        kk.plan(rows=4, vocab=8, device="sm_75")
    monkeypatch.setenv("KLDIV_CUDA_PLAN", "cluster=5")
    with pytest.raises(ValueError, match="plan: KLDIV_CUDA_PLAN is 'cluster=5'"):
        kk.plan(rows=4, vocab=8, device="sm_90")


def test_what_cuda_does_not_serve_goes_to_the_next_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    double = kk.plan(rows=4, vocab=64, dtype=torch.float64, device="sm_90")
    assert double.backend == "reference"
    assert "cuda: it serves float32, bfloat16 and float16, not torch.float64" in double.reason
    kk.register_statistic(
        "overlap", value=lambda logp, logq: logp.exp() * logq.exp(),
        grad_logq=lambda logp, logq: logp.exp() * logq.exp(), grad_logp=lambda logp, logq: logp.exp() * logq.exp(),
    )  # fmt: skip
    try:
        users = kk.plan(rows=4, vocab=64, kind="overlap", device="sm_90")
    finally:
        kk.unregister_statistic("overlap")
    assert users.backend == "reference"
    assert "cuda: it has no overlap" in users.reason
    monkeypatch.setenv("KLDIV_BACKEND", "reference")
    assert kk.plan(rows=4, vocab=64, device="sm_90").reason == "reference: KLDIV_BACKEND=reference"
    monkeypatch.setenv("KLDIV_BACKEND", "cpu")
    with pytest.raises(ValueError, match="KLDIV_BACKEND is 'cpu'; expected auto or one of cuda, triton, reference"):
        kk.plan(rows=4, vocab=64, device="sm_90")


@pytest.mark.parametrize("rows", [4, ROWS])
@pytest.mark.parametrize(
    ("asked", "sweeps", "units"),
    [
        ({"kind": "forward_kl"}, 2, 5), ({"kind": "js"}, 3, 7), ({"kind": "js", "gradient": False}, 2, 4),
        ({"kind": "forward_kl", "gradient": False}, 1, 2), ({"kind": "policy_loss"}, 2, 3),
        ({"stats": ["logprob", "entropy"]}, 2, 3), ({"stats": ["collision"]}, 3, 4),
        ({"stats": ["forward_kl", "js"]}, 3, 7), ({"kind": "js", "dtype": torch.float16}, 3, 7),
    ],
)  # fmt: skip
def test_triton_reads_once_a_sweep(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], sweeps: int, units: int, rows: int
) -> None:
    """And as often as the two-sweep kernels of the cuda backend."""
    pytest.importorskip("triton")
    monkeypatch.setenv("KLDIV_CUDA_PLAN", "two-sweep")
    cuda = kk.plan(rows=rows, vocab=32_000, device="sm_90", **asked)
    monkeypatch.setenv("KLDIV_BACKEND", "triton")
    found = kk.plan(rows=rows, vocab=32_000, device="sm_90", **asked)
    assert (found.backend, found.sweeps, found.threads) == ("triton", sweeps, 128)
    assert found.bytes == units * rows * 32_000 * 2
    assert (cuda.backend, cuda.kernel, cuda.sweeps, cuda.bytes) == ("cuda", "two-sweep", found.sweeps, found.bytes)
    assert found.cluster is None


def test_triton_marks_the_labels_of_a_top_k_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("KLDIV_BACKEND", "triton")
    # 32,768 columns are two whole slices.
    found = kk.plan(rows=ROWS, vocab=32_768, kind="topk_loss", device="sm_90")
    assert found.bytes == 3 * ROWS * 32_768 * 2 + 2 * ROWS * 32_768 // 8


def test_a_policy_loss_reads_the_logits_once() -> None:
    unit = ROWS * 151_936 * 2
    plans = {
        device: kk.plan(rows=ROWS, vocab=151_936, kind="policy_loss", device=device) for device in ("cpu", "sm_90")
    }
    assert {plan.bytes for plan in plans.values()} == {2 * unit}
    assert plans["sm_90"].kernel == "one-read"
    assert kk.plan(rows=ROWS, vocab=151_936, kind="policy_loss", device="sm_80").bytes == 3 * unit
    assert kk.plan(rows=ROWS, vocab=151_936, stats=["logprob", "entropy"]).bytes == 3 * unit
