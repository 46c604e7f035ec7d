"""A few small calls of every kind, for `compute-sanitizer python3 benchmarks/gpu_memcheck.py`.

Each tensor is an allocation of its own (PYTORCH_NO_CUDA_MEMORY_CACHING=1), so that a read or a write beyond its end
is seen. The kernels are those of tests/gpu, which has left them in Triton's cache.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch

import kldiv_kernels as kk
from kldiv_kernels.benchmarking import gpu_peers

DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cuda"
# On a CPU, where the harness is tested, a few seconds' worth.
STATISTICS = ("logprob", "entropy", "forward_kl", "js") if DEVICE == "cuda" else ("forward_kl",)
LOSSES = ("forward_kl", "js") if DEVICE == "cuda" else ("forward_kl",)
WIDE, ODD = (1000, 211) if DEVICE == "cuda" else (64, 21)
# A row more than four a multiprocessor: the smallest batch that gets a program a row.
MANY = 4 * torch.cuda.get_device_properties(0).multi_processor_count + 1 if DEVICE == "cuda" else 5


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(torch.bfloat16)


def statistic(name: str, backend: str, logits: torch.Tensor, reference: torch.Tensor, **options: object) -> None:
    student, teacher = logits.detach().requires_grad_(), reference.detach().requires_grad_()
    labels = torch.randint(60, student.shape[:-1], device=DEVICE)
    kk.token_stats(student, teacher, labels, stats=[name], backend=backend, **options)[name].sum().backward()


def main() -> None:
    calls = 0
    for backend in gpu_peers.ours():
        for name in STATISTICS:
            statistic(name, backend, rows(5, WIDE), rows(5, WIDE))
            statistic(name, backend, rows(3, 6, ODD)[:, :-1], rows(3, 6, ODD)[:, :-1])
            masked = {
                "mask": torch.rand(3, 4, device=DEVICE) < 0.7, "vocab_size": 71,
                "exclude": torch.randint(60, 71, (3, 4), device=DEVICE),
            }  # fmt: skip
            statistic(name, backend, rows(3, 4, 80), rows(3, 4, 80), **masked)
            calls += 3
        for kind in LOSSES:
            student, teacher = rows(MANY, WIDE + 3).requires_grad_(), rows(MANY, WIDE + 3).requires_grad_()
            kk.divergence_loss(student, teacher, kind, backend=backend).backward()
            calls += 1
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print(f"{calls} calls with gradients")


if __name__ == "__main__":
    main()
