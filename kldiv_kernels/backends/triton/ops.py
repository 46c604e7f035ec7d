"""The operators once more, for torch.compile: it sees the kernels inside, and plans memory and launches around them.

Functional, of the same meaning as those of `kldiv_kernels/ops.py`, whose autograd they share. The parameters are always
a table [4, N]: as numbers they would be constants of the compiled graph, and float64 in the code that Inductor writes.
`stats` are joined by commas. `version` is not used: it tells caches of compiled graphs apart (see `version`).

Inductor does not pass enable_fp_fusion on: where Triton contracts by default (before 3.10), compiled results may differ
from eager ones by roundings.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from kldiv_kernels import autograd, registry
from kldiv_kernels._ops import add_op_namespace_prefix
from kldiv_kernels.backends.interface import Call
from kldiv_kernels.backends.scaling import scale_in_place
from kldiv_kernels.backends.triton.launch import Launch


def arguments(call: Call, version: str) -> tuple[object, ...]:
    """The leading arguments of the operators."""
    table = call.token_parameters
    if table is None:
        # A product: torch.compile keeps it for all values of the factor, and recompiles for every value of torch.full.
        ones = torch.ones(call.rows, dtype=torch.float32, device=call.logits.device)
        table = torch.stack([ones * value for value in call.parameters])
    return (
        call.logits, call.reference, call.labels, call.mask, call.exclude, table, ",".join(call.stats),
        call.vocab_size, version,
    )  # fmt: skip


def version(stats: tuple[str, ...]) -> str:
    """A digest of the text of these statistics' kernels and of what launches them."""
    statistics = [registry.STATISTICS[name] for name in stats]
    users = [function.cache_key for s in statistics for function in s.triton or ()]
    return hashlib.sha256("".join([_package(), *users]).encode()).hexdigest()[:16]


@functools.cache
def _package() -> str:
    texts = [path.read_text() for path in sorted(Path(__file__).parent.rglob("*.py"))]
    return hashlib.sha256("".join(texts).encode()).hexdigest()


def _launch(
    logits: Tensor, reference: Tensor | None, labels: Tensor | None, mask: Tensor | None, exclude: Tensor | None,
    token_parameters: Tensor, stats: str, vocab_size: int,
) -> Launch:  # fmt: skip
    call = Call(
        logits, reference, labels, mask, exclude, token_parameters, (1.0, 1.0, 0.5, 0.5), tuple(stats.split(",")),
        int(vocab_size),
    )  # fmt: skip
    return Launch(call, interpreted=False, wrap=wrap_triton)


@triton_op(add_op_namespace_prefix("triton_statistics"), mutates_args={})
def statistics(
    logits: Tensor, reference: Tensor | None, labels: Tensor | None, mask: Tensor | None, exclude: Tensor | None,
    token_parameters: Tensor, stats: str, vocab_size: int, version: str, with_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    launch = _launch(logits, reference, labels, mask, exclude, token_parameters, stats, vocab_size)
    return launch.statistics(with_state)


@triton_op(add_op_namespace_prefix("triton_statistics_backward"), mutates_args={})
def statistics_backward(
    logits: Tensor, reference: Tensor | None, labels: Tensor | None, mask: Tensor | None, exclude: Tensor | None,
    token_parameters: Tensor, stats: str, vocab_size: int, version: str,
    state: Tensor, coefficients: Tensor, student: bool, teacher: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    launch = _launch(logits, reference, labels, mask, exclude, token_parameters, stats, vocab_size)
    dlogits, dreference = launch.gradients(state, coefficients.contiguous(), student, teacher)
    return autograd.or_empty(dlogits, logits), autograd.or_empty(dreference, logits)


@triton_op(add_op_namespace_prefix("triton_loss"), mutates_args={})
def loss(
    logits: Tensor, reference: Tensor | None, labels: Tensor | None, mask: Tensor | None, exclude: Tensor | None,
    token_parameters: Tensor, stats: str, vocab_size: int, version: str,
    coefficients: Tensor, student: bool, teacher: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    launch = _launch(logits, reference, labels, mask, exclude, token_parameters, stats, vocab_size)
    values, dlogits, dreference = launch.loss(coefficients.contiguous(), student, teacher)
    return autograd.reduced(coefficients, values, dlogits, dreference, logits)


autograd.register("triton_", scale_in_place)
