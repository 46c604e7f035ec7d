"""A few small calls of every kind, for `compute-sanitizer python3 benchmarks/gpu_memcheck.py`.

Each tensor is an allocation of its own (PYTORCH_NO_CUDA_MEMORY_CACHING=1), so that a read or a write beyond its end
is seen. The Triton kernels are those of tests/gpu, which has left them in Triton's cache.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch

import kldiv_kernels as kk
from kldiv_kernels.benchmarking import gpu_peers
from kldiv_kernels.registry import STATISTICS

# Every cluster, every number of stages; without one the backend chooses, which for short rows is two sweeps.
PLANS = (
    "cluster=1,stages=3", "cluster=1,stages=4", "cluster=2,stages=1", "cluster=4,stages=2", "cluster=8,stages=3",
    "cluster=16,stages=2", "two-sweep",
)  # fmt: skip
# With a sum of its own in the first sweep, with sums after it, parked on chip or not, with a log-sum-exp.
FEW_LOSSES = ("forward_kl", "hellinger", "js", "tvd", "renyi")
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


class Sizes:
    def __init__(self, device: str) -> None:
        self.gpu = device == "cuda"
        properties = torch.cuda.get_device_properties(0) if self.gpu else None
        self.processors = properties.multi_processor_count if properties else 2
        self.largest_cluster = 16 if properties is None or properties.major in (9, 10) else 8
        # On a CPU, where the harness is tested, a few seconds' worth.
        self.statistics = ("logprob", "entropy", "forward_kl", "js") if self.gpu else ("forward_kl",)
        self.wide, self.odd = (1000, 211) if self.gpu else (64, 21)
        # A row more than four a multiprocessor: the smallest batch that gets a program a row in Triton.
        self.many = 4 * self.processors + 1 if self.gpu else 5
        # Slices of a multiple of 64 columns leave something for the last block of 16, and not a whole slice.
        self.one_read_columns = 3000 if self.gpu else 2000


class Calls:
    def __init__(self, device: str) -> None:
        self.device, self.sizes, self.count = device, Sizes(device), 0

    def rows(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, device=self.device).to(dtype)

    def statistic(self, name: str, backend: str, *tensors: torch.Tensor, **options: object) -> None:
        student, teacher = (x.detach().requires_grad_() for x in tensors)
        labels = torch.randint(60, student.shape[:-1], device=self.device)
        kk.token_stats(student, teacher, labels, stats=[name], backend=backend, **options)[name].sum().backward()
        self.count += 1

    def of_any_backend(self, backend: str) -> None:
        rows, sizes = self.rows, self.sizes
        for name in sizes.statistics:
            self.statistic(name, backend, rows(5, sizes.wide), rows(5, sizes.wide))
            self.statistic(name, backend, rows(3, 6, sizes.odd)[:, :-1], rows(3, 6, sizes.odd)[:, :-1])
            masked = {
                "mask": torch.rand(3, 4, device=self.device) < 0.7, "vocab_size": 71,
                "exclude": torch.randint(60, 71, (3, 4), device=self.device),
            }  # fmt: skip
            self.statistic(name, backend, rows(3, 4, 80), rows(3, 4, 80), **masked)
        for kind in ("forward_kl", "js") if sizes.gpu else ("forward_kl",):
            student = rows(sizes.many, sizes.wide + 3).requires_grad_()
            teacher = rows(sizes.many, sizes.wide + 3).requires_grad_()
            kk.divergence_loss(student, teacher, kind, backend=backend).backward()
            self.count += 1

    def of_the_cuda_backend(self, losses: tuple[str, ...]) -> None:
        """One-read kernels of every cluster: rows that leave and come into each stage, padding, masks, one tensor."""
        for plan in PLANS:
            cluster = int(plan.partition("=")[2].partition(",")[0] or 1)
            if cluster > self.sizes.largest_cluster:
                continue
            rows = max(7, 6 * self.sizes.processors // cluster + 1)
            with gpu_peers.planned(plan):
                for dtype in DTYPES if self.sizes.gpu else DTYPES[:1]:
                    for kind in losses:
                        self.loss(kind, rows, dtype)
                    self.policy(rows, dtype)

    def loss(self, kind: str, rows: int, dtype: torch.dtype) -> None:
        columns = self.sizes.one_read_columns
        student = self.rows(rows, columns + 8, dtype=dtype).requires_grad_()
        teacher = self.rows(rows, columns + 8, dtype=dtype)
        mask = torch.rand(rows, device=self.device) < 0.9
        exclude = torch.randint(-1, columns, (rows,), device=self.device)
        kk.divergence_loss(
            student, teacher, kind, mask=mask, exclude=exclude, vocab_size=columns, backend="cuda"
        ).backward()  # fmt: skip
        self.count += 1

    def policy(self, rows: int, dtype: torch.dtype) -> None:
        columns = self.sizes.one_read_columns
        student = self.rows(rows, columns, dtype=dtype).requires_grad_()
        labels = torch.randint(columns, (rows,), device=self.device)
        gpu_peers.known_loss(student, labels, "cuda").backward()
        advantages, old = torch.randn((2, rows), device=self.device)
        kk.policy_loss(
            student, labels, advantages, loss_type="dapo", old_logprobs=old, mask=labels > 9, backend="cuda"
        ).loss.backward()
        self.count += 2


def _losses(few: bool) -> tuple[str, ...]:
    return FEW_LOSSES if few else tuple(name for name, statistic in STATISTICS.items() if statistic.is_divergence)


def main() -> None:
    parser = argparse.ArgumentParser(description="Small calls for compute-sanitizer; see the head of this file.")
    parser.add_argument("device", choices=("cuda", "cpu"), nargs="?", default="cuda")
    parser.add_argument("--cuda-backend", action="store_true", help="a few losses of the cuda backend alone")
    options = parser.parse_args()
    backends = ["cuda"] if options.cuda_backend else gpu_peers.ours()
    calls = Calls(options.device)
    for backend in backends:
        calls.of_any_backend(backend)
    if "cuda" in backends:
        calls.of_the_cuda_backend(_losses(options.cuda_backend or options.device == "cpu"))
    if options.device == "cuda":
        torch.cuda.synchronize()
    print(f"{calls.count} calls with gradients")


if __name__ == "__main__":
    main()
