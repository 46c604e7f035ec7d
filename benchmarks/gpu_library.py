"""Is the shared library that was built elsewhere taken as it is by this Python and this PyTorch?

    python3 benchmarks/gpu_library.py

Loads it, runs losses on the kernels of the cuda backend, on clusters as large as real vocabularies need, and compares
with the reference backend in float64. Each plan is printed before it runs, so that one that hangs leaves its name. The
last line is JSON: what was found.
"""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.backends import cuda, native
from kldiv_kernels.benchmarking import gpu_peers
from kldiv_kernels.benchmarking.defaults import LOGPROB_ENTROPY

# It serves one Python, and nothing that a user calls needs it: whoever does, fails here.
MODULE = "kldiv_kernels._C"
# Several rows for each stage of each cluster on 132 multiprocessors.
ROWS = 64
LARGEST_LOSS_ERROR = 1e-5
# Half of the last place of bfloat16, and some of the row's largest gradient.
GRADIENT_EPS, OF_THE_LARGEST = 2**-8, 2e-5


@dataclass(frozen=True)
class Plan:
    """`plan` as KLDIV_CUDA_PLAN; "": what the library chooses."""

    plan: str
    kind: str
    columns: int
    cluster: int = 1

    @property
    def name(self) -> str:
        return f"{self.plan or 'as planned'}, {self.kind}, {ROWS} × {self.columns}"


PLANS = (
    Plan("two-sweep", "forward_kl", 8192),
    Plan("cluster=1,stages=3", "forward_kl", 8192),
    Plan("cluster=8,stages=3", "forward_kl", 151_936, cluster=8),
    Plan("cluster=16,stages=2", "forward_kl", 262_144, cluster=16),
    Plan("", LOGPROB_ENTROPY, 151_936),
    Plan("", "js", 151_936),
)


def largest_cluster(device: str) -> int:
    """sm_80 has no clusters, and no one-read kernel."""
    major = torch.cuda.get_device_capability()[0] if device == "cuda" else 9
    return {8: 0, 9: 16, 10: 16}.get(major, 8)


def check(device: str) -> dict[str, float]:
    """Largest relative error of the loss by plan; AssertionError, after all of them, where something is wrong."""
    errors, wrong = {}, []
    for plan in PLANS:
        if "cluster" in plan.plan and plan.cluster > largest_cluster(device):
            print(f"{plan.name}: not on this device", flush=True)
            continue
        print(f"cuda {plan.name} ...", flush=True)
        torch.manual_seed(0)
        try:
            errors[plan.name] = _compared(plan, device)
            print(f"{plan.name}: right, relative error of the loss {errors[plan.name]:.2g}", flush=True)
        except AssertionError as error:
            wrong.append(f"{plan.name}: {error}")
            print(wrong[-1], flush=True)
    assert not wrong, "; ".join(wrong)
    return errors


def _compared(plan: Plan, device: str) -> float:
    student, teacher = (torch.randn(ROWS, plan.columns, device=device).mul_(3).bfloat16() for _ in range(2))
    labels = torch.randint(plan.columns, (ROWS,), device=device)

    def loss_of(logits: Tensor, reference: Tensor, backend: str) -> Tensor:
        if plan.kind == LOGPROB_ENTROPY:
            return gpu_peers.known_loss(logits, labels, backend)
        return kk.divergence_loss(logits, reference, plan.kind, backend=backend)

    wide = student.double().requires_grad_()
    expected = loss_of(wide, teacher.double(), "reference")
    expected.backward()
    assert wide.grad is not None
    bound = GRADIENT_EPS * wide.grad.abs() + OF_THE_LARGEST * wide.grad.abs().amax(-1, keepdim=True)
    if plan.kind == "js":
        # Between its sweeps the one-read kernel keeps log2(q / m) as float16.
        q, p = (x.detach().double().softmax(-1) for x in (student, teacher))
        bound += 2**-11 / ROWS * (0.5 * q * (2 * q / (p + q)).log()).abs()
    logits = student.clone().requires_grad_()
    with gpu_peers.planned(plan.plan):
        loss = loss_of(logits, teacher, "cuda")
        loss.backward()
    assert logits.grad is not None
    got, right = loss.detach().double().item(), expected.detach().item()
    error = abs(got - right) / abs(right)
    assert error <= LARGEST_LOSS_ERROR, f"loss {got:.9g}, expected {right:.9g}"
    wrong = int((~((logits.grad.double() - wide.grad).abs() <= bound)).sum())
    assert wrong == 0, f"{wrong} of {bound.numel()} gradients are wrong"
    return error


def main() -> None:
    assert MODULE not in sys.modules, f"{MODULE} was imported"
    sys.modules[MODULE] = None  # type: ignore[assignment]
    print("backends: " + "; ".join(f"{name}: {state}" for name, state in kk.backends().items()), flush=True)
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
