"""Where the operators of this package are, those of ops.py and those of the compiled part, and their full names.

A Hub kernel has a file of its builder's in the place of this one: each build gets a namespace of its own there, so that
several versions live in one process. It has these two names too, and nothing else in the package names a namespace.
"""

from __future__ import annotations

from typing import Any

import torch

ops: Any = torch.ops.kldiv_kernels


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of an operator."""
    return f"kldiv_kernels::{op_name}"
