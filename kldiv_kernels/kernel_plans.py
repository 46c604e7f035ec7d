"""Which backend and kernel serve a call on logits, and the bytes that it moves through main memory."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch

from kldiv_kernels.backends import cuda, get, native
from kldiv_kernels.divergences import Statistic


@dataclass(frozen=True)
class Plan:
    """The kernel that a call would run, and the bytes that it would move through main memory.

    `threads` are those of the CPU, or of a block of a GPU; `cluster` blocks share a row, hold `stages` rows at a time,
    and have `shared_memory` bytes each. With a hidden size: `kernel` and the others are those of a chunk of
    `rows_per_chunk` tokens, `bytes` those of all chunks and of their `multiplications`,
    and `extra_memory` is what the call needs beyond its arguments, gradients included.
    """

    backend: str
    kernel: str
    sweeps: int
    threads: int
    bytes: int
    reason: str
    cluster: int | None = None
    stages: int | None = None
    shared_memory: int | None = None
    rows_per_chunk: int | None = None
    multiplications: int | None = None
    extra_memory: int | None = None


@dataclass(frozen=True)
class Wanted:
    rows: int
    vocab: int
    dtype: torch.dtype
    stats: tuple[Statistic, ...]
    gradient: bool
    loss: bool
    labels: int = 1
    topk: bool = False

    @property
    def tensors(self) -> int:
        return 1 + any(s.reference for s in self.stats)

    @property
    def waits(self) -> bool:
        """A loss whose gradient waits for the loss scale that comes in with backward."""
        return self.loss and self.dtype == torch.float16

    @property
    def one_read(self) -> bool:
        return self.loss and not self.waits

    @property
    def names(self) -> list[str]:
        return [s.name for s in self.stats]

    def moved(self, sweeps: int) -> int:
        """Each sweep reads all tensors, and the last one writes the gradient."""
        return self.rows * self.vocab * self.dtype.itemsize * (self.tensors * sweeps + self.gradient)


def plan_of_logits(wanted: Wanted, target: str | torch.device) -> Plan:
    return _on_cpu(wanted) if target == "cpu" else _on_gpu(wanted, target)


def _on_cpu(wanted: Wanted) -> Plan:
    asked = os.environ.get("KLDIV_BACKEND", "auto")
    refusal = f"KLDIV_BACKEND={asked}" if asked not in ("auto", "cpu") else native.load()
    if refusal is None and wanted.dtype not in native.DTYPES:
        refusal = f"the cpu backend does not serve {wanted.dtype}"
    missing = [name for name in wanted.names if name not in native.served()]
    if refusal is None and missing:
        refusal = f"the cpu backend has no {', '.join(missing)}"
    if refusal is not None:
        return _reference(wanted, refusal)
    element = wanted.dtype.itemsize
    chosen = native.plan_cpu(
        rows=wanted.rows, columns=wanted.vocab, stats=wanted.names, student_bytes=element,
        teacher_bytes=element if wanted.tensors == 2 else 0, gradient=wanted.gradient, one_read=wanted.one_read,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    return Plan("cpu", chosen.kernel, chosen.sweeps, chosen.threads, chosen.bytes, chosen.reason + _why_again(wanted))


def _on_gpu(wanted: Wanted, target: str | torch.device) -> Plan:
    """The first backend that serves the call, as `backends.select` would have it."""
    capability = int(target[3:]) if isinstance(target, str) else cuda.capability(target)
    refusals = {
        "cuda": _cuda_refusal(wanted, target),
        "triton": _triton_refusal(wanted, target),
        "reference": None,
    }
    asked = os.environ.get("KLDIV_BACKEND") or "auto"
    if asked != "auto":
        if asked not in refusals:
            raise ValueError(f"plan: KLDIV_BACKEND is {asked!r}; expected auto or one of {', '.join(refusals)} there")
        if refusals[asked]:
            raise ValueError(f"plan: KLDIV_BACKEND {asked!r} cannot serve this call: {refusals[asked]}")
    name = next(name for name, refusal in refusals.items() if refusal is None) if asked == "auto" else asked
    if name == "cuda":
        return _of_cuda(wanted, capability, str(target))
    skipped = "; ".join(f"{one}: {why}" for one, why in refusals.items() if why)
    reason = skipped if asked == "auto" else f"KLDIV_BACKEND={asked}"
    return _of_triton(wanted, reason) if name == "triton" else _reference(wanted, reason)


def _of_cuda(wanted: Wanted, capability: int, device: str) -> Plan:
    element = wanted.dtype.itemsize
    try:
        chosen = native.plan_cuda(
            capability=capability, rows=wanted.rows, columns=wanted.vocab, stats=wanted.names, student_bytes=element,
            teacher_bytes=element if wanted.tensors == 2 else 0, student_gradient=wanted.gradient,
            known_coefficients=wanted.one_read, labels_per_row=wanted.labels,
            topk_outcomes=wanted.labels + 1 if wanted.topk else 0, float16=wanted.dtype == torch.float16,
        )  # fmt: skip
    except ValueError as error:
        argument = "" if str(error).startswith("KLDIV_CUDA_PLAN") else f"device is {device!r}; "
        raise ValueError(f"plan: {argument}{error}") from None
    return Plan(
        "cuda", chosen.kernel, chosen.sweeps, chosen.threads, chosen.bytes,
        chosen.reason + _why_again(wanted), chosen.cluster, chosen.stages, chosen.shared_bytes,
    )  # fmt: skip


def _why_again(wanted: Wanted) -> str:
    return "; backward reads float16 logits again, with the loss scale" if wanted.waits else ""


def _of_triton(wanted: Wanted, reason: str) -> Plan:
    from kldiv_kernels.backends.triton.bind import bound_for
    from kldiv_kernels.backends.triton.sizes import GPU_TILE, Shape

    # Many rows are a program's each, few are cut into slices; a row is swept as often either way. What a cache may
    # still hold of it, when rows are short or few, counts as read: as in the plan of the two-sweep kernels of `cuda`.
    bound = bound_for(tuple(wanted.names), True)
    sweeps = 1 + (bound.sums > 0) + wanted.gradient
    moved = wanted.moved(sweeps)
    if bound.tail:
        # A bit a column says which are labels: it is cleared, and read by the first sweep.
        moved += 2 * 4 * wanted.rows * Shape.of(wanted.vocab, wanted.dtype.itemsize, False).mark_words
    return Plan("triton", "two-sweep", sweeps, 32 * GPU_TILE.warps, moved, f"triton: {reason}")


def _reference(wanted: Wanted, reason: str) -> Plan:
    return Plan(
        "reference", "PyTorch", 1 + wanted.gradient, torch.get_num_threads(),
        wanted.moved(1 + (wanted.gradient and not wanted.one_read)), f"reference: {reason}{_why_again(wanted)}",
    )  # fmt: skip


def _cuda_refusal(wanted: Wanted, target: str | torch.device) -> str | None:
    # An architecture by name is asked about for another machine and another build.
    refusal = native.load() if isinstance(target, str) else get("cuda").unavailable()
    if refusal is None and wanted.dtype not in native.DTYPES:
        refusal = f"it serves float32, bfloat16 and float16, not {wanted.dtype}"
    missing = [s.name for s in wanted.stats if not s.builtin]
    if refusal is None and missing:
        refusal = f"it has no {', '.join(missing)}"
    if refusal is None and len(wanted.stats) > cuda.MOST_STATISTICS:
        refusal = f"it takes at most {cuda.MOST_STATISTICS} statistics at a time, not {len(wanted.stats)}"
    return refusal


def _triton_refusal(wanted: Wanted, target: str | torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    refusal = None if isinstance(target, str) else get("triton").unavailable()
    if refusal is None and wanted.dtype not in native.DTYPES:
        refusal = f"it serves float32, bfloat16 and float16, not {wanted.dtype}"
    missing = [s.name for s in wanted.stats if not s.builtin and s.triton is None]
    if refusal is None and missing:
        refusal = f"it has no {', '.join(missing)} (register_statistic takes triton= for that)"
    return refusal
