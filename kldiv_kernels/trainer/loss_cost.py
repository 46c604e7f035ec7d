"""The loss's share of a distillation step, with this library and with plain PyTorch, on the models and shapes of a run.

A step here is: the teacher's hidden states, the student's, the loss, the gradients of the student's hidden states and
head, the backward pass through the rest of the student, AdamW. The heads count as part of the loss: plain PyTorch makes
all logits with them, this library some at a time. The two losses take steps in turns, so that a slow moment of the
machine meets both, and medians are compared.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from kldiv_kernels.benchmarking import peers
from kldiv_kernels.benchmarking.cases import Case, Inputs
from kldiv_kernels.benchmarking.memory import measure_in_subprocess

# As in results.json of `kldiv bench`.
_NAMES = (peers.OURS, "eager")
_TURNS = 5


def measure(student: Any, teacher: Any, batch: Tensor) -> dict[str, Any]:
    """Forward KL from the teacher, on token ids [batch, tokens]. `student` is trained by it: pass a copy.

    Extra memory is that of the logits, one loss and its gradients beyond hidden states and heads, or None where it is
    unknown; it is measured with a teacher as wide as the student.
    """
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    vocab, hidden = student.get_output_embeddings().weight.shape
    case = Case("linear_forward_kl", torch.float32, batch.numel(), vocab, hidden)
    losses = {name: peers.build(name, case) for name in _NAMES}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in _NAMES}
    for _ in range(1 + _TURNS):
        for name, loss in losses.items():
            taken[name].append(_step(student, teacher, batch, loss, optimizer))
    found: dict[str, Any] = {"rows": case.rows, "vocab": vocab, "hidden": hidden, "dtype": "fp32", "kind": case.kind}
    for name in _NAMES:
        # The first one warms up.
        step, loss_alone = (statistics.median(seconds) for seconds in zip(*taken[name][1:], strict=True))
        extra = measure_in_subprocess(case, name, torch.get_num_threads()).extra_bytes if batch.is_cpu else None
        found[name] = {"step_seconds": step, "loss_seconds": loss_alone, "extra_bytes": extra}
    return found


def sentence(found: dict[str, Any]) -> str:
    """For a reader: time and, where it is known, memory."""
    ours, eager = (found[name] for name in _NAMES)
    text = f"Logits, loss and gradients took {_share(ours)} with kldiv_kernels, and {_share(eager)} with plain PyTorch."
    if ours["extra_bytes"] is None or eager["extra_bytes"] is None:
        return text
    megabytes = [one["extra_bytes"] / 1e6 for one in (ours, eager)]
    return (
        f"{text} Beyond hidden states and weights they needed {megabytes[0]:,.0f} MB and {megabytes[1]:,.0f} MB of "
        "memory."
    )


def _share(one: dict[str, Any]) -> str:
    loss, step = one["loss_seconds"] * 1e3, one["step_seconds"] * 1e3
    return f"{loss / step:.1%} of a training step ({loss:,.1f} of {step:,.1f} ms)"


def _step(
    student: Any, teacher: Any, batch: Tensor, loss: peers.Loss, optimizer: torch.optim.Optimizer
) -> tuple[float, float]:
    """Seconds of the step, and of the loss and its gradients within it."""
    start = _now(batch)
    with torch.no_grad():
        theirs = teacher.base_model(batch, use_cache=False).last_hidden_state
    hidden = student.base_model(batch, use_cache=False).last_hidden_state
    # The graph is cut at the hidden states, so that their gradient can be timed without the rest of the backward pass.
    leaf = hidden.detach().flatten(0, 1).requires_grad_()
    heads = [model.get_output_embeddings().weight for model in (student, teacher)]
    inputs = Inputs(leaf, theirs.flatten(0, 1), weight=heads[0], reference_weight=heads[1].detach())
    before = _now(batch)
    loss(inputs).backward()  # type: ignore[no-untyped-call]
    after = _now(batch)
    assert leaf.grad is not None
    hidden.backward(leaf.grad.view_as(hidden))
    optimizer.step()
    optimizer.zero_grad()
    return _now(batch) - start, after - before


def _now(batch: Tensor) -> float:
    """When everything that was asked of the device is done."""
    if not batch.is_cpu:
        torch.accelerator.synchronize(batch.device)
    return time.perf_counter()
