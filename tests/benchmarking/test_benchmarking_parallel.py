"""The benchmarks of losses in several processes: one loss and its gradients, what is sent, the tables."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import distributed
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))

import ranks

from kldiv_kernels import cli
from kldiv_kernels.benchmarking import cases, measure, parallel, peers, report
from kldiv_kernels.benchmarking.cases import PARALLEL_KINDS, Case


def case_both_compute_the_loss_of_whole_rows(rank: int, world: int) -> None:
    for kind in PARALLEL_KINDS:
        case = Case(kind, torch.float32, rows=16, vocab=334)
        whole = case.inputs()
        alone = Case(case.loss, case.dtype, case.rows, case.vocab)
        expected = measure.loss_and_gradient(peers.build("eager", alone), whole)
        assert whole.student.grad is not None
        for name in peers.names_for(case):
            inputs = parallel.columns(case, rank)
            value = measure.loss_and_gradient(parallel.build(name, case, rank), inputs)
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
            assert inputs.student.grad is not None
            part = whole.student.grad[:, rank * 167 : (rank + 1) * 167]
            assert part.abs().max() > 0
            error = (inputs.student.grad - part).abs().max() / whole.student.grad.abs().max()
            assert error < 1e-4, (name, error)
    assert distributed.get_world_size() == world


def test_both_compute_the_loss_of_whole_rows() -> None:
    failed = ranks.run(2, __name__)
    assert not any(failed.values()), failed


def test_command(tmp_path: Path) -> None:
    options = [
        "bench",
        "--kinds",
        "parallel",
        "--dtypes",
        "bf16",
        "--rows",
        "8",
        "--vocab",
        "2000",
        "--repeats",
        "2",
        "--output",
    ]
    done = CliRunner().invoke(cli.app, [*options, str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "times.png").stat().st_size > 0
    written = json.loads((tmp_path / "results.json").read_text())["cases"]
    assert [case["kind"] for case in written] == list(PARALLEL_KINDS)
    for case in written:
        ours, gather = case["implementations"]
        assert (ours["name"], gather["name"], case["processes"]) == (peers.OURS, peers.GATHER, 2)
        assert 0 < ours["sent_bytes_per_row"] <= 256
        # Half of the rows, of student and teacher.
        tensors = 2 if case["kind"] in ("parallel_forward_kl", "parallel_js") else 1
        assert gather["sent_bytes_per_row"] == tensors * 2000
        assert all(len(one["all_seconds"]) == 2 for one in (ours, gather))
        assert ours["loss"] == pytest.approx(gather["loss"], rel=1e-3)


def test_table_and_targets() -> None:
    case = Case("parallel_js", torch.bfloat16)
    ours = measure.Result(peers.OURS, [0.1], sent_bytes_per_row=256.0)
    gather = measure.Result(peers.GATHER, [0.2], sent_bytes_per_row=303_872.0)
    result = measure.CaseResult(case, [ours, gather], 1e10)
    assert [(target.against, value) for target, value in result.targets()] == [("gather", 2.0), ("sent", 64.0)]
    assert all(target.met(value) for target, value in result.targets() if value is not None)
    assert not case.targets[0].met(1.4)
    assert not case.targets[1].met(65)
    console = Console(file=io.StringIO(), width=80)
    console.print(report.times_table([result]))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in printed
    for word in ("100.0", "200.0", "2.0 ×", "75,968", "gathered logits", "check the arguments"):
        assert word in printed, printed
    with pytest.raises(ValueError, match="vocab is 13; expected a multiple of 2"):
        cases.cases(("parallel",), (torch.bfloat16,), 4, 13)
