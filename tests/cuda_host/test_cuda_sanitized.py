"""The CUDA kernels on the host with AddressSanitizer and UndefinedBehaviorSanitizer, on exactly allocated tensors."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from cuda_host import mutations
from cuda_host.build import compiler
from cuda_host.mutations import NONE, run

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")


@functools.cache
def _program() -> Path:
    return mutations.program(sanitize=True)


@pytest.mark.parametrize("problems", ["orders", "edges"])
def test_only_what_belongs_to_the_call_is_touched(problems: str) -> None:
    """Strides, misaligned rows, padding, rows shorter than a vector: what lies between and behind is forbidden."""
    wrong, how = run(_program(), NONE, range(6), problems)
    assert wrong == 0, how


@pytest.mark.parametrize(
    "problems", ["beyond the last column", "beyond the last column of a bulk copy", "between rows"]
)
def test_the_sanitizer_watches(problems: str) -> None:
    """A call that claims more columns than its tensors have is stopped."""
    with pytest.raises(RuntimeError, match=r"heap-buffer-overflow|use-after-poison|reach out of their global memory"):
        run(_program(), NONE, range(1), problems)
