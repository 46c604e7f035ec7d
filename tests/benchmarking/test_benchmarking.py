"""The benchmarks compare like with like, and their memory and targets mean what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kldiv_kernels.benchmarking import cases, measure, memory, peers
from kldiv_kernels.benchmarking.cases import GRPO, LOGPROB_ENTROPY, TOPK, TOPK_FROM_LOGITS, Case, Target
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
        value = measure.loss_and_gradient(peers.build(name, case), inputs)
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
    assert f"{2 * len(cases.DEFAULT_KINDS)} passed" in done.stdout
