"""What machine this is: said by `kldiv doctor` and recorded with every benchmark."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from kldiv_kernels.version import __version__


def cpu_model() -> str:
    """The CPU's name as the kernel tells it; the architecture where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on; containers and `taskset` give it fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def last_level_cache_bytes() -> int:
    """Size of the largest cache that Linux tells of, or 0. (The C library's SC_LEVEL3_CACHE_SIZE is 0 on AMD.)"""
    found = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        size = path.read_text().strip()
        if size.endswith("K") and size[:-1].isdigit():
            found.append(int(size[:-1]) * 1024)
    return max(found)


def describe() -> dict[str, str | int | float]:
    """Machine and versions, for a record of measurements."""
    return {
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        # Above the number of threads in use, somebody else was measured too.
        "load_average_1min": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kldiv_kernels": __version__,
    }
