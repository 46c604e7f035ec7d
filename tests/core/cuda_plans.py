"""Launch plans of the cuda backend as its C++ makes them, for any architecture."""

from __future__ import annotations

from typing import Any

import pytest

compiled = pytest.importorskip("kldiv_kernels._C")
ROWS = 8192
BF16 = {"student_bytes": 2, "teacher_bytes": 2}
FP32 = {"student_bytes": 4, "teacher_bytes": 4}
TWO_SWEEP = (1, 0)


def plan(capability: int, columns: int, **options: Any) -> Any:
    return compiled.plan_cuda(
        capability=capability, columns=columns, **{"rows": ROWS, "stats": ["forward_kl"], **BF16, **options}
    )


def one_tensor(capability: int, columns: int) -> Any:
    return plan(capability, columns, teacher_bytes=0, stats=["logprob", "entropy"])
