"""Builds the compiled part: one shared library on PyTorch's stable ABI, and the small module `_C`.

KLDIV_BUILD=0 installs without it. Everything else about the package is in pyproject.toml.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
# PyTorch 2.10: the oldest with torch::stable::parallel_for.
TORCH_TARGET = "0x020a000000000000"


def relative(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def stop(message: str) -> None:
    sys.exit(f"kldiv_kernels: {message}\nKLDIV_BUILD=0 installs without the compiled part (slow: PyTorch only).")


def require_tools() -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler.split()[0]) is None:
        stop(f"no C++ compiler: {compiler!r} was not found. Install one (Debian, Ubuntu: apt-get install g++).")
    try:
        import pybind11  # noqa: F401
        import torch
    except ImportError as error:
        stop(f"building needs {error.name}: pip install torch pybind11 ninja, then pip install --no-build-isolation .")
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10):
        stop(f"PyTorch {torch.__version__} is too old; the stable ABI that the library uses needs 2.10 or newer.")


def extensions() -> dict[str, object]:
    require_tools()
    import pybind11
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def get_ext_filename(self, name: str) -> str:
            # No Python in it, so no Python version in its name.
            if name.split(".")[-1] == "libkldiv_kernels":
                return str(Path(*name.split("."))) + ".so"
            return super().get_ext_filename(name)

        def get_export_symbols(self, extension: object) -> list[str]:
            return []

    sanitize = os.environ.get("KLDIV_SANITIZE") == "1"
    # -ffp-contract=off: products are fused into sums only where the source says so. Fusing p = e * scale into p - q
    # would leave a rounding error where p and q are the same.
    flags = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wall"]
    # GCC 12 says this of AVX-512 intrinsics that take an undefined source operand on purpose.
    flags += ["-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-psabi"]
    link = []
    if sanitize:
        flags += ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        link += ["-fsanitize=address,undefined"]
    target = f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"
    library = CppExtension(
        "kldiv_kernels.libkldiv_kernels",
        relative("csrc/ops.cpp", "csrc/plan.cpp", "csrc/cpu/*.cpp"),
        extra_compile_args=[*flags, target],
        extra_link_args=link,
        py_limited_api=True,
    )
    module = CppExtension(
        "kldiv_kernels._C",
        ["csrc/python.cpp", "csrc/plan.cpp"],
        include_dirs=[pybind11.get_include()],
        extra_compile_args=["-std=c++17", "-O2", "-g0", f'-DKLDIV_TORCH_TARGET="{TORCH_TARGET}"'],
    )
    return {"ext_modules": [library, module], "cmdclass": {"build_ext": Build}}


setup(**(extensions() if os.environ.get("KLDIV_BUILD", "1") != "0" else {}))
