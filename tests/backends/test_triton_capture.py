"""CUDA graphs and the Triton backend: what a captured stream must not see.

It cannot be waited for, nor fed from pageable memory. There need be no GPU: see absent_gpu.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checks import INTERPRETED
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from absent_gpu import Keys, launched_on_a_gpu
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import kldiv_kernels as kk
from kldiv_kernels import inputs, ops
from kldiv_kernels.backends import Call
from kldiv_kernels.backends.triton import launch
from kldiv_kernels.inputs import tensors

compiled_only = pytest.mark.skipif(INTERPRETED, reason="under TRITON_INTERPRET=1 nothing is compiled")


@pytest.fixture
def keys() -> Iterator[Keys]:
    with launched_on_a_gpu() as found:
        yield found


class NothingFromTheDevice(TorchDispatchMode):
    """Fails where a value comes to the host, or a tensor changes its device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        waits = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique")
        assert name.partition("::")[2].partition(".")[0] not in waits, f"{name} waits for the device"
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            moved = [a for a in args if isinstance(a, Tensor) and a.dim() and a.device != out.device]
            assert not moved, f"{name} moves a tensor to {out.device}"
        return out


def _everything(device: str) -> tuple[Tensor, dict[str, Any]]:
    """A teacher, and all that a loss takes, on a device."""
    rows = (3, 5)
    options = {
        "weight": torch.rand(rows, device=device),
        "labels": torch.zeros(rows, dtype=torch.int32, device=device),
        "mask": torch.ones(rows, dtype=torch.int64, device=device),
        "exclude": torch.zeros(rows, dtype=torch.int64, device=device),
        "temperature": torch.rand(rows, device=device),
        "beta": torch.rand(rows, device=device),
        "temperature_squared": True,
    }
    return torch.empty(*rows, 320, device=device), options


def _no_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    launched: list[str] = []
    monkeypatch.setattr(launch.Launch, "_run", lambda self, kernel, *_: launched.append(kernel.fn.__name__))
    monkeypatch.setattr(launch.Launch, "_is_aligned", lambda self, tensor: True)
    return launched


@compiled_only
@pytest.mark.parametrize("normalizer", [None, 15.0, "tensor"])
def test_losses_and_backward_never_wait_for_the_device(
    keys: Keys, monkeypatch: pytest.MonkeyPatch, normalizer: float | str | None
) -> None:
    """On CPU tensors, which autograd has here."""
    launched = _no_launches(monkeypatch)
    monkeypatch.setattr(tensors, "_on_host", lambda tensor: False)
    teacher, options = _everything("cpu")
    student = torch.empty_like(teacher, requires_grad=True)
    given = torch.tensor(15.0) if normalizer == "tensor" else normalizer
    labels = torch.zeros(3, 5, 2, dtype=torch.int64)
    with NothingFromTheDevice():
        kk.divergence_loss(student, teacher, "js", backend="triton", normalizer=given, **options).backward()
        per_token = kk.divergence_loss(student, teacher, "js", backend="triton", reduction="none", **options)
        per_token.sum().backward()
        stats = kk.token_stats(
            student, teacher, labels, stats=("logprob", "argmax", "js"), backend="triton",
            exclude=options["exclude"], temperature=options["temperature"],
        )  # fmt: skip
        stats.js.sum().backward()
        ids, logprobs = torch.zeros(3, 5, 4, dtype=torch.int64), torch.full((3, 5, 4), -3.0)
        kk.topk_divergence_loss(
            student, ids, logprobs, "js", backend="triton", normalizer=given, check=False
        ).backward()
    assert launched.count("loss_kernel") == 1
    assert launched.count("gradient_kernel") == 3
    assert (launched.count("mark_kernel"), launched.count("label_gradient_kernel")) == (1, 2)


@compiled_only
def test_the_other_test_sees_a_wait(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    _no_launches(monkeypatch)
    teacher, options = _everything("cpu")
    with NothingFromTheDevice(), pytest.raises(AssertionError, match="waits for the device"):
        kk.divergence_loss(torch.empty_like(teacher), teacher, "js", backend="triton", **options)


@compiled_only
def test_nothing_moves_between_devices(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors of a GPU that is not there: without memory, and without autograd, which wants a real one."""
    launched = _no_launches(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(launch, "on_device", lambda device: torch.no_grad())

    class DoneError(Exception):
        """Python's indexing, which comes next, wants a real GPU too."""

    def statistics(call: Call, name: str, with_state: bool) -> Tensor:
        arguments = inputs.operator_arguments(call, name)
        values, state = ops._statistics(*arguments, True)
        ops._statistics_backward(*arguments, state, torch.ones_like(values), True, True)
        ops._loss(*arguments, torch.ones_like(values), True, True)
        raise DoneError

    monkeypatch.setattr(ops, "statistics", statistics)
    with FakeTensorMode(), NothingFromTheDevice():
        teacher, options = _everything("cuda")
        with pytest.raises(DoneError):
            kk.divergence_loss(torch.empty_like(teacher), teacher, "js", backend="triton", **options)
        with pytest.raises(DoneError):
            kk.token_stats(
                teacher, labels=options["labels"], exclude=options["exclude"], backend="triton", temperature=0.5
            )  # fmt: skip
    assert launched.count("loss_kernel") == 2
    assert launched.count("gradient_kernel") == 2


def test_checks_look_at_values_but_not_while_a_stream_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of a tensor on a GPU, what is asked about. A fake one has no values to look at.
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    assert inputs.may_look_at(torch.ones(3))
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        assert inputs.may_look_at(torch.ones(3))
        assert inputs.may_look_at(on_gpu) is not capturing
