"""The shared library depends on PyTorch's stable C interface alone, and on no Python."""

from __future__ import annotations

import shutil
import subprocess

import pytest

import kldiv_kernels as kk
from kldiv_kernels.backends.native import LIBRARY

pytestmark = pytest.mark.skipif(kk.backends()["cpu"] != "available", reason="the compiled part is not built")


def undefined_symbols() -> list[str]:
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    listing = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", str(LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    return [line.split()[-1] for line in listing.splitlines()]


def test_no_pytorch_symbol_is_mangled() -> None:
    symbols = undefined_symbols()
    mangled = [name for name in symbols if any(part in name for part in ("2at", "3c10", "5torch", "5caffe"))]
    assert mangled == []
    # The list is the right one: the stable interface does stand in it.
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in symbols)


def test_no_python_symbol() -> None:
    assert [name for name in undefined_symbols() if name.startswith(("Py", "_Py"))] == []


def test_name_carries_no_python_version() -> None:
    assert LIBRARY.name == "libkldiv_kernels.so"
