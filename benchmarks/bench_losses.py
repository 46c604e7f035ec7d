"""Loss + dlogits under pytest-benchmark: `pytest benchmarks/ --benchmark-only`.

The cases and implementations are those of `kldiv bench`, which times them in turns, beside a copy, and measures
memory; use this for pytest-benchmark's own statistics, its comparisons between commits and its histograms.
"""

from __future__ import annotations

from functools import partial

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from kldiv_kernels.benchmarking import measure, peers
from kldiv_kernels.benchmarking.cases import Case

_ROUNDS = 5


def bench_loss_and_gradient(benchmark: BenchmarkFixture, case: Case, implementation: str) -> None:
    try:
        loss = peers.build(implementation, case)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    inputs = case.inputs()
    benchmark.group = case.name
    benchmark.extra_info.update(rows=case.rows, vocab=case.vocab, floor_bytes=case.floor_bytes)

    def setup() -> None:
        inputs.forget_gradients()
        peers.prepare(loss, inputs)

    value = benchmark.pedantic(
        partial(measure.loss_and_gradient, loss, inputs), setup=setup, rounds=_ROUNDS, warmup_rounds=1
    )
    assert value.isfinite()
    # The multiplications alone have none.
    if implementation != peers.GEMMS:
        assert inputs.student.grad is not None
        assert inputs.student.grad.any()
