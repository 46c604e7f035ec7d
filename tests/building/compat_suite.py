"""What `make compat` runs in an environment with one PyTorch, this package's wheel, and nothing else.

Losses of every kind and their gradients on the compiled library, beside float64. The last line is JSON: the versions,
and how many comparisons there were. Any failure ends it with an exit status.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# What an installation of PyTorch alone need not have, kept out even where it is there.
ABSENT = ("numpy", "triton", "kldiv_kernels._C")
sys.modules.update(dict.fromkeys(ABSENT))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "oracles"))

import checks  # noqa: E402
import oracle  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import kldiv_kernels as kk  # noqa: E402
from kldiv_kernels.backends import native  # noqa: E402
from kldiv_kernels.policy.options import LOSS_TYPES  # noqa: E402
from kldiv_kernels.registry import STATISTICS  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPE = (2, 3, 9001)


def logits(seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).mul_(3).to(dtype)


LABELS = torch.randint(SHAPE[-1], SHAPE[:-1], generator=torch.Generator().manual_seed(2))
LABELS[0, 0] = -100


def compared(loss_of: Callable[[Tensor, str], Tensor], dtype: torch.dtype) -> int:
    """A loss on the library, and on the reference backend in float64."""
    student = logits(0, dtype).requires_grad_()
    wide = student.detach().double().requires_grad_()
    loss, expected = loss_of(student, "cpu"), loss_of(wide, "reference")
    loss.backward()
    expected.backward()
    assert student.grad is not None
    assert wide.grad is not None
    assert wide.grad.abs().max() > 0
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=2e-5)
    largest = float(wide.grad.abs().max())
    # One rounding of the dtype, and 2e-5 of the largest gradient.
    rounding = torch.finfo(dtype).eps
    tiny = torch.finfo(dtype).smallest_normal * rounding
    torch.testing.assert_close(student.grad.double(), wide.grad, rtol=rounding, atol=2e-5 * largest + tiny)
    return 1


def statistics(dtype: torch.dtype) -> int:
    """Every statistic and its gradients, from their definitions."""
    for name in STATISTICS:
        student, teacher = logits(0, dtype).requires_grad_(), logits(1, dtype).requires_grad_()
        stats = kk.token_stats(student, teacher, LABELS, stats=(name,), alpha=0.7, beta=0.3, backend="cpu")
        expected = oracle.evaluate(name, student, teacher, LABELS, alpha=0.7, beta=0.3)
        checks.check_value(stats[name], expected.value, dtype)
        if STATISTICS[name].differentiable:
            stats[name].sum().backward()
            for got, right, floor in (
                (student.grad, expected.student, expected.student_floor),
                (teacher.grad, expected.teacher, expected.teacher_floor),
            ):
                checks.check_gradient(torch.zeros_like(student) if got is None else got, right, floor)
    return len(STATISTICS)


def divergences(dtype: torch.dtype) -> int:
    teacher = logits(1, dtype)

    def loss_of(kind: str) -> Callable[[Tensor, str], Tensor]:
        options = checks.taken(kind, 0.7, 0.3)
        return lambda student, backend: kk.divergence_loss(
            student, teacher.to(student.dtype), kind, labels=LABELS, temperature=1.5, backend=backend, **options
        )

    return sum(compared(loss_of(kind), dtype) for kind in checks.DIVERGENCES)


def top_k(dtype: torch.dtype) -> int:
    top = kk.topk(logits(1, dtype), 16, backend="cpu")

    def loss_of(tail: str) -> Callable[[Tensor, str], Tensor]:
        return lambda student, backend: kk.topk_divergence_loss(
            student, top.ids, top.values.to(torch.float32), "js", tail=tail, labels=LABELS, backend=backend
        )

    return sum(compared(loss_of(tail), dtype) for tail in ("bucket", "renormalize"))


def policies(dtype: torch.dtype) -> int:
    old = kk.selective_log_softmax(logits(0, torch.float32), LABELS.clamp_min(0)) - 0.1
    advantages = torch.tensor([1.0, -0.5])

    def loss_of(loss_type: str) -> Callable[[Tensor, str], Tensor]:
        # It divides by a constant.
        options = {"normalizer": 6.0} if loss_type == "dr_grpo" else {}
        return lambda student, backend: (
            kk.policy_loss(
                student, LABELS, advantages, old_logprobs=old, loss_type=loss_type, backend=backend, **options
            ).loss
        )

    return sum(compared(loss_of(loss_type), dtype) for loss_type in LOSS_TYPES)


def from_hidden_states(dtype: torch.dtype) -> int:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 3, 32, generator=generator, requires_grad=True)
    head, teacher_head = torch.randn(2, 501, 32, generator=generator).unbind()
    loss = kk.linear_divergence_loss(hidden, head, hidden.detach() * 0.9, teacher_head, "forward_kl")
    loss.backward()
    wide = hidden.detach().double().requires_grad_()
    logp = (0.9 * hidden.detach().double() @ teacher_head.double().T).log_softmax(-1)
    expected = (logp.exp() * (logp - (wide @ head.double().T).log_softmax(-1))).sum(-1).mean()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hidden.grad, wide.grad, rtol=1e-3, atol=1e-4, check_dtype=False)
    return 1


def command_line(dtype: torch.dtype) -> int:
    """`kldiv doctor` without the command line's packages, in a process as users start it."""
    done = subprocess.run([sys.executable, "-m", "kldiv_kernels.cli", "doctor"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "backend cpu" in done.stdout
    return 1


PARTS = {
    statistics: DTYPES,
    divergences: DTYPES,
    top_k: DTYPES,
    policies: (torch.float32,),
    from_hidden_states: (torch.float32,),
    command_line: (torch.float32,),
}


def main() -> None:
    start = time.monotonic()
    assert all(importlib.util.find_spec(name) is None for name in ABSENT)
    assert kk.backends()["cpu"] == "available", kk.backends()["cpu"]
    assert kk.plan(rows=8192, vocab=151_936, kind="js", device="sm_90").kernel == "one-read"
    assert native.LIBRARY.is_relative_to(sys.prefix), native.LIBRARY
    comparisons = 0
    for part, dtypes in PARTS.items():
        for dtype in dtypes:
            comparisons += part(dtype)
        print(f"{part.__name__}: right, {time.monotonic() - start:.0f} s", flush=True)
    assert "torch._dynamo" not in sys.modules, "something was compiled"
    found = {
        "python": platform.python_version(), "torch": torch.__version__, "comparisons": comparisons,
        "instruction_set": native.instruction_set(),
        "seconds": round(time.monotonic() - start),
    }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
