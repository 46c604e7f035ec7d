"""The benchmarks compare like with like, and their memory and targets mean what they say."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import unreadable
from rich.console import Console

from kldiv_kernels.benchmarking import cases, gpu_plot, measure, memory, peers, plot, report
from kldiv_kernels.benchmarking.cases import GRPO, LOGPROB_ENTROPY, TOPK, TOPK_FROM_LOGITS, Case, Target
from kldiv_kernels.benchmarking.defaults import DEFAULT_HIDDEN, DEFAULT_KINDS
from kldiv_kernels.benchmarking.memory import PeakMemory

ROOT = Path(__file__).resolve().parents[2]
KINDS = (
    "forward_kl", "reverse_kl", "jeffreys", "js", "hellinger", "tvd", LOGPROB_ENTROPY, GRPO, TOPK, TOPK_FROM_LOGITS,
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_implementation_computes_the_same_loss_and_gradient(kind: str) -> None:
    case = Case(kind, torch.float32, rows=5, vocab=333)
    found = {}
    # What a top-k loss is held against is another loss.
    for name in set(peers.names_for(case, ("eager", "trl"))) - {peers.LOGPROB}:
        if name == "trl":
            pytest.importorskip("trl")
        inputs = case.inputs()
        loss = peers.build(name, case)
        peers.prepare(loss, inputs)
        value = measure.loss_and_gradient(loss, inputs)
        found[name] = value.detach(), inputs.logits.grad
    ours, gradient = found[peers.OURS]
    assert gradient is not None
    assert gradient.abs().max() > 0
    assert "eager" in found
    # The others take the rest of the k tokens from 1, which leaves it fewer digits.
    tolerance = 1e-4 if kind in (TOPK, TOPK_FROM_LOGITS) else 1e-5
    for loss, other in found.values():
        torch.testing.assert_close(loss, ours, rtol=tolerance, atol=1e-6)
        largest = gradient.abs().max().item()
        torch.testing.assert_close(other, gradient, rtol=10 * tolerance, atol=0.1 * tolerance * largest + 1e-8)


def test_inputs_repeat_and_have_a_realistic_spread() -> None:
    case = Case("js", torch.bfloat16, rows=4, vocab=5000)
    first, second = case.inputs(), case.inputs()
    assert first.reference is not None
    assert torch.equal(first.logits, second.logits)
    assert not torch.equal(first.logits, first.reference)
    assert first.logits.float().std().item() == pytest.approx(3, rel=0.05)


def test_targets_are_promised_at_one_shape_and_judged_by_their_direction() -> None:
    assert Case("forward_kl", torch.bfloat16, rows=16).targets == ()
    targets = {target.against: target for target in Case("forward_kl", torch.bfloat16).targets}
    assert {name: target.bound for name, target in targets.items() if name != "memory"} == {
        "compile": 5, "eager": 20, "copy": 2.2,
    }  # fmt: skip
    assert targets["eager"].met(20.5)
    assert not targets["eager"].met(19.5)
    assert targets["copy"].met(2.1)
    assert not targets["copy"].met(2.3)


def test_measured_ratios() -> None:
    case = Case("forward_kl", torch.float32, rows=256)
    ours = measure.Result(peers.OURS, [2.0, 1.0, 9.0], memory=PeakMemory(case.unit_bytes * 2))
    eager = measure.Result("eager", [30.0])
    result = measure.CaseResult(case, [ours, eager, measure.Result("trl", error="not there")], case.floor_bytes / 0.5)
    assert ours.median == 2
    assert result.times_copy(ours) == pytest.approx(4)
    assert result.speedup(eager) == pytest.approx(15)
    values = {target.against: value for target, value in result.targets()}
    assert values == {"compile": None, "eager": pytest.approx(15), "copy": pytest.approx(4), "memory": pytest.approx(2)}
    assert result["trl"] is None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_is_measured() -> None:
    # Eager in bf16 makes several fp32 tensors of two units each: well above the one unit of the gradient.
    case = Case("forward_kl", torch.bfloat16, rows=64, vocab=50_000)
    eager = memory.measure_in_subprocess(case, "eager", threads=1)
    assert eager.reason == ""
    assert eager.extra_bytes is not None
    assert 6 < eager.extra_bytes / case.unit_bytes < 30


def test_memory_says_why_it_is_unknown() -> None:
    found = memory.measure_in_subprocess(Case("no_such_kind", torch.bfloat16, rows=2, vocab=8), peers.OURS, threads=1)
    assert found.extra_bytes is None
    assert "no_such_kind" in found.reason


RECORDS = sorted((ROOT / "benchmarks" / "results").glob("*-2-cores-*.json"))


def _as_measured(record: dict[str, Any]) -> list[measure.CaseResult]:
    return [
        measure.CaseResult(
            Case(
                case["kind"],
                cases.dtype(case["dtype"]),
                case["rows"],
                case["vocab"],
                case.get("hidden") or DEFAULT_HIDDEN,
            ),
            [
                measure.Result(one["name"], one["all_seconds"], memory=PeakMemory(one["peak_extra_bytes"]))
                for one in case["implementations"]
            ],
            case["copy_gb_per_second"] * 1e9,
        )
        for case in record["cases"]
    ]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_plots_and_tables_of_recorded_runs_can_be_read(path: Path) -> None:
    record = json.loads(path.read_text())
    assert unreadable(plot.draw(record)) == []
    printed = io.StringIO()
    Console(file=printed, width=80).print(report.times_table(_as_measured(record)))
    text = " ".join(printed.getvalue().split())
    assert "…" not in text, "cut off in a terminal of 80 columns"
    assert report.EXPLANATION in text
    for words in ("(ms) core copy (× logits)", "faster by"):
        assert words in text
    for case in record["cases"]:
        for one in case["implementations"]:
            assert f"{peers.LABELS.get(one['name'], one['name'])} {one['seconds'] * 1e3:,.1f}" in text


def test_a_plot_leaves_out_what_failed_and_keeps_colours() -> None:
    record = json.loads(next(path for path in RECORDS if path.stem.endswith("topk")).read_text())
    failed = copy.deepcopy(record)
    failed["cases"][0]["implementations"][2] = {"name": "eager", "error": "no"}
    for shown, bars in ((record, 16), (failed, 15)):
        assert len(plot.draw(shown).axes[0].patches) == bars
    colours = {plot.COLOURS[one["name"]] for case in record["cases"] for one in case["implementations"]}
    assert len(colours) == 5


def test_the_plot_of_a_gpu_can_be_read_with_every_implementation() -> None:
    names = ("cuda", "triton", "eager", "compile", "trl", "liger", "liger-grpo")
    shapes = ((4096, 32_000), (8192, 128_256), (8192, 151_936))
    rows = [
        {"case": case, "implementation": name, "rows": n, "vocab": v, "milliseconds": 123.4 * (1 + k), "floor": "3u",
         "share_of_copy": 0.5 / (1 + k)}
        for case in ("forward_kl", "grpo", "js") for n, v in shapes for k, name in enumerate(names)
    ]  # fmt: skip
    assert unreadable(gpu_plot.draw(rows, "some GPU, PyTorch 2.13.0, Triton 3.6.0")) == []
    assert unreadable(gpu_plot.draw(rows[: len(rows) // 3], "some GPU, PyTorch 2.13.0, Triton 3.6.0")) == []


@pytest.mark.parametrize("target", [Target("copy", 2), Target("eager", 2), Target("memory", 2)])
def test_a_target_says_its_direction(target: Target) -> None:
    assert target.text().startswith("≤" if target.at_most else "≥")


def test_pytest_benchmark_runs_the_same_cases() -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "benchmarks", "--benchmark-disable", "--rows=2", "--vocab=64",
            "--peers=eager", "--dtypes=fp32", "-p", "no:cacheprovider",
        ],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "300"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    expected = sum(len(peers.names_for(Case(kind, torch.float32), ("eager",))) for kind in DEFAULT_KINDS)
    assert f"{expected} passed" in done.stdout
