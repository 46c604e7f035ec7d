"""The cuda backend on the host: its kernels' source on a model of a GPU, for CPU tensors."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path

import torch

from cuda_host import build

ROOT = Path(__file__).resolve().parents[2]


def sources(root: Path = ROOT) -> list[Path]:
    folder = root / "csrc" / "cuda"
    return [*sorted(folder.rglob("*.cu")), *sorted(folder.glob("*.cpp")), root / "csrc" / "plan.cpp"]


@functools.cache
def load() -> None:
    """Loads the operators torch.ops.kldiv_cuda_host; takes a minute where they are not built yet."""
    torch.ops.load_library(str(build.build("libkldiv_cuda_host.so", sources(), torch=True)))


def serve_cpu_tensors() -> None:
    """backend="cuda" takes CPU tensors in this process."""
    load()
    backends = importlib.import_module("kldiv_kernels.backends")
    cuda = importlib.import_module("kldiv_kernels.backends.cuda")
    table = {**backends._all(), "cuda": cuda.CudaBackend(lambda: torch.ops.kldiv_cuda_host, device="cpu")}
    # The function and not what it has cached: torch.compile calls it anew.
    setattr(backends, "_all", lambda: table)  # noqa: B010
