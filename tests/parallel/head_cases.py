"""Hidden states whole on every rank, and heads of which each has some rows; each case is run by all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from public_calls import given
from ranks import same_everywhere, uneven
from shard_cases import Columns, leaves
from torch import distributed

import kldiv_kernels as kk
from kldiv_kernels import parallel
from kldiv_kernels.parallel import shard


def case_linear_functions(rank: int, world: int) -> None:
    """Against the functions of whole logits, with gradients of everything; in several chunks, of uneven heads."""
    vocab, columns = 53, Columns(uneven(53, world, empty=True), rank)
    hidden, theirs = torch.randn(2, 6, 8), torch.randn(2, 6, 5)
    weight, bias, other = torch.randn(vocab, 8), torch.randn(vocab), torch.randn(vocab, 5)
    x = given(2, 6, vocab=vocab)
    calls: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "statistics": (
            lambda h, w, th, tw, o: kk.linear_token_stats(
                h, w, x.labels, reference_hidden=th, reference_head=tw, stats=("logprob", "js"), mask=x.mask, **o
            ).js.sum(),
            lambda s, t, o: kk.token_stats(s, t, x.labels, stats=("logprob", "js"), mask=x.mask, **o).js.sum(),
        ),
        "divergence": (
            lambda h, w, th, tw, o: kk.linear_divergence_loss(h, w, th, tw, "forward_kl", mask=x.mask, **o),
            lambda s, t, o: kk.forward_kl(s, t, mask=x.mask, **o),
        ),
        "policy": (
            lambda h, w, th, tw, o: kk.linear_policy_loss(
                h, w, x.labels, x.advantages, old_logprobs=x.old, reference_hidden=th, reference_head=tw, kl_coef=0.1,
                mask=x.mask, kl_estimator="reverse_kl", **o,
            ).loss,
            lambda s, t, o: kk.policy_loss(
                s, x.labels, x.advantages, old_logprobs=x.old, reference_logits=t, kl_coef=0.1, mask=x.mask,
                kl_estimator="reverse_kl", **o,
            ).loss,
        ),
        "top-k": (
            lambda h, w, th, tw, o: kk.linear_topk_divergence_loss(h, w, x.ids, x.topk_logprobs, "js", **o),
            lambda s, t, o: kk.topk_divergence_loss(s, x.ids, x.topk_logprobs, "js", **o),
        ),
    }  # fmt: skip
    for name, (ours, of_logits) in calls.items():
        for backend, dtype, softcap in (
            ("cpu", torch.float32, None),
            ("cpu", torch.float32, 5.0),
            ("reference", torch.float64, None),
        ):
            whole = leaves(*(x.to(dtype) for x in (hidden, weight, bias, theirs, other)))
            h, w, b, th, tw = whole
            logits = h @ w.T + b
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            expected = of_logits(logits, th @ tw.T, {"backend": backend})
            wanted = torch.autograd.grad(expected, whole, allow_unused=True, materialize_grads=True)
            here = columns.slice
            mine = leaves(*(y.to(dtype) for y in (hidden, weight[here], bias[here], theirs, other[here])))
            h, w, b, th, tw = mine
            head = kk.Head(w, b, softcap=softcap)
            got = ours(h, head, th, tw, {**columns.options, "rows_per_chunk": 5, "backend": backend})
            same_everywhere(got)
            tolerance = 1e-10 if dtype == torch.float64 else 2e-5
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
            found = torch.autograd.grad(got, mine, allow_unused=True, materialize_grads=True)
            for gradient, exact, whole_one in zip(found, wanted, (True, False, False, True, False), strict=True):
                part = exact if whole_one else exact[here]
                error = (gradient - part).abs().max() if part.numel() else torch.zeros(())
                assert error <= tolerance * exact.abs().max().clamp_min(1e-3), f"{name}, {backend}: {error}"
    # A layer in front that sums the gradient by itself.
    (h,) = leaves(hidden)
    part = weight[columns.slice]
    loss = kk.linear_token_stats(h, part, stats=("entropy",), reduce_hidden_grad=False, **columns.options).entropy.sum()
    loss.backward()
    assert h.grad is not None
    distributed.all_reduce(h.grad)
    (exact,) = leaves(hidden)
    kk.linear_token_stats(exact, weight, stats=("entropy",)).entropy.sum().backward()
    torch.testing.assert_close(h.grad, exact.grad, rtol=1e-5, atol=1e-5)


def case_linear_options(rank: int, world: int) -> None:
    """Temperatures of tokens beside a scale of the logits, a teacher's logits with gradient, parts that are rounded
    once."""
    vocab, columns = 53, Columns(uneven(53, world, empty=True), rank)
    tensors = torch.randn(5, 8), torch.randn(vocab, 8), torch.randn(5, vocab)
    temperature, cotangent = torch.rand(5) + 0.5, torch.rand(5)
    whole = leaves(*(x.double() for x in tensors))
    q = (0.5 * (whole[0] @ whole[1].T) / temperature[:, None]).log_softmax(-1)
    p = (whole[2] / temperature[:, None]).log_softmax(-1)
    expected = (q.exp() * (q - p)).sum(-1)
    (expected * cotangent).sum().backward()
    for rows_per_chunk in (2, None):
        h, w, t = leaves(tensors[0], tensors[1][columns.slice], tensors[2][:, columns.slice])
        found = kk.linear_token_stats(
            h, kk.Head(w, logit_scale=0.5), reference_logits=t, stats=("reverse_kl",), temperature=temperature,
            rows_per_chunk=rows_per_chunk, **columns.options,
        ).reverse_kl  # fmt: skip
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        for _ in range(2):
            got = torch.autograd.grad((found * cotangent).sum(), (h, w, t), retain_graph=True)
            for x, y, here in zip(
                got, whole, (slice(None), columns.slice, (slice(None), columns.slice)), strict=True
            ):  # fmt: skip
                assert y.grad is not None
                torch.testing.assert_close(x.double(), y.grad[here], rtol=1e-4, atol=1e-5)
    # Rows of an index take another way than neighbours. What every rank has of a sum is rounded after it.
    part, sent = tensors[1][columns.slice].bfloat16(), list[torch.dtype]()
    gradients = []

    def all_reduce(group: Any, mine: torch.Tensor) -> None:
        sent.append(mine.dtype)
        shard.all_reduce(group, mine)

    for mask in (None, torch.ones(5, dtype=torch.bool)):
        (h,) = leaves(tensors[0].bfloat16())
        value = kk.linear_token_stats(h, part, stats=("entropy",), mask=mask, **columns.options).entropy.sum()
        with mock.patch.object(parallel, "all_reduce", all_reduce):
            value.backward()
        gradients.append(h.grad)
    assert torch.equal(*gradients)
    assert sent == [torch.float32] * (2 if world > 1 else 0)
