"""What `launch.py` launches, recorded instead of run: each kernel with its arguments, as the compiler gets it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from triton.compiler import ASTSource

from kldiv_kernels.backends import Call
from kldiv_kernels.backends.triton import launch, shards
from kldiv_kernels.backends.triton.device import kernels
from kldiv_kernels.registry import STATISTICS

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Sets of statistics that losses ask for together, and one with all that a first sweep can take.
TOGETHER = (
    ("logprob", "entropy"),
    ("logprob", "entropy", "reverse_kl"),
    ("logprob", "tail_logprob"),
    ("logprob", "tail_logprob", "entropy"),
    ("forward_kl", "js"),
    ("forward_kl", "untempered_logprob"),
    ("entropy", "reference_entropy", "forward_kl", "reverse_kl", "hellinger", "argmax"),
)
SETS = [*((name,) for name, statistic in STATISTICS.items() if statistic.builtin), *TOGETHER]
# Qwen's vocabulary: ten slices of bf16. A row longer by one than that is neither aligned nor whole vectors.
VOCAB = 151_936


class _Recorded(launch.Launch):
    """Launches noted instead of made: kernel → (arguments, warps)."""

    fills_the_device = True  # type: ignore[assignment]

    def __init__(self, call: Call, nvidia: bool) -> None:
        super().__init__(call, interpreted=False)
        self.bound = launch.bound_for(call.stats, nvidia)
        self.noted: dict[str, tuple[Any, dict[str, Any], int]] = {}

    def _run(self, kernel: Any, programs: int, warps: int, arguments: dict[str, Any]) -> None:
        self.noted[kernel.__name__] = kernel, arguments, warps


class _RecordedShards(_Recorded, shards.ShardLaunch):
    pass


def _call(stats: tuple[str, ...], dtype: torch.dtype, everything: bool, labels: int) -> Call:
    rows, statistics = 2, [STATISTICS[name] for name in stats]
    logits = torch.empty(rows, VOCAB + everything, dtype=dtype)
    return Call(
        logits=logits,
        reference=torch.empty_like(logits) if any(s.reference for s in statistics) else None,
        labels=torch.zeros(rows, labels, dtype=torch.int64) if any(s.needs_labels for s in statistics) else None,
        mask=torch.ones(rows, dtype=torch.bool) if everything else None,
        exclude=torch.zeros(rows, dtype=torch.int64) if everything else None,
        token_parameters=torch.ones(4, rows) if everything else None,
        parameters=(1.0, 1.0, 0.5, 0.5),
        stats=stats,
        vocab_size=VOCAB - everything,
    )


@functools.lru_cache(maxsize=4)
def launches(
    stats: tuple[str, ...], dtype: str, everything: bool, nvidia: bool
) -> dict[str, tuple[Any, dict[str, Any], int]]:
    """kernel → (jit function, arguments, warps) of all launches that this set of statistics has."""
    # The only label of a row is one of its columns, several have a kernel of their own.
    tail = "tail_logprob" in stats
    call = _call(stats, DTYPES[dtype], everything, 2 if everything or tail else 1)
    recorded = _Recorded(call, nvidia)
    _, state = recorded.statistics(with_state=True)
    statistics = [STATISTICS[name] for name in stats if STATISTICS[name].differentiable]
    if statistics:
        student = any(s.student for s in statistics)
        coefficients = torch.ones(recorded.value_rows, call.rows)
        recorded.gradients(state, coefficients, student or everything, everything or not student)
        if not tail:
            one = _Recorded(_call(stats, DTYPES[dtype], everything, 1), nvidia)
            one.loss(coefficients, student or everything, everything or not student)
            recorded.noted |= one.noted
        scaled = {"data_ptr": call.logits, "factor_ptr": coefficients, "size": 1, "BLOCK": 4096}
        recorded.noted["scale_kernel"] = kernels.scale_kernel, scaled, 4
    return recorded.noted


def shard_launches(
    stats: tuple[str, ...], dtype: str, everything: bool, nvidia: bool
) -> dict[str, tuple[Any, dict[str, Any], int]]:
    """The same of a process that has some of the columns, with three more that have the others."""
    call = _call(stats, DTYPES[dtype], everything, 2)
    recorded = _RecordedShards(call, nvidia)
    states = torch.stack([recorded.state(0)] * 4)
    sums = recorded.sums(states)
    picked = None if call.labels is None else torch.zeros(2, *call.labels.shape)
    recorded.finish(states, None if sums is None else torch.stack([sums] * 4), picked)
    return recorded.noted


def source_of(kernel: Any, arguments: dict[str, Any]) -> ASTSource:
    """What the compiler gets when these arguments are launched, none of them specialised."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _POINTERS[value.dtype]
        else:
            signature[parameter.name] = parameter.annotation_type or _NUMBERS[type(value)]
    return ASTSource(kernel, signature, constexprs=constants)


_POINTERS = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32",
    torch.bool: "i1",
}  # fmt: skip
_NUMBERS = {int: "i32", float: "fp32"}
