"""Is the shared library that was built elsewhere taken as it is by this Python and this PyTorch?

    python3 benchmarks/gpu_library.py

Loads it, runs a loss on each kind of kernel of the cuda backend, and compares with the reference backend in float64.
The last line is JSON: what was found.
"""

from __future__ import annotations

import json
import platform
import sys

import torch

import kldiv_kernels as kk
from kldiv_kernels.backends import cuda, native
from kldiv_kernels.benchmarking import gpu_peers

# It serves one Python; only `kldiv_kernels.plan` and `kldiv doctor` use it. Whoever else does, fails here.
MODULE = "kldiv_kernels._C"
PLANS = {"one-read": "", "two-sweep": "two-sweep"}
# Rows of the least width that the one-read kernel is chosen for.
ROWS, COLUMNS = 64, 8192
LARGEST_LOSS_ERROR = 1e-5
# Half of the last place of bfloat16, and some of the row's largest gradient.
GRADIENT_EPS, OF_THE_LARGEST = 2**-8, 2e-5


def check(device: str) -> dict[str, float]:
    """Largest relative error of the loss by plan; AssertionError where something is wrong."""
    torch.manual_seed(0)
    student, teacher = (torch.randn(ROWS, COLUMNS, device=device).mul_(3).bfloat16() for _ in range(2))
    wide = student.double().requires_grad_()
    expected = kk.forward_kl(wide, teacher.double(), backend="reference")
    expected.backward()
    expected = expected.detach()
    assert wide.grad is not None
    bound = GRADIENT_EPS * wide.grad.abs() + OF_THE_LARGEST * wide.grad.abs().amax(-1, keepdim=True)
    errors = {}
    for name, plan in PLANS.items():
        logits = student.clone().requires_grad_()
        with gpu_peers.planned(plan):
            loss = kk.forward_kl(logits, teacher, backend="cuda")
        loss.backward()
        loss = loss.detach()
        assert logits.grad is not None
        errors[name] = float((loss.double() - expected).abs() / expected)
        assert errors[name] <= LARGEST_LOSS_ERROR, f"{name}: loss {loss.item():.9g}, expected {expected.item():.9g}"
        wrong = int(((logits.grad.double() - wide.grad).abs() > bound).sum())
        assert wrong == 0, f"{name}: {wrong} of {bound.numel()} gradients are wrong"
    return errors


def main() -> None:
    assert MODULE not in sys.modules, f"{MODULE} was imported"
    sys.modules[MODULE] = None  # type: ignore[assignment]
    print("backends: " + "; ".join(f"{name}: {state}" for name, state in kk.backends().items()))
    refusal = native.load() or kk.backends()["cuda"]
    if refusal != "available":
        sys.exit(f"cuda backend: {refusal}")
    found = {
        "python": platform.python_version(), "torch": torch.__version__, "library": native.LIBRARY.name,
        "archs": cuda.architectures(), "relative_errors": check("cuda"),
    }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
