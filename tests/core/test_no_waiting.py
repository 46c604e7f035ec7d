"""On a GPU no call looks at a value of a tensor, for which the host would wait for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import BACKENDS
from public_calls import CALLS, Given, given
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kldiv_kernels as kk
from kldiv_kernels.inputs import tensors

# The cpu backend looks for itself, which costs nothing there.
OF_GPUS = [backend for backend in BACKENDS if backend != "cpu"]
# What reads a value back, or makes a shape of values.
_READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "item", "equal")


class _NoValues(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__.partition(".")[0]
        assert not name.lstrip("_").startswith(tuple(read.lstrip("_") for read in _READS)), f"{name} reads a value"
        chosen = args[1] if name == "index" else ()
        assert not any(isinstance(x, Tensor) and x.dtype == torch.bool for x in chosen), "an index by a mask"
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "_on_host", lambda tensor: False)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_value_is_read(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = given(2, 5)
    logits = x.logits.requires_grad_()
    arguments = Given(logits, *x[1:])
    with _NoValues():
        CALLS[name].ours(arguments, backend=backend).sum().backward()
    assert logits.grad is not None
    monkeypatch.setenv("KLDIV_CHECK_VALUES", "1")
    if "selective" in name:
        with pytest.raises(AssertionError, match="reads a value"), _NoValues():
            CALLS[name].ours(arguments, backend=backend)


@pytest.mark.parametrize("label", [11, -7, 2**32, -(2**40)])
@pytest.mark.parametrize("backend", OF_GPUS)
def test_a_label_outside_is_nan_in_its_row(label: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = torch.randn(4, 11, requires_grad=True), torch.tensor([3, label, -100, 10])
    options = {"stats": ("logprob", "entropy"), "backend": backend}
    found = kk.token_stats(logits, labels=labels, **options)
    known = kk.token_stats(logits, labels=torch.tensor([3, 0, -100, 10]), **options)
    assert found.logprob[1].isnan()
    assert torch.equal(found.logprob[[0, 2, 3]], known.logprob[[0, 2, 3]])
    assert torch.equal(found.entropy, known.entropy)
    found.logprob.sum().backward()
    assert logits.grad is not None
    assert logits.grad[[0, 2, 3]].isfinite().all()
    out = kk.policy_loss(logits[None], labels[None], torch.ones(1), backend=backend)
    assert out.loss.isnan()
    monkeypatch.setenv("KLDIV_CHECK_VALUES", "1")
    with pytest.raises(IndexError, match=rf"labels\[1\] is {label}; expected 0 to 10 or ignore_index = -100"):
        kk.token_stats(logits, labels=labels, **options)


@pytest.mark.parametrize("backend", OF_GPUS)
def test_several_labels_and_top_k(backend: str) -> None:
    logits = torch.randn(2, 11)
    labels = torch.tensor([[3, 99, -1], [0, 1, 2]])
    found = kk.selective_log_softmax(logits, labels, ignore_index=-1, backend=backend)
    assert found.isnan().tolist() == [[False, True, False], [False, False, False]]
    with pytest.raises(ValueError, match=r"topk_ids\[1, 0\] is 99; expected"):
        kk.topk_token_stats(logits, torch.tensor([[1, 2], [99, 3]]), check=True, backend=backend)
