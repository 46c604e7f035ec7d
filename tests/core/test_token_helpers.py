"""Values per token: selective_log_softmax, entropy, and the mapping that token_stats gives."""

from __future__ import annotations

import oracle
import pytest
import torch
from checks import BACKENDS, check_gradient, check_value
from logit_pairs import pair

import kldiv_kernels as kk


@pytest.mark.parametrize("labels_shape", [(3, 4), (3, 4, 6)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_selective_log_softmax(labels_shape: tuple[int, ...], backend: str) -> None:
    logits, _ = pair()
    labels = torch.randint(57, labels_shape)
    got = kk.selective_log_softmax(logits, labels, temperature=0.7, backend=backend)
    index = labels if len(labels_shape) == 3 else labels[..., None]
    exact = logits.detach().double().requires_grad_()
    wanted = (exact / 0.7).log_softmax(-1).gather(-1, index).reshape(labels_shape)
    check_value(got, wanted.detach())
    upstream = torch.randn(labels_shape)
    got.backward(upstream)
    wanted.backward(upstream.double())
    check_gradient(logits.grad, exact.grad, torch.full((3, 4, 1), 10.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_entropy(backend: str) -> None:
    logits, _ = pair(torch.bfloat16)
    mask = torch.rand(3, 4) < 0.5
    expected = oracle.evaluate("entropy", logits, temperature=1.9, mask=mask)
    got = kk.entropy(logits, temperature=1.9, mask=mask, backend=backend)
    check_value(got, expected.value)
    got.sum().backward()
    check_gradient(logits.grad, expected.student, expected.student_floor)


def test_token_stats_is_a_mapping_with_attributes() -> None:
    logits, reference = pair()
    stats = kk.token_stats(logits, reference, stats=("js", "argmax", "entropy"))
    assert list(stats) == ["js", "argmax", "entropy"]
    assert dict(stats.items())["js"] is stats.js is stats["js"]
    assert stats.argmax.dtype == torch.int64
    with pytest.raises(AttributeError, match=r"no statistic 'logprob'; it has js, argmax, entropy"):
        _ = stats.logprob
