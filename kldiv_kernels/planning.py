"""What a call would do, without doing it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kldiv_kernels import inputs, registry
from kldiv_kernels.backends import native


@dataclass(frozen=True)
class Plan:
    """The kernel that a call would run, and the bytes that it would move through main memory."""

    backend: str
    kernel: str
    sweeps: int
    threads: int
    bytes: int
    reason: str
    cluster: int | None = None
    shared_memory: int | None = None


def plan(
    *,
    rows: int,
    vocab: int,
    dtype: torch.dtype = torch.bfloat16,
    stats: Sequence[str] | None = None,
    kind: str | None = None,
    device: str | torch.device = "cpu",
    gradient: bool = True,
) -> Plan:
    """The plan for a loss of that `kind`, or for `token_stats` with these `stats`; the launcher uses the same code.

    Args:
        rows, vocab: N tokens and V columns.
        dtype: of the logits. stats or kind: one of them; default kind="forward_kl".
        device: "cpu".
        gradient: count the gradient of the logits too.

    Raises: ValueError naming the argument.

    >>> import kldiv_kernels as kk
    >>> kk.plan(rows=256, vocab=151_936, kind="forward_kl").bytes == 3 * 256 * 151_936 * 2
    True
    """
    if stats is not None and kind is not None:
        raise ValueError("plan: stats and kind are both given; expected one of them")
    for name, value in (("rows", rows), ("vocab", vocab)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"plan: {name} is {value!r}; expected an integer of at least 1")
    if torch.device(device).type != "cpu":
        raise ValueError(f"plan: device is {str(device)!r}; expected 'cpu'")
    if stats is None:
        wanted = [registry.get(kind or "forward_kl", "plan: kind", registry.divergence_names())]
    else:
        wanted = inputs.statistics(stats, "plan")
    tensors = 1 + any(s.reference for s in wanted)
    element = dtype.itemsize
    table = rows * vocab * element
    asked = os.environ.get("KLDIV_BACKEND", "auto")
    refusal = f"KLDIV_BACKEND={asked}" if asked not in ("auto", "cpu") else native.load()
    if refusal is None and dtype not in native.DTYPES:
        refusal = f"the cpu backend does not serve {dtype}"
    missing = [s.name for s in wanted if s.name not in native.served()]
    if refusal is None and missing:
        refusal = f"the cpu backend has no {', '.join(missing)}"
    if refusal is not None:
        moved = table * (tensors + gradient)
        return Plan("reference", "PyTorch", 1 + gradient, torch.get_num_threads(), moved, f"reference: {refusal}")
    chosen = importlib.import_module("kldiv_kernels._C").plan_cpu(
        rows, vocab, [s.name for s in wanted], element, element if tensors == 2 else 0,
        gradient, stats is None and gradient, torch.get_num_threads(),
    )  # fmt: skip
    return Plan("cpu", chosen.kernel, chosen.sweeps, chosen.threads, chosen.bytes, chosen.reason)
