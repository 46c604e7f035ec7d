"""Launch plans: of any architecture, without a GPU. The launcher of the cuda backend follows the same code."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch

import kldiv_kernels as kk
from kldiv_kernels.registry import STATISTICS

compiled = pytest.importorskip("kldiv_kernels._C")

ROWS = 8192
BF16 = {"student_bytes": 2, "teacher_bytes": 2}
FP32 = {"student_bytes": 4, "teacher_bytes": 4}
ONE_BF16 = {"student_bytes": 2, "stats": ["logprob", "entropy"]}
TWO_SWEEP = (1, 0)
# What a block may have, and the largest cluster.
TARGETS = {80: (166_912, 1), 86: (101_376, 1), 90: (232_448, 16), 100: (232_448, 16), 120: (101_376, 8)}


@pytest.fixture(autouse=True)
def _no_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KLDIV_CUDA_PLAN", raising=False)


def plan(capability: int, columns: int, **options: Any) -> Any:
    return compiled.plan_cuda(
        capability=capability, columns=columns, **{"rows": ROWS, "stats": ["forward_kl"], **BF16, **options}
    )


def one_tensor(capability: int, columns: int) -> Any:
    return plan(capability, columns, teacher_bytes=0, stats=["logprob", "entropy"])


@pytest.mark.parametrize(
    ("capability", "columns", "cluster", "stages"),
    [
        (90, 8_192, 1, 4), (90, 32_000, 2, 3), (90, 65_536, 4, 3), (90, 128_256, 8, 3), (90, 151_936, 8, 3),
        (90, 201_088, 16, 4), (90, 262_144, 16, 3), (100, 151_936, 8, 3), (103, 151_936, 8, 3),
        (120, 32_000, 4, 3), (120, 50_264, 8, 3), (120, 65_536, 8, 2), (120, 128_256, 8, 1), (120, 151_936, 8, 1),
        (120, 262_144, *TWO_SWEEP), (80, 32_000, *TWO_SWEEP), (89, 151_936, *TWO_SWEEP),
    ],
)  # fmt: skip
def test_cluster_and_stages_of_two_bf16_rows(capability: int, columns: int, cluster: int, stages: int) -> None:
    found = plan(capability, columns)
    assert (found.cluster, found.stages) == (cluster, stages), found.reason
    assert found.kernel == ("one-read" if stages else "two-sweep")
    assert found.threads == (576 if stages else 256)


@pytest.mark.parametrize(
    ("capability", "columns", "cluster", "stages"),
    [(90, 32_000, 1, 3), (90, 151_936, 4, 3), (90, 262_144, 8, 3), (120, 151_936, 8, 2), (120, 262_144, 8, 1)],
)
def test_one_row_takes_half_the_cluster(capability: int, columns: int, cluster: int, stages: int) -> None:
    found = one_tensor(capability, columns)
    assert (found.cluster, found.stages) == (cluster, stages), found.reason


@pytest.mark.parametrize(
    ("columns", "cluster", "stages"),
    [(32_000, 4, 3), (128_256, 16, 3), (151_936, 16, 2), (262_144, 16, 1), (600_000, *TWO_SWEEP)],
)
def test_float32(columns: int, cluster: int, stages: int) -> None:
    found = plan(90, columns, **FP32)
    assert (found.cluster, found.stages) == (cluster, stages), found.reason


def test_the_reason_counts_what_a_cluster_holds() -> None:
    assert plan(90, 151_936).reason == "8 CTAs hold 3 row pairs of 151,936 columns: 227 KiB each"
    assert one_tensor(90, 32_000).reason.startswith("1 CTA holds 3 rows of 32,000 columns: ")
    assert "8 CTAs hold 1 row pair of 128,256 columns" in plan(120, 128_256).reason


@pytest.mark.parametrize("capability", TARGETS)
def test_nothing_asks_for_more_than_a_device_has(capability: int) -> None:
    """Nor for a CTA without columns; and every column stands in a CTA's slot."""
    shared, largest = TARGETS[capability]
    target = compiled.cuda_target(capability)
    assert (target.shared_bytes, target.largest_cluster) == (shared, largest)
    for columns, (student, teacher) in itertools.product(
        [8, 8_192, 8_200, 9_992, 50_264, 102_400, 129_280, 151_936, 152_064, 202_048, 256_000, 262_144, 400_000],
        [(2, 0), (2, 2), (4, 0), (4, 4)],
    ):
        found = plan(capability, columns, student_bytes=student, teacher_bytes=teacher)
        assert 0 < found.shared_bytes <= shared
        assert 1 <= found.cluster <= largest
        if found.kernel == "one-read":
            a_slot = found.shared_bytes // found.stages // (student + teacher)
            assert (found.cluster - 1) * (-(-columns // found.cluster)) < columns
            assert a_slot * found.cluster >= columns
            assert 1 <= found.stages <= 4


def test_longer_rows_never_take_smaller_clusters_until_nothing_has_three_stages() -> None:
    clusters = [plan(90, columns).cluster for columns in range(8_192, 262_145, 1_024)]
    assert clusters == sorted(clusters)
    assert set(clusters) == {1, 2, 4, 8, 16}


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


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "no gradient": ({"student_gradient": False}, "no gradient is asked for"),
    "token_stats": ({"known_coefficients": False}, "the gradient's coefficients are known after the statistics only"),
    "capability": ({"capability": 86}, "sm_86 has no thread-block clusters (sm_90 and later have)"),
    "teacher": ({"teacher_gradient": True}, "a gradient of reference_logits is asked for"),
    "teacher alone": (
        {"student_gradient": False, "teacher_gradient": True}, "a gradient of reference_logits is asked for",
    ),
    "dtypes": ({"same_dtype": False}, "logits and reference_logits differ in dtype"),
    "columns": ({"columns": 151_937}, "151,937 columns are not a multiple of 8"),
    "half a vector of float32": ({"columns": 32_004, **FP32}, "32,004 columns are not a multiple of 8"),
    "alignment": ({"aligned": False}, "rows of logits do not all start at multiples of 16 bytes"),
    "labels": ({"labels_per_row": 3, "stats": ["logprob"]}, "3 labels a row"),
    "many labels of a top-k loss": (
        {"stats": ["logprob"], "labels_per_row": 1_025, "topk_outcomes": 1_025},
        "1,025 labels a row; one-read takes 1,024",
    ),
    "float16 of a top-k loss": (
        {"stats": ["logprob"], "labels_per_row": 8, "topk_outcomes": 8, "float16": True},
        "top-k losses have no one-read kernel for float16",
    ),
    "tail": ({"stats": ["tail_logprob"]}, "tail_logprob has no one-read kernel"),
    "two divergences": (
        {"stats": ["logprob", "forward_kl", "js"]},
        "2 statistics beside logprob and logsumexp; one-read takes one",
    ),
    "limits": (
        {"stats": ["js"], "token_parameters": True},
        "js with a parameter per token can have a different formula in each row",
    ),
    "short": ({"columns": 8_184}, "a row of 8,184 columns is shorter than 8,192"),
    "no room": (
        {"capability": 120, "columns": 262_144},
        "sm_120 has no shared memory for 1 row pair of 262,144 columns in a cluster of 8",
    ),
    **{
        name: ({"stats": [name]}, f"{name} has no gradient of logits")
        for name in ("reference_logprob", "reference_entropy", "max_logprob", "argmax")
    },
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_the_reason_for_two_sweeps(case: str) -> None:
    options, reason = REFUSALS[case]
    found = plan(**{"capability": 90, "columns": 151_936, **options})
    assert (found.kernel, found.reason) == ("two-sweep", f"two-sweep: {reason}")
    assert (found.cluster, found.stages) == TWO_SWEEP


@pytest.mark.parametrize(
    ("capability", "columns", "dtype", "labels", "cluster", "stages"),
    [
        (90, 151_936, BF16, 1, 4, 3), (90, 151_936, BF16, 64, 4, 3), (90, 151_936, BF16, 128, 4, 2),
        (90, 151_936, BF16, 1_024, 4, 2), (90, 151_936, FP32, 64, 8, 2), (90, 32_000, BF16, 64, 1, 3),
        (90, 262_144, BF16, 1_024, 8, 3), (120, 151_936, BF16, 64, 8, 2), (80, 151_936, BF16, 64, *TWO_SWEEP),
    ],
)  # fmt: skip
def test_cluster_and_stages_of_top_k_losses(
    capability: int, columns: int, dtype: dict[str, int], labels: int, cluster: int, stages: int
) -> None:
    """The outcomes have room beside the rows."""
    sizes = {**dtype, "teacher_bytes": 0}
    asked = {"stats": ["logprob", "tail_logprob"], "labels_per_row": labels, "topk_outcomes": labels + 1}
    found = plan(capability, columns, **sizes, **asked)
    assert (found.cluster, found.stages) == (cluster, stages), found.reason
    if stages:
        plain = plan(capability, columns, **sizes, stats=["entropy"])
        rows = found.stages * -(-columns // found.cluster // 64) * 64 * dtype["student_bytes"]
        assert found.shared_bytes >= rows + (8 + 2 * dtype["student_bytes"]) * labels
        assert found.shared_bytes <= compiled.cuda_target(capability).shared_bytes
        assert found.bytes == plain.bytes


@pytest.mark.parametrize("name", [s.name for s in STATISTICS.values() if s.builtin and s.kind != "tail"])
def test_every_statistic_of_the_student_is_one_read(name: str) -> None:
    """Those with a gradient of the logits, beside logprob and logsumexp; a new one is among them by itself."""
    statistic = STATISTICS[name]
    names = {name: None, "logprob": None, "logsumexp": None}
    expected = statistic.student and statistic.differentiable
    assert (plan(90, 151_936, stats=list(names)).kernel == "one-read") == expected


def test_per_token_parameters_matter_where_a_limit_is_another_divergence() -> None:
    refused = {
        name
        for name, s in STATISTICS.items()
        if s.is_divergence and s.builtin
        and plan(90, 151_936, stats=[name], token_parameters=True).kernel == "two-sweep"
    }  # fmt: skip
    assert refused == {"js", "alpha", "skew_kl", "skew_reverse_kl"}


def test_sweeps_and_bytes() -> None:
    table = ROWS * 151_936 * 2
    for found, sweeps, units in (
        (plan(90, 151_936), 2, 3),
        (plan(90, 151_936, stats=["js"]), 3, 3),
        (one_tensor(90, 151_936), 2, 2),
        # A sweep that starts when every row has gone by finds none of them in cache.
        (plan(80, 151_936), 2, 5),
        (plan(80, 151_936, stats=["js"]), 3, 7),
        (plan(80, 151_936, teacher_gradient=True), 2, 6),
        (plan(80, 151_936, student_gradient=False, stats=["js"]), 2, 4),
        (one_tensor(80, 151_936), 2, 3),
    ):
        assert (found.sweeps, found.bytes) == (sweeps, units * table), found.reason


@pytest.mark.parametrize(
    ("wish", "columns", "cluster", "stages"),
    [
        ("two-sweep", 151_936, *TWO_SWEEP), ("cluster=16", 151_936, 16, 4), ("cluster=16,stages=2", 151_936, 16, 2),
        ("stages=2,cluster=16", 151_936, 16, 2), ("stages=1", 151_936, 4, 1), ("stages=4", 151_936, 16, 4),
        ("cluster=2", 8_000, 2, 4), ("stages=2", 512, 1, 2), ("cluster=16", 1_024, 16, 4), ("", 151_936, 8, 3),
    ],
)  # fmt: skip
def test_the_environment_takes_the_choice(
    monkeypatch: pytest.MonkeyPatch, wish: str, columns: int, cluster: int, stages: int
) -> None:
    monkeypatch.setenv("KLDIV_CUDA_PLAN", wish)
    found = plan(90, columns)
    assert (found.cluster, found.stages) == (cluster, stages), found.reason
    assert ("KLDIV_CUDA_PLAN" in found.reason) == bool(wish)


def test_the_environment_changes_no_call_that_has_to_be_two_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KLDIV_CUDA_PLAN", "cluster=16,stages=4")
    assert "16 bytes" in plan(90, 151_936, aligned=False).reason
    assert "sm_80" in plan(80, 151_936).reason


@pytest.mark.parametrize(
    ("wish", "options", "message"),
    [
        ("cluster", {}, "expected two-sweep, or cluster=C,stages=S with either part left out"),
        ("one-read", {}, "expected two-sweep, or cluster=C,stages=S"),
        ("cluster=4,", {}, "expected two-sweep, or cluster=C,stages=S"),
        ("cluster=4,cluster=8", {}, "expected two-sweep, or cluster=C,stages=S"),
        ("cluster=4;stages=2", {}, "'4;stages=2' is no number of at least 1"),
        ("cluster=-4", {}, "'-4' is no number of at least 1"),
        ("stages=0", {}, "'0' is no number of at least 1"),
        ("stages=", {}, "'' is no number of at least 1"),
        ("cluster=3", {}, "expected a cluster of 1, 2, 4, 8 or 16"),
        ("stages=5", {}, "expected at most 4 stages"),
        ("cluster=16", {"capability": 120}, "sm_120 has clusters of at most 8"),
        ("cluster=8", {"columns": 256}, "256 columns leave a CTA of the cluster without any"),
        (
            "cluster=4,stages=2", {},
            "sm_90 has no shared memory for 2 row pairs of 151,936 columns in a cluster of 4",
        ),
        ("cluster=2", {}, "sm_90 has no shared memory for 1 row pair of 151,936 columns in a cluster of 2"),
        (
            "stages=2", {"capability": 120},
            "sm_120 has no shared memory for 2 row pairs of 151,936 columns in a cluster of at most 8",
        ),
    ],
)  # fmt: skip
def test_the_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, wish: str, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("KLDIV_CUDA_PLAN", wish)
    with pytest.raises(ValueError, match=re.escape(f"KLDIV_CUDA_PLAN is '{wish}': {message}")):
        plan(**{"capability": 90, "columns": 151_936, **options})


@pytest.mark.parametrize("capability", [0, 70, 75, 130, 900])
def test_no_target(capability: int) -> None:
    with pytest.raises(ValueError, match=f"serves sm_80 to sm_129, not sm_{capability}"):
        compiled.cuda_target(capability)


def test_a_target_not_named_gets_the_least_of_its_generation() -> None:
    for capability, like in ((88, 86), (87, 80), (101, 100), (121, 120), (110, 120)):
        target = compiled.cuda_target(capability)
        assert (target.shared_bytes, target.largest_cluster) == TARGETS[like]


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
