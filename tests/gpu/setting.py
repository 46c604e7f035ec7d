"""Where these tests run: on the GPU, or with KLDIV_TEST_DEVICE=cpu small ones in Triton's interpreter.

Logits are drawn on the CPU, where the float64 oracle reads them, and put on the device for the backend.
KLDIV_GPU_BACKENDS=cuda,triton names the backends that are tested; without it all with kernels for the device are.
KLDIV_TEST_FEW=1 leaves eight statistics, in bfloat16 where a test has dtypes. KLDIV_TEST_QUICK=1 leaves one statistic
and small sizes: it tests the tests.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from checks import BACKENDS, DIVERGENCES, STATISTIC_NAMES, on
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.registry import STATISTICS

DEVICE = os.environ.get("KLDIV_TEST_DEVICE", "cuda")
QUICK = os.environ.get("KLDIV_TEST_QUICK") == "1"
FEW = os.environ.get("KLDIV_TEST_FEW") == "1"
# Of one tensor, of labels; with a sum of their own in the first sweep, with sums after it, with a log-sum-exp.
_FEW_NAMES = ("logprob", "entropy", "forward_kl", "reverse_kl", "js", "hellinger", "tvd", "renyi")
_SOME_NAMES = ("forward_kl",) if QUICK else _FEW_NAMES if FEW else tuple(STATISTIC_NAMES)

if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

# What the library itself calls available: a table kept by hand would leave out what it does not know. On a CPU there
# are only the interpreter and the model of a GPU, whatever else this machine has. The C++ backend serves CPU tensors,
# and the reference is no kernel: it is tested here in a few cases of its own.
_WORKING = [name for name, state in kk.backends().items() if state == "available"] if DEVICE == "cuda" else BACKENDS
AVAILABLE = [name for name in _WORKING if name not in ("cpu", "reference")]
_WANTED = os.environ.get("KLDIV_GPU_BACKENDS", ",".join(AVAILABLE)).split(",")
KERNELS = [name for name in AVAILABLE if name in _WANTED]
NAMES = [name for name in STATISTIC_NAMES if name in _SOME_NAMES]
LOSSES = [name for name in DIVERGENCES if name in NAMES]
DTYPES = (torch.bfloat16,) if QUICK or FEW else (torch.bfloat16, torch.float32, torch.float16)

if not KERNELS:
    pytest.skip(f"no backend with kernels for {DEVICE}: {kk.backends()}", allow_module_level=True)


def largest_cluster() -> int:
    """CTAs that a cluster may have on this device; 0 where there are none. The model of a GPU is an sm_90."""
    major = torch.cuda.get_device_capability()[0] if DEVICE == "cuda" else 9
    return {8: 0, 9: 16, 10: 16}.get(major, 8)


@dataclass(frozen=True)
class Computed:
    """A statistic and its gradients with coefficients of 1, on the CPU."""

    value: Tensor
    student: Tensor | None
    teacher: Tensor | None


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(shape)).to(dtype)


def labels_for(logits: Tensor) -> Tensor:
    return torch.randint(logits.shape[-1], logits.shape[:-1])


def compute(
    name: str, logits: Tensor, reference: Tensor, labels: Tensor | None, backend: str, **options: float | Tensor
) -> Computed:
    student, teacher = (on(DEVICE, x.detach().clone()).requires_grad_() for x in (logits, reference))
    given = {key: on(DEVICE, x) if isinstance(x, Tensor) else x for key, x in options.items()}
    given_labels = None if labels is None else on(DEVICE, labels)
    value = kk.token_stats(student, teacher, given_labels, stats=[name], backend=backend, **given)[name]
    if STATISTICS[name].differentiable:
        value.sum().backward()
    gradients = [None if x.grad is None else x.grad.cpu() for x in (student, teacher)]
    return Computed(value.detach().cpu(), *gradients)


def parked(name: str, backend: str, logits: Tensor, reference: Tensor, weight: Tensor, *scales: float) -> Tensor:
    """What a floor of `check_gradient` grows by where the one-read CUDA kernel keeps grad_logq / q of js between its
    sweeps: in the place of a bfloat16 teacher, as float16."""
    if name != "js" or backend != "cuda" or logits.dtype != torch.bfloat16:
        return torch.zeros(())
    temperature, reference_temperature = scales or (1.0, 1.0)
    q = (logits.double() / temperature).softmax(-1)
    p = (reference.double() / reference_temperature).softmax(-1)
    terms = 0.5 * q * (2 * q / (p + q)).log()
    # 2^-11 is half an ulp, 5e-7 what a floor is multiplied by.
    return 2**-11 / 5e-7 * terms.nan_to_num(0.0).abs() * weight.double().abs()[:, None] / temperature
