"""How often the Triton kernels are compiled, and how eager calls launch them.

A driver that is not there takes the launches: Triton's own hook tells under which key it would compile, nothing runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from checks import INTERPRETED
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from absent_gpu import Keys, launched_on_a_gpu

import kldiv_kernels as kk
from kldiv_kernels.backends.triton import bind, launch

compiled_only = pytest.mark.skipif(INTERPRETED, reason="under TRITON_INTERPRET=1 nothing is compiled")


@pytest.fixture
def keys() -> Iterator[Keys]:
    with launched_on_a_gpu() as found:
        yield found


def _logits(rows: int = 7, vocab: int = 32_000, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(rows, vocab, dtype=dtype)


def _loss(student: Tensor, teacher: Tensor, alpha: float | None = None, **options: Any) -> None:
    """js, which has beta alone."""
    kk.divergence_loss(
        student.detach().requires_grad_(), teacher.detach(), "js", backend="triton", **options
    ).backward()


def _stats(student: Tensor, teacher: Tensor, **options: Any) -> None:
    names = ("logprob", "entropy", "alpha_beta")
    labels = torch.zeros(student.shape[:-1], dtype=torch.int64)
    stats = kk.token_stats(
        student.detach().requires_grad_(), teacher.detach(), labels, stats=names, backend="triton", **options
    )
    (stats.logprob + stats.entropy + stats.alpha_beta).sum().backward()


def _many_calls(call: Callable[..., None]) -> None:
    for rows in (1, 7, 16, 4096):
        call(_logits(rows), _logits(rows))
    for temperature, alpha, beta in ((1.0, 1.0, 1.0), (0.7, 0.3, 0.9), (1, 0.5, 1)):
        call(_logits(), _logits(), temperature=temperature, alpha=alpha, beta=beta)
    call(_logits(), _logits(), temperature=1.3, reference_temperature=2.0)
    for tokens in (2, 33):
        batch = torch.empty(3, tokens, 32_000, dtype=torch.bfloat16)
        call(batch[:, :-1], batch[:, 1:])
        call(batch[:, :1], batch[:, -1:])
        call(batch, batch[:1].expand(3, -1, -1))
    wide = torch.empty(5, 32_064, dtype=torch.bfloat16)
    call(wide, wide.clone(), vocab_size=32_000)


@compiled_only
@pytest.mark.parametrize("call", [_loss, _stats], ids=["loss", "statistics"])
def test_one_compilation_for_all_sizes_strides_and_parameters(keys: Keys, call: Callable[..., None]) -> None:
    _many_calls(call)
    expected = {"sweep_kernel", "sums_kernel", "finish_kernel", "gradient_kernel"}
    expected |= {"loss_kernel"} if call is _loss else set()
    assert keys.counts() == dict.fromkeys(expected, 1)


@compiled_only
def test_that_test_sees_a_specialised_argument(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bind, "unspecialised", triton.jit)
    bind.bind.cache_clear()
    _many_calls(_loss)
    assert min(keys.counts().values()) > 1


@compiled_only
def test_vocabularies_share_what_is_compiled(keys: Keys) -> None:
    """All but the number of slices, rounded up to a power of two, in the kernels that merge them."""
    for vocab in (151_936, 200_064, 256_000):  # 10, 13 and 16 slices of 16,384 columns
        _loss(_logits(vocab=vocab), _logits(vocab=vocab))
        _loss(_logits(1, vocab), _logits(1, vocab))
    assert set(keys.counts().values()) == {1}
    for rows in (1, 7):
        _loss(_logits(rows, 32_000), _logits(rows, 32_000))  # 2 slices
    counts = keys.counts()
    assert {kernel for kernel, count in counts.items() if count == 1} == {"sweep_kernel", "gradient_kernel"}
    assert max(counts.values()) == 2
    _loss(_logits(1, 32_001), _logits(1, 32_001))  # neither aligned nor whole vectors
    assert keys.counts()["sweep_kernel"] == 2


@compiled_only
def test_labels_and_their_number_compile_nothing(keys: Keys) -> None:
    student = _logits()

    def run(*labels: Tensor) -> dict[str, int]:
        for one in labels:
            kk.selective_log_softmax(student.requires_grad_(), one, backend="triton").sum().backward()
        return keys.counts()

    once = {"sweep_kernel": 1, "finish_kernel": 1, "gradient_kernel": 1}
    assert run(torch.zeros(7, dtype=torch.int64), torch.zeros(7, 1, dtype=torch.int32)) == once
    # The only label of a row is one of its columns; several have a kernel of their own.
    many = {**once, "gradient_kernel": 2, "label_gradient_kernel": 1}
    assert run(*(torch.zeros(7, count).long() for count in (2, 5, 300))) == many


@compiled_only
def test_scaling_is_compiled_once(keys: Keys) -> None:
    for gradient in (_logits(1, 1), _logits(16, 4096), _logits(3, 1001), _logits(3, 1001)[1:]):
        launch.scale_in_place(gradient, torch.ones(()), interpreted=False)
    assert keys.counts() == {"scale_kernel": 1}


@compiled_only
def test_eager_calls_launch_kernels_as_they_are(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """wrap_triton, which torch.compile needs, would cost a tenth of a millisecond a launch."""
    seen = []
    launched = launch.Launch._run

    def run(self: launch.Launch, *arguments: Any) -> None:
        seen.append(self.wrap)
        launched(self, *arguments)

    monkeypatch.setattr(launch.Launch, "_run", run)
    for call in (_loss, _stats):
        call(_logits(), _logits())
    assert len(seen) == 5
    assert not any(seen)
