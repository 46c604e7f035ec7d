"""The tables of `make gpu-check`: bytes of main memory, clusters, and speed against what is promised."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kldiv_kernels.benchmarking import gpu_cases

FOLDER = str(Path(__file__).resolve().parents[2] / "benchmarks")
sys.path.insert(0, FOLDER)
import gpu_check_report  # noqa: E402
import gpu_check_tools  # noqa: E402

sys.path.remove(FOLDER)

NCU = """\
==PROF== Connected to process 7 (/usr/bin/python3.12)
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"Section Name","Metric Name","Metric Unit","Metric Value"
"""


def _profiled(*kernels: tuple[str, int, int, int]) -> str:
    rest = '"1","7","(576, 1, 1)","(128, 1, 1)","0","9.0","Command line profiler metrics"'
    return NCU + "".join(
        f'"{i}","7","python3.12","127.0.0.1","{name}",{rest},"{metric}","byte","{value:,}"\n'
        for i, (name, *values) in enumerate(kernels)
        for metric, value in zip(gpu_check_tools.METRICS, values, strict=True)
    )


def test_bytes_of_main_memory() -> None:
    """ncu's kernels are those of the calls between the marks."""
    text = _profiled(
        ("spin_kernel(long)", 0, 32, 900), ("void one_read<ForwardKl, 1>(OneReadArguments)", 2_040, 990, 1_980_000),
        ("fill", 0, 0, 1_000), ("spin_kernel(long)", 0, 0, 900), ("sweep", 4_000, 0, 2_000_000),
    )  # fmt: skip
    calls = [
        {"case": "forward_kl", "rows": 1, "vocab": 2, "backend": "cuda", "floor_bytes": 3_000, "planned": 3_000},
        {"case": "js", "rows": 1, "vocab": 2, "backend": "triton", "floor_bytes": 2_000, "planned": None},
    ]
    first, second = gpu_check_tools.by_call(gpu_check_tools.kernels_of(text), calls)
    assert (first["bytes"], first["over_floor"], second["over_floor"]) == (3_030, 1.01, 2)
    assert [kernel["milliseconds"] for kernel in first["kernels"]] == [1.98, 0.001]
    lines = gpu_check_report.dram_lines([first, second], gpu_check_tools.REACH)
    assert "cuda forward_kl" in lines[0]
    assert "1.010× (within 1.05)" in lines[0]
    assert "2.000× (above 1.05)" in lines[1]
    with pytest.raises(ValueError, match="2 marks for 1 calls"):
        gpu_check_tools.by_call(gpu_check_tools.kernels_of(text), calls[:1])
    with pytest.raises(ValueError, match="no line"):
        gpu_check_tools.kernels_of("==ERROR== no counters")


def test_the_table_of_clusters() -> None:
    shape = {"vocab": 32_000, "tensors": 2, "cluster": 2, "stages": 3, "shared_bytes": 204_800, "clusters": 66}
    assert gpu_check_report.cluster_lines({"shapes": [shape, {**shape, "cluster": 4, "clusters": 32}]}) == [
        "clusters for 2 bf16 rows of 32000: 2×3 (200 KiB): 66, 4×3 (200 KiB): 32"
    ]
    assert gpu_check_report.cluster_lines({}) == []


def _row(implementation: str, milliseconds: float | None, **changes: object) -> dict[str, object]:
    case = {
        "case": "logprob_entropy forward", "kind": "logprob_entropy", "rows": gpu_cases.ROWS,
        "copy_gb_per_second": 4200.0,
    }  # fmt: skip
    return {"implementation": implementation, "milliseconds": milliseconds, "vocab": gpu_cases.VOCAB, **case, **changes}


def test_targets_are_about_one_backend_on_the_promised_gpu() -> None:
    rows = [_row("triton", 0.7), _row("cuda", 0.6), _row("trl", 0.61), _row("eager", 0.1), _row("liger", None)]
    known = {"case": "logprob_entropy known"}
    other_shape = [_row("triton", 0.9, vocab=32_000), _row("trl", 0.5, vocab=32_000)]

    def verdicts(measured: list[dict[str, object]], device: str) -> dict[str, object]:
        found = gpu_cases.targets(measured, ["triton", "cuda"], device)
        return {target["target"].partition(" at ")[0]: target["met"] for target in found if target["met"] is not None}

    trl = "logprob and entropy: time of the best of ours / time of TRL's kernel, on any shape"
    assert verdicts(rows, "NVIDIA H200") == {"triton: logprob_entropy forward": True, trl: True}
    assert verdicts(rows, "NVIDIA A100") == {trl: True}
    assert verdicts([*rows, *other_shape], "NVIDIA H200")[trl] is False
    assert verdicts([_row("cuda", 1.31, **known)], "NVIDIA H200") == {"cuda: logprob_entropy known": False}
    assert verdicts([_row("triton", 1.2, **known)], "NVIDIA H200") == {}


