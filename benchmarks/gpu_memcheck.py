"""A few small calls of every kind, for `compute-sanitizer python3 benchmarks/gpu_memcheck.py`.

Each tensor is an allocation of its own (PYTORCH_NO_CUDA_MEMORY_CACHING=1), so that a read or a write beyond its end
is seen. Few calls, because an instrumented kernel takes a hundred times as long. The Triton kernels are those of
tests/gpu, which has left them in Triton's cache. Each kind of call is printed before it is made.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch

import kldiv_kernels as kk
from kldiv_kernels.benchmarking import gpu_peers

# The smallest and the largest cluster, one that real vocabularies take, and two sweeps.
PLANS = ("cluster=1,stages=3", "cluster=2,stages=1", "cluster=8,stages=3", "cluster=16,stages=2", "two-sweep")
# With a sum of its own in the first sweep, and parked on chip between two.
LOSSES = ("forward_kl", "js")
STATISTICS = ("logprob", "entropy", "js")


class Sizes:
    def __init__(self, device: str) -> None:
        gpu = device == "cuda"
        properties = torch.cuda.get_device_properties(0) if gpu else None
        self.processors = properties.multi_processor_count if properties else 2
        major = properties.major if properties else 9
        self.largest_cluster = {8: 0, 9: 16, 10: 16}.get(major, 8)
        # On a CPU, where the harness is tested, a few seconds' worth.
        self.statistics = STATISTICS if gpu else ("forward_kl",)
        self.wide, self.odd = (1000, 211) if gpu else (64, 21)
        # A row more than four a multiprocessor: the smallest batch that gets a program a row in Triton.
        self.many = 4 * self.processors + 1 if gpu else 5
        # Slices of a multiple of 64 columns leave something for the last block of 16, and not a whole slice.
        self.one_read_columns = 3000 if gpu else 2000


class Calls:
    def __init__(self, device: str) -> None:
        self.device, self.sizes, self.count = device, Sizes(device), 0

    def rows(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device).bfloat16()

    def done(self) -> None:
        # Here, and not at the end: an error is then that of the call whose name was printed last.
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.count += 1

    def statistic(self, name: str, backend: str, *tensors: torch.Tensor, **options: object) -> None:
        student, teacher = (x.detach().requires_grad_() for x in tensors)
        labels = torch.randint(60, student.shape[:-1], device=self.device)
        kk.token_stats(student, teacher, labels, stats=[name], backend=backend, **options)[name].sum().backward()
        self.done()

    def of_any_backend(self, backend: str) -> None:
        rows, sizes = self.rows, self.sizes
        for name in sizes.statistics:
            print(f"{backend} {name} ...", flush=True)
            self.statistic(name, backend, rows(5, sizes.wide), rows(5, sizes.wide))
            self.statistic(name, backend, rows(3, 6, sizes.odd)[:, :-1], rows(3, 6, sizes.odd)[:, :-1])
            masked = {
                "mask": torch.rand(3, 4, device=self.device) < 0.7, "vocab_size": 71,
                "exclude": torch.randint(60, 71, (3, 4), device=self.device),
            }  # fmt: skip
            self.statistic(name, backend, rows(3, 4, 80), rows(3, 4, 80), **masked)
        print(f"{backend} a loss of many rows ...", flush=True)
        student, teacher = (rows(sizes.many, sizes.wide + 3).requires_grad_() for _ in range(2))
        kk.divergence_loss(student, teacher, "forward_kl", backend=backend).backward()
        self.done()

    def of_the_cuda_backend(self) -> None:
        """One-read kernels: rows that leave and come into each stage, padding, masks, one tensor, many labels."""
        for plan in PLANS:
            cluster = int(plan.partition("=")[2].partition(",")[0] or 0)
            if cluster > self.sizes.largest_cluster:
                continue
            rows = max(7, 6 * self.sizes.processors // max(1, cluster) + 1)
            with gpu_peers.planned(plan):
                for kind in LOSSES:
                    print(f"cuda {plan} {kind} ...", flush=True)
                    self.loss(kind, rows)
                print(f"cuda {plan} policy ...", flush=True)
                self.policy(rows)
                print(f"cuda {plan} top-k ...", flush=True)
                self.top_k(rows)

    def loss(self, kind: str, rows: int) -> None:
        columns = self.sizes.one_read_columns
        student = self.rows(rows, columns + 8).requires_grad_()
        teacher = self.rows(rows, columns + 8)
        mask = torch.rand(rows, device=self.device) < 0.9
        exclude = torch.randint(-1, columns, (rows,), device=self.device)
        kk.divergence_loss(
            student, teacher, kind, mask=mask, exclude=exclude, vocab_size=columns, backend="cuda"
        ).backward()  # fmt: skip
        self.done()

    def policy(self, rows: int) -> None:
        columns = self.sizes.one_read_columns
        student = self.rows(rows, columns).requires_grad_()
        labels = torch.randint(columns, (rows,), device=self.device)
        gpu_peers.known_loss(student, labels, "cuda").backward()
        self.done()
        advantages, old = torch.randn((2, rows), device=self.device)
        kk.policy_loss(
            student, labels, advantages, loss_type="dapo", old_logprobs=old, mask=labels > 9, backend="cuda"
        ).loss.backward()
        self.done()

    def top_k(self, rows: int) -> None:
        columns = self.sizes.one_read_columns
        student = self.rows(rows, columns).requires_grad_()
        teacher = self.rows(rows, columns).float().log_softmax(-1).topk(64, dim=-1)
        kk.topk_divergence_loss(student, teacher.indices, teacher.values, backend="cuda").backward()
        self.done()


def main() -> None:
    parser = argparse.ArgumentParser(description="Small calls for compute-sanitizer; see the head of this file.")
    parser.add_argument("device", choices=("cuda", "cpu"), nargs="?", default="cuda")
    calls = Calls(parser.parse_args().device)
    for backend in gpu_peers.ours():
        calls.of_any_backend(backend)
        if backend == "cuda":
            calls.of_the_cuda_backend()
    print(f"{calls.count} calls with gradients")


if __name__ == "__main__":
    main()
