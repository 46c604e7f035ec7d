"""What GPU this is, and the versions of what runs on it: one JSON object, for a record of measurements.

python -m kldiv_kernels.benchmarking.gpu_device
"""

from __future__ import annotations

import json
import platform
import sys
from importlib import metadata
from typing import Any

import torch

import kldiv_kernels as kk
from kldiv_kernels import machine

PACKAGES = ("torch", "triton", "numpy", "pytest", "trl", "liger-kernel", "transformers")


def why_no_gpu() -> str | None:
    """Why PyTorch has no GPU here, or None."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"PyTorch {torch.__version__} is a build for CPUs alone; install one for CUDA or ROCm"
    return f"PyTorch {torch.__version__} finds no GPU: there is none, or its driver is missing (nvidia-smi says)"


def describe(device: str) -> dict[str, Any]:
    return {
        "device": _gpu() if device == "cuda" else {"name": device},
        "host": {"cpu": machine.cpu_model(), "cores": machine.usable_cores(), "system": platform.platform()},
        "versions": {
            "kldiv_kernels": kk.__version__,
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            **{name: _version(name) for name in PACKAGES},
        },
        "backends": kk.backends(),
    }


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": total,
        "free_bytes": free,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    wanted = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    reason = why_no_gpu() if wanted == "cuda" else None
    if reason:
        sys.exit(reason)
    print(json.dumps(describe(wanted)))
