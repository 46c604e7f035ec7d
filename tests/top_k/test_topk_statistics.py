"""Log-probabilities of k tokens and of the rest, the k largest themselves, and other statistics of the same pass."""

from __future__ import annotations

import pytest
import torch
from checks import BACKENDS
from topk_formulas import N, V, problem
from torch import Tensor

import kldiv_kernels as kk


@pytest.mark.parametrize("names", [
    ("topk_logprobs", "tail_logprob", "logprob", "entropy", "logsumexp"),
    ("topk_logprobs", "untempered_logprob", "tail_logprob", "logprob"),
    ("tail_logprob", "untempered_logprob"),
], ids="-".join)  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_of_one_pass(backend: str, names: tuple[str, ...]) -> None:
    logits, ids, _ = problem()
    labels = ids[:, 0].clone()
    labels[3:5] = torch.tensor([0, 1])
    labels[5] = -100
    logits.requires_grad_()
    out = kk.topk_token_stats(logits, ids, labels, stats=names, temperature=0.7, backend=backend)
    leaf = logits.detach().double().requires_grad_()
    logq, rest = (leaf / 0.7).log_softmax(-1), torch.ones(N, V, dtype=torch.bool).scatter_(1, ids, False)

    def at_labels(logs: Tensor) -> Tensor:
        return torch.where(labels < 0, 0.0, logs.gather(1, labels.clamp_min(0)[:, None])[:, 0])

    every = {
        "topk_logprobs": logq.gather(1, ids),
        "tail_logprob": torch.where(rest, logq, -torch.inf).logsumexp(-1),
        "logprob": at_labels(logq),
        "untempered_logprob": at_labels(leaf.log_softmax(-1)),
        "entropy": -(logq.exp() * logq).sum(-1),
        "logsumexp": (leaf / 0.7).logsumexp(-1),
    }
    expected = {name: every[name] for name in names}
    assert list(out) == list(names)
    total, wanted = torch.zeros(()), torch.zeros((), dtype=torch.float64)
    for name, value in expected.items():
        assert torch.allclose(out[name].double(), value, rtol=1e-5, atol=1e-6), name
        weights = torch.randn(value.shape)
        total, wanted = total + (weights * out[name]).sum(), wanted + (weights.double() * value).sum()
    (mine,), (theirs,) = torch.autograd.grad(total, logits), torch.autograd.grad(wanted, leaf)
    assert (mine.double() - theirs).abs().max() <= 3e-5 * theirs.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_topk(backend: str) -> None:
    logits = torch.randn(2, 3, V, requires_grad=True)
    top = kk.topk(logits, 4, temperature=0.8, vocab_size=60, backend=backend)
    expected = (logits[..., :60] / 0.8).log_softmax(-1).topk(4, -1)
    assert torch.equal(top.ids, expected.indices)
    assert torch.allclose(top.values, expected.values, atol=1e-6)
    assert torch.allclose(top.log_mass, expected.values.logsumexp(-1), atol=1e-6)
    weights = torch.randn(2, 3)
    mine, theirs = (
        torch.autograd.grad((weights * x).sum(), logits)[0] for x in (top.log_mass, expected.values.logsumexp(-1))
    )
    assert torch.allclose(mine, theirs, atol=1e-6)
    assert theirs.any()
    mask = torch.rand(2, 3) < 0.5
    masked = kk.topk(logits, 4, mask=mask, backend=backend)
    assert not masked.log_mass[~mask].any()
    assert not masked.values[~mask].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_label_beyond_the_vocabulary(backend: str) -> None:
    logits, ids, _ = problem()
    with pytest.raises(IndexError, match=r"topk_token_stats: topk_ids or labels, in one table: .*\[0, 5\] is 70"):
        kk.topk_token_stats(logits, ids, torch.full((N,), V), stats=("logprob",), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_ignored_label_among_the_tokens(backend: str) -> None:
    logits, ids, _ = problem()
    out = kk.topk_token_stats(logits, ids, ids[:, 1], stats=("logprob",), ignore_index=int(ids[2, 1]), backend=backend)
    ignored = ids[:, 1] == ids[2, 1]
    assert not out.logprob[ignored].any()
    assert (out.logprob[~ignored] < 0).all()
