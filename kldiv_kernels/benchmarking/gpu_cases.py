"""The cases on a GPU, in the order in which they are measured, and the speed that the project promises: milliseconds
on an H200, and there and on an H100 a share of what copying reaches in the same run.

1u is one pass over one [N, V] bf16 logits tensor. The floor of a case is what has to be moved at least: 3u for a
divergence with its gradient (read student and teacher, write dlogits), 2u for a loss of one tensor, and one less
for the statistics alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kldiv_kernels.benchmarking.cases import GRPO, TOPK, Case, Inputs
from kldiv_kernels.benchmarking.defaults import DEFAULT_HIDDEN, LOGPROB_ENTROPY
from kldiv_kernels.benchmarking.peers import GEMMS
from kldiv_kernels.choices import Backend

# Llama 2, Llama 3, Qwen 2.5 and 3, Gemma 2 and later (with a little padding).
VOCABULARIES = (32_000, 128_256, 151_936, 262_144)
ROWS, VOCAB = 8192, 151_936
LARGE_VOCAB_ROWS, LARGE_VOCAB = 4096, 262_144
SMALL_ROWS = (1, 16, 64)
PROMISED_ON = "H200"
# Here a promise is kept too where the bytes that the kernel moves pass at this share of the copy bandwidth.
RELATIVE_ON = ("H100", "H200")
OF_COPY = 0.9
# Two runs of one kernel differ by this much; a smaller difference to a peer is none.
NOISE = 1.02


@dataclass(frozen=True)
class GpuCase:
    """A loss with its gradient; `gradient=False`: the per-token statistics alone.

    `known`: per-token log-probability and entropy with coefficients that are known before the call, so that values and
    gradient come out of one operator.
    """

    kind: str
    rows: int = ROWS
    vocab: int = VOCAB
    gradient: bool = True
    known: bool = False
    # Whether torch.compile takes part: it needs seconds to compile each case.
    compiled: bool = True
    dtype: torch.dtype = torch.bfloat16
    # Of a loss from hidden states.
    hidden: int = DEFAULT_HIDDEN

    @property
    def name(self) -> str:
        return f"{self.kind} known" if self.known else self.kind if self.gradient else f"{self.kind} forward"

    @property
    def on_cpu(self) -> Case:
        """The case of `kldiv bench` with the same loss."""
        return Case(self.kind, self.dtype, self.rows, self.vocab, self.hidden)

    @property
    def two_tensors(self) -> bool:
        return self.on_cpu.is_divergence

    @property
    def unit_bytes(self) -> int:
        return self.on_cpu.unit_bytes

    @property
    def floor_units(self) -> int:
        """0 from hidden states, whose logits need not be in memory at all."""
        return 0 if self.on_cpu.from_hidden else 1 + self.two_tensors + self.gradient

    @property
    def floor_bytes(self) -> int:
        return self.floor_units * self.unit_bytes

    def inputs(self, device: str, seed: int) -> Inputs:
        """Those of the same loss on the CPU, drawn on the device."""
        inputs = self.on_cpu.inputs(seed, device)
        inputs.student.requires_grad_(self.gradient)
        return inputs


def cases() -> list[GpuCase]:
    """What has a promise first: a run that is out of time leaves out the last ones."""
    first = [
        GpuCase("forward_kl"),
        GpuCase(LOGPROB_ENTROPY, gradient=False),
        GpuCase(LOGPROB_ENTROPY, known=True, compiled=False),
        GpuCase(GRPO),
        GpuCase(TOPK, compiled=False),
        GpuCase("js"),
        GpuCase("reverse_kl", compiled=False),
        GpuCase("hellinger", compiled=False),
        GpuCase("forward_kl", gradient=False, compiled=False),
        GpuCase("forward_kl", rows=LARGE_VOCAB_ROWS, vocab=LARGE_VOCAB, compiled=False),
        GpuCase(LOGPROB_ENTROPY),
        *(ratio.case for ratio in RATIOS),
    ]
    small = [GpuCase("forward_kl", rows=rows) for rows in SMALL_ROWS]
    others = [vocab for vocab in VOCABULARIES if vocab != VOCAB]
    one_tensor = [
        GpuCase(LOGPROB_ENTROPY, vocab=vocab, gradient=gradient, compiled=False)
        for vocab in others
        for gradient in (False, True)
    ]
    rest = [
        GpuCase(kind, vocab=vocab, compiled=kind == "forward_kl")
        for kind in ("forward_kl", "js", "reverse_kl", "hellinger")
        for vocab in others
    ]
    return [*first, *small, *one_tensor, *rest]


def first_cases() -> list[GpuCase]:
    """Six that say most in a minute. torch.compile, which takes 20 seconds a case, is left to the whole benchmark."""
    return [
        GpuCase("forward_kl", compiled=False),
        GpuCase("js", compiled=False),
        GpuCase(LOGPROB_ENTROPY, known=True, compiled=False),
        GpuCase(GRPO, compiled=False),
        GpuCase(TOPK, compiled=False),
        GpuCase("forward_kl", gradient=False, compiled=False),
    ]


def quick_cases() -> list[GpuCase]:
    """For tests of the benchmark itself."""
    rows, vocab = 2, 67
    return [
        GpuCase("forward_kl", rows, vocab, compiled=False),
        GpuCase("forward_kl", rows, vocab, gradient=False, compiled=False),
        GpuCase(LOGPROB_ENTROPY, rows, vocab, gradient=False, compiled=False),
        GpuCase(LOGPROB_ENTROPY, rows, vocab, compiled=False),
        GpuCase(LOGPROB_ENTROPY, rows, vocab, known=True, compiled=False),
        GpuCase(GRPO, rows, vocab, compiled=False),
        GpuCase(TOPK, rows, vocab, compiled=False),
        GpuCase("linear_js", rows, vocab, compiled=False, hidden=8),
    ]


@dataclass(frozen=True)
class Promise:
    """A backend's time: on PROMISED_ON at most `reach` milliseconds, where moving the bytes alone takes `floor`; on
    RELATIVE_ON at most that of copying `moved_bytes` at `of_copy` of the bandwidth of the same run."""

    backend: Backend
    case: GpuCase
    floor: float
    reach: float
    of_copy: float = OF_COPY

    @property
    def moved_bytes(self) -> int:
        """Triton sweeps twice: a loss reads its logits once more."""
        again = 1 + self.case.two_tensors if self.backend == "triton" and self.case.gradient else 0
        return (self.case.floor_units + again) * self.case.unit_bytes

    def share(self, row: Mapping[str, Any]) -> float | None:
        copy = row["copy_gb_per_second"]
        return None if copy is None else self.moved_bytes / (row["milliseconds"] * 1e6) / copy


# Beside its bytes js has the arithmetic of two logarithms a column.
JS_OF_COPY = 0.75


def _promise(backend: Backend, floor: float, reach: float, kind: str, **case: Any) -> Promise:
    return Promise(backend, GpuCase(kind, **case), floor, reach, JS_OF_COPY if kind == "js" else OF_COPY)


PROMISES = (
    _promise("cuda", 1.74, 1.98, "forward_kl"),
    _promise("cuda", 1.74, 1.98, "reverse_kl"),
    _promise("cuda", 1.74, 1.98, "hellinger"),
    _promise("cuda", 1.8, 2.3, "js"),
    _promise("cuda", 1.16, 1.3, LOGPROB_ENTROPY, known=True),
    _promise("cuda", 1.16, 1.3, GRPO),
    _promise("cuda", 1.16, 1.35, TOPK),
    _promise("cuda", 1.16, 1.27, "forward_kl", gradient=False),
    _promise("cuda", 1.5, 1.75, "forward_kl", rows=LARGE_VOCAB_ROWS, vocab=LARGE_VOCAB),
    _promise("triton", 0.58, 0.75, LOGPROB_ENTROPY, gradient=False),
    _promise("triton", 1.74, 3.3, "forward_kl"),
    _promise("triton", 1.74, 4.5, "js"),
    _promise("triton", 1.16, 2.1, LOGPROB_ENTROPY),
    _promise("triton", 1.16, 2.1, GRPO),
    _promise("triton", 1.16, 2.3, TOPK),
)


@dataclass(frozen=True)
class Ratio:
    """From hidden states: at most `bound` times what the matrix multiplications take by themselves, in the same run."""

    case: GpuCase
    bound: float

    def target(self, time: float | None, alone: float | None, on_gpu: bool) -> dict[str, Any]:
        case, measured = self.case, None if time is None or alone is None else time / alone
        return {
            "target": f"best of ours: {case.name} at {case.rows} × {case.vocab} × {case.hidden}, time / that of the "
            "multiplications",
            "floor": 1.0, "reach": self.bound, "measured": measured,
            "met": None if measured is None or not on_gpu else measured <= self.bound,
            "share_reach": None, "share": None, "share_met": None,
        }  # fmt: skip


LINEAR_WIDTH = 4096
RATIOS = tuple(
    Ratio(GpuCase(kind, compiled=False, hidden=LINEAR_WIDTH), bound)
    for kind, bound in (("linear_forward_kl", 1.12), ("linear_logprob_entropy", 1.1), ("linear_js", 1.15))
)


def targets(rows: Iterable[Mapping[str, Any]], ours: Iterable[str], device: str) -> list[dict[str, Any]]:
    """What was promised, what was measured, and whether it was kept: in milliseconds (`met`) and as a share of the copy
    bandwidth (`share_met`); None where the run cannot tell."""
    ours = set(ours)
    measured = [row for row in rows if row["milliseconds"] is not None]

    def best(key: tuple[Any, ...], of: set[str]) -> float | None:
        times = [row["milliseconds"] for row in measured if _key(row) == key and row["implementation"] in of]
        return min(times, default=None)

    out: list[dict[str, Any]] = []
    for promise in PROMISES:
        case = promise.case
        key = (case.name, case.rows, case.vocab)
        time = best(key, {promise.backend})
        row = next((r for r in measured if _key(r) == key and r["implementation"] == promise.backend), None)
        share = None if row is None or not any(name in device for name in RELATIVE_ON) else promise.share(row)
        out.append(
            {
                "target": f"{promise.backend}: {case.name} at {case.rows} × {case.vocab} bf16, ms on an {PROMISED_ON}",
                "floor": promise.floor,
                "reach": promise.reach,
                "measured": time,
                "met": None if time is None or PROMISED_ON not in device else time <= promise.reach,
                "share_reach": promise.of_copy,
                "share": share,
                "share_met": None if share is None else share >= promise.of_copy,
            }
        )
    for ratio in RATIOS:
        key = (ratio.case.name, ratio.case.rows, ratio.case.vocab)
        out.append(ratio.target(best(key, ours), best(key, {GEMMS}), device != "cpu"))
    pairs = [
        (row, best(_key(row), ours))
        for row in measured
        if row["implementation"] == "trl" and row["kind"] == LOGPROB_ENTROPY
    ]
    ratios = [time / row["milliseconds"] for row, time in pairs if time is not None]
    out.append(
        {
            "target": "logprob and entropy: time of the best of ours / time of TRL's kernel, on any shape",
            "floor": None,
            "reach": NOISE,
            "measured": max(ratios, default=None),
            "met": max(ratios) <= NOISE if ratios and device != "cpu" else None,
            "share_reach": None,
            "share": None,
            "share_met": None,
        }
    )
    return out


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["case"], row["rows"], row["vocab"]