def test_shares_of_the_copy_bandwidth_of_the_same_run() -> None:
    """time ≤ bytes / (0.9 × copy), on an H100 as on an H200; a table without verdict says why there is none."""
    unit = gpu_cases.ROWS * gpu_cases.VOCAB * 2 / 3000e9 * 1e3  # ms a pass at 3 TB/s
    slower = {"copy_gb_per_second": 3000.0, "kind": "forward_kl", "case": "forward_kl"}

    def found(device: str, *rows: dict[str, object]) -> dict[str, tuple[object, object]]:
        out = gpu_cases.targets(rows, ["triton", "cuda"], device)
        return {t["target"].partition(" at ")[0]: (t["met"], t["share_met"]) for t in out if t["measured"]}

    for share, kept in ((0.91, True), (0.89, False)):
        row = _row("cuda", 3 * unit / share, **slower)
        assert found("NVIDIA H100 80GB HBM3", row) == {"cuda: forward_kl": (None, kept)}
        # 2.7 ms is too long for an H200, however fast this one copies.
        assert found("NVIDIA H200", row) == {"cuda: forward_kl": (False, kept)}
        assert found("NVIDIA A100", row) == {"cuda: forward_kl": (None, None)}
        # Triton's loss sweeps both rows twice and writes once: five passes.
        row = _row("triton", 5 * unit / share, **slower)
        assert found("NVIDIA H100 80GB HBM3", row) == {"triton: forward_kl": (None, kept)}
        one = _row("triton", unit / share, copy_gb_per_second=3000.0)
        assert found("NVIDIA H100 80GB HBM3", one) == {"triton: logprob_entropy forward": (None, kept)}
    js = _row("cuda", 3 * unit / 0.8, **{**slower, "kind": "js", "case": "js"})
    assert found("NVIDIA H100 80GB HBM3", js) == {"cuda: js": (None, True)}, "its arithmetic takes a part of it"
    content = {"rows": [], "left_out": [], "ours": []}
    for device, told in (("NVIDIA H100", "  91% of copying, of 90%: met"), ("NVIDIA A100", "  no verdict")):
        row = _row("cuda", 3 * unit / 0.91, **slower)
        shown = {"extra_bytes": None, "call_milliseconds": None, "floor_milliseconds": None, "share_of_copy": None}
        row |= {**shown, "useful_gb_per_second": 1.0}
        lines = gpu_check_report.benchmark_lines(
            {**content, "rows": [row], "ours": ["cuda"], "targets": gpu_cases.targets([row], ["cuda"], device)}
        )
        assert next(line for line in lines if line.startswith("cuda: forward_kl at")).endswith(told)


def test_the_six_cases_of_the_default_run() -> None:
    """Cases of the whole benchmark, fewer peers; each of them has a promise."""
    first = gpu_cases.first_cases()
    assert len(first) == 6
    names = {(case.name, case.rows, case.vocab) for case in gpu_cases.cases()}
    promised = {(promise.case.name, promise.case.rows, promise.case.vocab) for promise in gpu_cases.PROMISES}
    for case in first:
        assert (case.name, case.rows, case.vocab) in names & promised
        assert not case.compiled, "it takes 20 seconds a case"


def test_every_promise_is_measured() -> None:
    cases = gpu_cases.cases()
    for promise in gpu_cases.PROMISES:
        assert any(
            (c.name, c.rows, c.vocab) == (promise.case.name, promise.case.rows, promise.case.vocab) for c in cases
        )
        # The floor is that of the bytes at 4.3 TB/s, what copying reaches there; js has arithmetic to do beside them.
        assert promise.floor == pytest.approx(promise.case.floor_bytes / 4.3e9, rel=0.05)
        assert promise.reach > promise.floor


def test_losses_from_hidden_states_stand_beside_their_multiplications() -> None:
    cases = gpu_cases.cases()
    for ratio in gpu_cases.RATIOS:
        case = ratio.case
        assert case in cases
        rows = [
            {"case": case.name, "kind": case.kind, "rows": case.rows, "vocab": case.vocab, "implementation": name,
             "milliseconds": time, "copy_gb_per_second": 3000.0}
            for name, time in (("gemms", 40.0), ("triton", 60.0), ("cuda", 44.0), ("trl", 30.0))
        ]  # fmt: skip
        for measured, verdict in ((rows, (pytest.approx(1.1), ratio.bound >= 1.1)), (rows[1:], (None, None))):
            targets = gpu_cases.targets(measured, ["triton", "cuda"], "NVIDIA H100")
            found = [t for t in targets if f" {case.name} at" in t["target"]]
            assert [(t["measured"], t["met"]) for t in found] == [verdict]


def test_the_floor_of_a_case() -> None:
    units = {case.name: case.floor_units for case in gpu_cases.cases()}
    assert units["forward_kl"] == units["js"] == 3
    assert units["forward_kl forward"] == units["logprob_entropy"] == units["logprob_entropy known"] == 2
    assert units["logprob_entropy forward"] == 1
    assert gpu_cases.GpuCase("js", 4, 10).floor_bytes == 3 * 4 * 10 * 2
    assert gpu_cases.GpuCase("linear_js", 4, 10).floor_bytes == 0
    assert len(set(gpu_cases.cases())) == len(gpu_cases.cases())
