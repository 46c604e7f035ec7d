"""Launch plans: of any architecture, without a GPU. The launcher of the cuda backend follows the same code."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from cuda_plans import BF16, FP32, ROWS, TWO_SWEEP, compiled, one_tensor, plan

from kldiv_kernels.registry import STATISTICS

pytestmark = pytest.mark.usefixtures("no_cuda_plan")
# What a block may have, and the largest cluster.
TARGETS = {80: (166_912, 1), 86: (101_376, 1), 90: (232_448, 16), 100: (232_448, 16), 120: (101_376, 8)}


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
    **{
        name: ({"stats": [name]}, f"{name} has no one-read kernel") for name in ("tail_logprob", "untempered_logprob")
    },
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


@pytest.mark.parametrize("name", [s.name for s in STATISTICS.values() if s.builtin and s.tempered and s.kind != "tail"])
def test_every_statistic_of_the_student_is_one_read(name: str) -> None:
    """Those with a gradient of the logits at the temperature, beside logprob and logsumexp; a new one is among them."""
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


@pytest.mark.parametrize("capability", [0, 70, 75, 130, 900])
def test_no_target(capability: int) -> None:
    with pytest.raises(ValueError, match=f"serves sm_80 to sm_129, not sm_{capability}"):
        compiled.cuda_target(capability)


def test_a_target_not_named_gets_the_least_of_its_generation() -> None:
    for capability, like in ((88, 86), (87, 80), (101, 100), (121, 120), (110, 120)):
        target = compiled.cuda_target(capability)
        assert (target.shared_bytes, target.largest_cluster) == TARGETS[like]
