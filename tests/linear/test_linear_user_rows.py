"""Rows as users have them, as a head makes them, and with their gradient in their place: the bits of the logits.

What these rows have from logits is held against float64 in core/test_user_rows.py.
"""

from __future__ import annotations

import pytest
import torch
from checks import BACKENDS, CUDA_ON_HOST, DIVERGENCES, INTERPRETED, taken
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from user_rows import Rows, user_rows

import kldiv_kernels as kk
from kldiv_kernels import inputs
from kldiv_kernels.backends import get
from kldiv_kernels.registry import STATISTICS

EXAMPLES = settings(max_examples=15 if INTERPRETED or CUDA_ON_HOST else 120, deadline=None, derandomize=True)
LOWEST = -3.3e38


def _same(got: Tensor, expected: Tensor) -> bool:
    return got.dtype == expected.dtype and torch.equal(got.nan_to_num(-7.0), expected.nan_to_num(-7.0))


def _head(rows: Tensor) -> Tensor:
    """A weight whose product with unit vectors is these rows: −inf is what counts as −inf, of which 0 times is 0."""
    return rows.clamp_min(LOWEST).t().contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
@EXAMPLES
@given(user_rows(), st.data())
def test_hidden_states_that_make_these_rows(backend: str, rows: Rows, data: st.DataObject) -> None:
    names = [*DIVERGENCES, "logprob", "entropy", "tail_logprob", "logsumexp"]
    name = data.draw(st.sampled_from(names), "statistic")
    size = data.draw(st.sampled_from([1, 2]), "rows a chunk")
    options = {"temperature": data.draw(st.sampled_from([0.7, 1.0, 3.0])), "alpha": 0.7, "beta": 0.3}
    labels = rows.labels[:, None] if STATISTICS[name].kind == "tail" else rows.labels
    unit, weight, theirs = (
        torch.eye(2).to(rows.logits.dtype),
        _head(rows.logits).requires_grad_(),
        _head(rows.reference),
    )
    logits, reference = (x.detach().t().float().contiguous() for x in (weight, theirs))
    call = inputs.prepare(
        "test", logits, reference, labels, stats=[STATISTICS[name]], reference_temperature=None, mask=None,
        ignore_index=-100, vocab_size=None, exclude=None, **options,
    )  # fmt: skip
    # Values come from a pass without a gradient, and the gradient from one over the same logits, made again.
    wanted, _ = get(backend).forward(call, False)
    _, gradient, _ = get(backend).one_read(call, torch.ones(1, 2), True, False)
    got = kk.linear_token_stats(
        unit, weight, labels, reference_hidden=unit, reference_head=theirs, stats=[name], rows_per_chunk=size,
        backend=backend, **options,
    )[name].reshape(1, 2)  # fmt: skip
    assert _same(got, wanted)
    # Of an infinite gradient the other row takes 0 times infinity.
    assert gradient is not None
    if bool(gradient.isfinite().all()):
        (of_weight,) = torch.autograd.grad(got.sum(), weight)
        assert _same(of_weight, gradient.t().to(of_weight.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@EXAMPLES
@given(user_rows(), st.data())
def test_gradients_in_the_place_of_these_rows(backend: str, rows: Rows, data: st.DataObject) -> None:
    form = data.draw(st.sampled_from([*DIVERGENCES, "topk", "policy"]), "form")
    shift = torch.tensor([0.3, -0.2])

    def loss(x: Tensor, in_place: bool) -> Tensor:
        if form == "policy":
            old = kk.selective_log_softmax(x.detach(), rows.labels) - shift
            return kk.policy_loss(
                x, rows.labels, shift, loss_type="dapo", old_logprobs=old, entropy_coef=0.1, in_place=in_place,
                backend=backend,
            ).loss  # fmt: skip
        if form == "topk":
            ids = rows.labels[:, None]
            logprobs = kk.selective_log_softmax(rows.reference.float(), ids)
            return kk.topk_divergence_loss(x, ids, logprobs, "js", in_place=in_place, backend=backend)
        return kk.divergence_loss(x, rows.reference, form, in_place=in_place, backend=backend, **taken(form, 0.7, 0.3))

    if form in ("topk", "policy") and get(backend).name != "cpu":
        return
    leaf = rows.logits.clone().requires_grad_()
    plain = loss(leaf, False)
    plain.backward()
    logits = rows.logits.clone().requires_grad_() * 1
    again = loss(logits, True)
    again.backward()
    assert leaf.grad is not None
    assert _same(again.detach(), plain.detach())
    assert _same(logits.detach(), leaf.grad)
