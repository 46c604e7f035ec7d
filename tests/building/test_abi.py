"""The shared library depends on PyTorch's stable C interface alone, and on no Python."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import torch

import kldiv_kernels as kk
from kldiv_kernels.backends import cuda
from kldiv_kernels.backends.native import LIBRARY

pytestmark = pytest.mark.skipif(kk.backends()["cpu"] != "available", reason="the compiled part is not built")


def dynamic_symbols(which: str = "--undefined-only") -> list[str]:
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    listing = subprocess.run(["nm", "--dynamic", which, str(LIBRARY)], capture_output=True, text=True, check=True)
    return [line.split()[-1] for line in listing.stdout.splitlines()]


def test_no_pytorch_symbol_is_mangled() -> None:
    symbols = dynamic_symbols()
    mangled = [name for name in symbols if any(part in name for part in ("2at", "3c10", "5torch", "5caffe"))]
    assert mangled == []
    # The list is the right one: the stable interface does stand in it.
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in symbols)


def test_every_pytorch_from_2_10_on_has_what_it_asks_for() -> None:
    """By a list of which release brought which function of the stable interface."""
    audit = pytest.importorskip("torch_abi_audit")
    (library,) = audit.inspect_package(LIBRARY).bundled_libs
    assert library.torch.stable
    assert not library.torch.unstable_symbols
    assert not library.torch.unknown_shim_symbols
    assert library.torch.min_torch_version == "2.10.0"


def test_no_python_symbol() -> None:
    assert [name for name in dynamic_symbols() if name.startswith(("Py", "_Py"))] == []


def test_the_cuda_runtime_is_neither_needed_nor_offered() -> None:
    """It is linked statically: the library loads where there is none, and PyTorch's own stays apart from it."""
    assert [name for name in dynamic_symbols() if name.startswith(("cuda", "cu", "__cuda"))] == []
    assert [name for name in dynamic_symbols("--defined-only") if name.startswith(("cuda", "__cuda"))] == []
    # The architectures are said where there is a CUDA part.
    assert bool(cuda.architectures()) == hasattr(torch.ops.kldiv_kernels, "cuda_served")


def test_name_carries_no_python_version() -> None:
    assert LIBRARY.name == "libkldiv_kernels.so"
