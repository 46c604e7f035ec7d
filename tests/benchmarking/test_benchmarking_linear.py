"""The benchmarks of losses from hidden states: one loss, the same multiplications, and tables without a copy."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import unreadable
from rich.console import Console
from typer.testing import CliRunner

from kldiv_kernels import cli
from kldiv_kernels.benchmarking import cases, measure, memory, peers, plot, report, run
from kldiv_kernels.benchmarking.cases import LINEAR_KINDS, Case, Inputs
from kldiv_kernels.linear import Gemm

# Of the loss, and of the gradients relative to their largest; bfloat16 rounds the logits of all but ours and one of
# TRL's functions, and the gradients of all.
TOLERANCES = {torch.float32: (1e-5, 2e-5), torch.bfloat16: (2e-3, 4e-2)}


def _in_float32(inputs: Inputs) -> Inputs:
    def wide(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.detach().float().requires_grad_(tensor.requires_grad)

    return replace(
        inputs, student=wide(inputs.student), reference=wide(inputs.reference), weight=wide(inputs.weight),
        reference_weight=wide(inputs.reference_weight),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCES, ids=cases.dtype_name)
@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_every_implementation_computes_the_same_loss_and_gradients(kind: str, dtype: torch.dtype) -> None:
    case = Case(kind, dtype, rows=16, vocab=333, hidden=24)
    of_loss, of_gradients = TOLERANCES[dtype]
    exact = _in_float32(case.inputs())
    expected = measure.loss_and_gradient(peers.build("eager", case), exact)
    names = peers.names_for(case, ("eager", "trl"))
    assert names == [peers.OURS, peers.GEMMS, "eager", "trl"]
    for name in set(names) - {peers.GEMMS}:
        if name == "trl":
            pytest.importorskip("trl")
        inputs = case.inputs()
        value = measure.loss_and_gradient(peers.build(name, case), inputs)
        torch.testing.assert_close(value.float(), expected, rtol=of_loss, atol=1e-6)
        for leaf, true in ((inputs.student, exact.student), (inputs.weight, exact.weight)):
            assert true.grad.abs().max() > 0
            assert leaf.grad.dtype == dtype
            error = (leaf.grad.float() - true.grad).abs().max() / true.grad.abs().max()
            assert error < of_gradients, (name, error)


def test_logits_of_hidden_states_have_a_realistic_spread() -> None:
    inputs = Case("linear_js", torch.bfloat16, rows=8, vocab=2000, hidden=64).inputs()
    for hidden, weight in ((inputs.student, inputs.weight), (inputs.reference, inputs.reference_weight)):
        assert (hidden.float() @ weight.float().T).std().item() == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=cases.dtype_name)
@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_the_multiplications_alone_are_those_of_ours(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: Counter[tuple[Any, ...]] = Counter()

    def counted(name: str) -> Any:
        method = getattr(Gemm, name)

        def multiply(self: Gemm, *arguments: Any) -> None:
            done[(name, *(x.shape if isinstance(x, torch.Tensor) else x for x in arguments))] += 1
            method(self, *arguments)

        return multiply

    for name in ("logits", "times_weight", "add_outer"):
        monkeypatch.setattr(Gemm, name, counted(name))
    case = Case(kind, dtype, rows=1100, vocab=40, hidden=8)  # two chunks
    found = []
    for name in (peers.OURS, peers.GEMMS):
        inputs = case.inputs()
        done.clear()
        measure.loss_and_gradient(peers.build(name, case), inputs)
        found.append(dict(done))
        assert [(x.grad.shape, x.grad.dtype) for x in (inputs.student, inputs.weight)] == [
            ((1100, 8), dtype), ((40, 8), dtype),
        ]  # fmt: skip
    assert found[0] == found[1]
    assert found[0]["times_weight", torch.Size((550, 40)), torch.Size((550, 8))] == 2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_knows_the_hidden_size() -> None:
    # The gradient of the weight is four times as large as the logits; it is summed in float32 and rounded.
    case = Case("linear_grpo", torch.bfloat16, rows=512, vocab=8192, hidden=2048)
    extra = memory.measure_in_subprocess(case, peers.GEMMS, threads=1)
    assert extra.reason == ""
    assert extra.extra_bytes is not None
    assert 12 < extra.extra_bytes / case.unit_bytes < 40


def test_promises_are_made_at_one_shape() -> None:
    for kind in LINEAR_KINDS:
        promised = {target.against: target for target in Case(kind, torch.bfloat16, rows=1024).targets}
        assert promised.keys() == {"gemms", "trl", "eager"}
        assert promised["gemms"].met(1.1)
        assert not promised["gemms"].met(1.2)
        assert promised["gemms"].text() == "≤ 1.15 × the multiplications' time"
        assert Case(kind, torch.bfloat16, rows=1024, hidden=1024).targets == ()


def _recorded(names: tuple[str, ...]) -> list[measure.CaseResult]:
    """A run as slow as one of 1,024 tokens."""
    return [
        measure.CaseResult(
            Case(kind, torch.bfloat16, rows=1024),
            [
                measure.Result(name, [(1 + k) * 1.2345 + 10 * (name == "trl")], memory=memory.PeakMemory(10**9))
                for k, name in enumerate(names)
            ],
            20e9,
        )
        for kind in LINEAR_KINDS
    ]


@pytest.mark.parametrize("count", [2, 5])
def test_a_recorded_run_can_be_drawn_and_tabulated(count: int) -> None:
    results = _recorded((peers.OURS, peers.GEMMS, *peers.PEERS)[:count])
    record = {
        "cases": [json.loads(json.dumps(run.as_json(result))) for result in results],
        "machine": {"cpu": "Intel(R) Xeon(R) Processor", "threads": 2, "torch": "2.13.0+cpu"},
    }
    first = record["cases"][0]
    assert first["hidden"] == 512
    assert first["plan"]["rows_per_chunk"] > 0
    assert {first[name] for name in ("floor", "floor_bytes", "floor_seconds")} == {None}
    assert first["implementations"][0]["times_copy"] is None
    assert first["targets"][0]["measured"] == pytest.approx(0.5)
    figure = plot.draw(record)
    assert unreadable(figure) == []
    assert "copying the same bytes" not in figure.axes[0].get_legend_handles_labels()[1]
    printed = io.StringIO()
    Console(file=printed, width=80).print(report.times_table(results))
    text = " ".join(printed.getvalue().split())
    assert "…" not in text, "cut off in a terminal of 80 columns"
    assert f"{report.EXPLANATION} {report.FROM_HIDDEN}" in text
    assert "the multiplications alone 2,469.0" in text

    pytest.importorskip("sphinx")
    sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "_ext"))
    import benchmark_tables

    header, (row, *_) = benchmark_tables.cells([record])
    assert header[:3] == ["case", "kldiv_kernels", "the multiplications alone"]
    assert "".join(node.astext() for node in row[0]) == "linear_forward_kl bf16, 1,024 × 151,936 × 512"
    assert row[1:3] == ["1234 ms", "2469 ms (2.0×)"]
    assert row[header.index("× copy")] == ""


def test_the_command_measures_them_and_refuses_an_option_that_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The copy is not what is tested.
    monkeypatch.setattr(measure, "_LEAST_COPY_BYTES", 1 << 20)
    monkeypatch.setattr(measure.machine, "last_level_cache_bytes", lambda: 0)

    def invoke(*arguments: str) -> Any:
        return CliRunner().invoke(
            cli.app,
            ["bench", "--rows", "3", "--vocab", "64", "--hidden-size", "8", "--repeats", "2", "--dtypes", "fp32",
             "--peers", "eager", "--no-memory", "--output", str(tmp_path), *arguments],
            env={"COLUMNS": "300"},
        )  # fmt: skip

    refused = invoke("--kinds", "forward_kl")
    assert refused.exit_code == 2
    assert "--hidden-size" in refused.output
    assert "8, and no kind begins at hidden states; expected one of linear_forward_kl, " in refused.output
    done = invoke("--kinds", "forward_kl,linear_js")
    assert done.exit_code == 0, done.output
    logits, hidden = json.loads((tmp_path / "results.json").read_text())["cases"]
    assert (logits["hidden"], hidden["hidden"]) == (None, 8)
    assert logits["implementations"][0]["times_copy"] > 0
    losses = {one["name"]: one["loss"] for one in hidden["implementations"]}
    assert losses[peers.OURS] == pytest.approx(losses["eager"], rel=1e-5)
