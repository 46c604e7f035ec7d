"""Options of the benchmarks; the same as those of `kldiv bench`, which runs the same cases."""

from __future__ import annotations

import pytest

from kldiv_kernels.benchmarking import cases, defaults, peers


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kldiv_kernels")
    group.addoption("--rows", type=int, default=defaults.DEFAULT_ROWS, help="tokens, N")
    group.addoption("--vocab", type=int, default=defaults.DEFAULT_VOCAB, help="columns, V")
    group.addoption("--hidden-size", type=int, help="width of hidden states, H, for linear_ kinds")
    group.addoption("--kinds", default=",".join(defaults.DEFAULT_KINDS), help="comma-separated divergences")
    group.addoption("--dtypes", default="bf16,fp32", help="comma-separated: bf16, fp32, fp16")
    group.addoption("--peers", default=",".join(peers.PEERS), help="comma-separated: eager, compile, trl; or none")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    chosen = cases.cases(
        tuple(option("kinds").split(",")),
        tuple(cases.dtype(name) for name in option("dtypes").split(",")),
        option("rows"),
        option("vocab"),
        option("hidden_size"),
    )
    asked = tuple(option("peers").split(","))
    pairs = [(case, name) for case in chosen for name in peers.names_for(case, asked)]
    metafunc.parametrize(("case", "implementation"), pairs, ids=[f"{case.name}-{name}" for case, name in pairs])
