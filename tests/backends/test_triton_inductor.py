"""What Inductor prints of the Triton kernels: it compiles, copies no logits, and tells users' kernels apart.

There need be no GPU: see absent_gpu.py. Kernels are compiled ahead of time.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import INTERPRETED
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
if INTERPRETED:
    pytest.skip("under TRITON_INTERPRET=1 there is no kernel for torch.compile to see", allow_module_level=True)

import triton
import triton.language as tl
from absent_gpu import TARGET, pair, traced_for_a_gpu
from torch._inductor.graph import GraphLowering
from triton.compiler import ASTSource

import kldiv_kernels as kk
from kldiv_kernels.backends.triton import ops as traced
from kldiv_kernels.registry import STATISTICS

EVERY = list(STATISTICS)
STEEPNESS = tl.constexpr(3.0)


# Names that the package's kernels use too: Inductor prints all functions into one file.
@triton.jit
def expm1(x):
    return tl.exp(x) * STEEPNESS


@triton.jit
def log(logp, logq, alpha):
    return expm1(logp + logq) * alpha


@triton.jit
def kl_term(logp, logq):
    return expm1(logq) * logp


@pytest.fixture(autouse=True)
def _on_a_gpu_that_is_not_there(tmp_path: Path) -> Iterator[None]:
    with traced_for_a_gpu(tmp_path / "triton"):
        yield


class CodeWritten(Exception):  # noqa: N818
    """In the place of loading the code that Inductor wrote, which wants a GPU."""


def _written_by_inductor(function: Callable[..., Tensor], *arguments: Any) -> str:
    written = []

    def keep(graph: GraphLowering) -> None:
        code = graph.codegen()[0]
        written.append(getattr(code, "value", code))
        raise CodeWritten

    settings = {"force_disable_caches": True, "compile_threads": 1}
    with pytest.MonkeyPatch.context() as patch, torch._inductor.config.patch(settings):
        patch.setattr(GraphLowering, "compile_to_module", keep)
        with pytest.raises(Exception, match="CodeWritten"):
            torch.compile(function, fullgraph=True)(*arguments)
    (code,) = written
    return str(code)


def _kernels(code: str) -> list[str]:
    """The source text of the kernels in the code."""
    return [
        ast.literal_eval(node.args[1])
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "async_compile.triton"
    ]


def _compile_printed(source: str, folder: Path) -> str:
    """Import the text as a module of its own, as Inductor does, and compile its kernel for a GPU. Returns its name."""
    path = folder / f"printed_{len(list(folder.iterdir()))}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (kernel,) = (x for x in vars(module).values() if hasattr(x, "triton_meta"))
    meta = kernel.triton_meta
    source_of_kernel = ASTSource(kernel.fn, meta["signature"], meta["constants"], meta["configs"][0])
    compiled = triton.compile(source_of_kernel, target=TARGET, options={"num_warps": kernel.configs[0].num_warps})
    # A number that torch.compile passes on is float64: none may meet the logits.
    assert not [line for line in compiled.asm["ttir"].splitlines() if "f64" in line and "tt.func" not in line]
    return str(kernel.fn.__name__)


def _statistics(*names: str) -> Callable[..., Tensor]:
    def function(student: Tensor, reference: Tensor) -> Tensor:
        labels = torch.zeros(student.shape[0], 2, dtype=torch.int64)
        stats = kk.token_stats(
            student, reference, labels, stats=names, backend="triton", exclude=labels[:, 0], vocab_size=990,
            temperature=torch.ones(student.shape[0]),
        )  # fmt: skip
        total = sum(value.float().sum() for value in stats.values())
        assert isinstance(total, Tensor)
        return total

    return function


def _loss(kind: str) -> Callable[..., Tensor]:
    return lambda student, reference: kk.divergence_loss(student, reference, kind, temperature=2.0, backend="triton")


def _label_gradient(student: Tensor, reference: Tensor) -> Tensor:
    """The backward operator of top-k: what autograd calls, in a graph by itself."""
    rows = student.shape[0]
    state = torch.zeros(8, rows)
    return traced.statistics_backward(
        student.detach(), None, torch.zeros(rows, 3, dtype=torch.int64), None, None, torch.ones(4, rows),
        "logprob,tail_logprob", 990, "", state, torch.ones(4, rows), True, False,
    )[0]  # fmt: skip


def _register(*functions: Any) -> None:
    def unused(logp: Tensor, logq: Tensor) -> Tensor:
        raise AssertionError

    kk.register_statistic("steep", value=unused, grad_logq=unused, grad_logp=unused, triton=functions)


@pytest.fixture
def _user_statistic() -> Iterator[None]:
    _register(log, kl_term, kl_term)
    yield
    kk.unregister_statistic("steep")


MANY = ["sweep_kernel", "finish_kernel", "gradient_kernel"]


@pytest.mark.parametrize(
    ("function", "rows", "expected"),
    [
        (lambda student, reference: kk.entropy(student, backend="triton").sum(), 8, MANY[:2]),
        (_loss("forward_kl"), 8, MANY),
        (_loss("js"), 8, ["sweep_kernel", "sums_kernel", *MANY[1:]]),
        (_loss("js"), 1024, ["loss_kernel"]),
        (_loss("steep"), 1, ["sweep_kernel", "sums_kernel", *MANY[1:]]),
        (_loss("steep"), 1024, ["loss_kernel"]),
        (_statistics("logprob", "tail_logprob"), 8, ["mark_kernel", *MANY[:2]]),
        (_label_gradient, 8, [MANY[2], "label_gradient_kernel"]),
        (_statistics(*EVERY), 8, ["mark_kernel", "sweep_kernel", "sums_kernel", "finish_kernel"]),
    ],
    ids=[
        "one tensor",
        "KL",
        "js",
        "js, many rows",
        "a user's, one row",
        "a user's, many rows",
        "top-k",
        "its gradient",
        "everything",
    ],
)
@pytest.mark.usefixtures("_user_statistic")
def test_what_inductor_prints_compiles(
    function: Callable[..., Tensor], rows: int, expected: list[str], tmp_path: Path
) -> None:
    code = _written_by_inductor(function, *pair(rows))
    (tmp_path / "kernels").mkdir()
    assert [_compile_printed(source, tmp_path / "kernels") for source in _kernels(code)] == expected


def test_inductor_allocates_one_gradient_and_copies_no_logits() -> None:
    code = _written_by_inductor(_loss("js"), *pair(1024))
    assert code.count("empty_strided_cpu((1024, 1000)") == 1
    assert "clone(" not in code
    assert "aten.clone" not in code
    assert ".copy_(" not in code


def test_inductor_writes_the_columns_of_labels_into_the_same_gradient() -> None:
    code = _written_by_inductor(_label_gradient, *pair(8))
    assert code.count("empty_strided_cpu((8, 1000)") == 1
    assert "clone(" not in code
    assert ".copy_(" not in code


def test_version_tells_users_kernels_apart() -> None:
    """Else a cache on disk would give the graph of kernels that have changed since."""
    versions = [traced.version(("js",))]
    for functions in ((log, kl_term, kl_term), (kl_term, kl_term, kl_term)):
        _register(*functions)
        versions += [traced.version(("steep",)), traced.version(("steep",))]
        kk.unregister_statistic("steep")
    assert versions[1] == versions[2]
    assert versions[3] == versions[4]
    assert len(set(versions)) == 3
