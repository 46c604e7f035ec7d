"""Packed sequences: every loss type and aggregation is that of the padded batch, in values and gradients."""

from __future__ import annotations

from typing import Any

import policy_oracle as oracle
import pytest
import torch
from checks import BACKENDS
from packed_policy import CUT, MASKED, Packed, arguments_of, pack, same, tensors_of
from policy_oracle import TERMS, NoHostValue
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels import inputs

AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum"]


def _forms(batch: oracle.Batch) -> list[tuple[str, Packed, dict[str, Tensor]]]:
    """Bounds; and numbers, any and in any order of the tokens."""
    cut, masked = pack(CUT), pack(MASKED)
    order = torch.randperm(len(masked.places))
    names = torch.tensor([7, -5, 2**40, 0, 1, -1])
    scattered = Packed(masked.places[order], masked.sequence_ids[order], masked.cu_seqlens)
    return [
        ("bounds", cut, {"cu_seqlens": cut.cu_seqlens}),
        ("numbers", scattered, {"sequence_ids": names[scattered.sequence_ids]}),
    ]


def _padded_and_packed(
    name: str, backend: str, dtype: torch.dtype, tolerance: float, per_sequence: bool, arguments: dict[str, Any]
) -> None:
    batch = oracle.batch()
    assert not any(batch.mask[row, n:].any() for lengths in (CUT, MASKED) for row, n in enumerate(lengths))
    if per_sequence:
        batch.advantages = batch.advantages[:, :1].expand_as(batch.old).contiguous()
    tensors = tensors_of(batch)
    rows = batch.logits.clone().requires_grad_()
    wanted = kk.policy_loss(
        rows, batch.token_ids, batch.advantages, per_token_gradient=True, backend="reference", **tensors, **arguments
    )
    (gradient,) = torch.autograd.grad(wanted.loss, rows)
    assert gradient.abs().max() > 1e-3
    for form, pack_, how in _forms(batch):
        inside = pack_.sequence_ids >= 0
        values = {key: pack_.of(x if x.dtype == torch.bool else x.to(dtype)) for key, x in tensors.items()}
        # What is padding is masked by where it stands alone.
        values = {
            key: x | ~inside if x.dtype == torch.bool else x.masked_fill(~inside, torch.nan)
            for key, x in values.items()
        }
        advantages = pack_.of(batch.advantages).to(dtype)
        if per_sequence and form == "bounds":
            advantages = batch.advantages[:, 0].to(dtype)
        if per_sequence and form == "numbers":
            how, advantages = {"sequence_ids": pack_.sequence_ids}, batch.advantages[:, 0].to(dtype)
        one_row = form == "bounds" and per_sequence
        logits = pack_.of(batch.logits).to(dtype).masked_fill(~inside[:, None], torch.nan)
        ids = pack_.of(batch.token_ids)
        if one_row:
            values = {key: x[None] for key, x in values.items()}
            logits, ids = logits[None], ids[None]
        logits.requires_grad_()
        out = kk.policy_loss(logits, ids, advantages, backend=backend, **how, **values, **arguments)
        same(out, wanted, tolerance)
        assert out.per_token_loss.shape == ids.shape
        (got,) = torch.autograd.grad(out.loss, logits)
        expected = pack_.of(gradient).masked_fill(~inside[:, None], 0.0)
        got = got[0] if one_row else got
        assert (got.double() - expected).abs().max() <= tolerance * gradient.abs().max(), form
        assert (got[inside] != 0).any()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", TERMS)
def test_every_loss_type_and_aggregation(name: str, aggregation: str) -> None:
    for count_empty in (True, False):
        # A number of a sequence that no token has is none, so that both forms have five here.
        arguments = arguments_of(name, aggregation, count_empty)
        _padded_and_packed(name, "reference", torch.float64, 1e-10, not count_empty, arguments)


@pytest.mark.parametrize("name", ["grpo", "luspo", "gspo", "vespo", "gmpo", "topr", "sapo", "sum level"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends(backend: str, name: str) -> None:
    """Single precision, and the losses whose gradient comes with the values."""
    arguments = oracle.arguments_of(name) | {"kl_coef": 0.1, "entropy_coef": 0.2}
    _padded_and_packed(name, backend, torch.float32, 2e-5, True, arguments)


def test_definition() -> None:
    """Sequences of their own lengths, each by the formula of its tokens alone: no padded form between."""
    batch = oracle.batch()
    lengths = (4, 0, 2, 6, 1)
    form = pack(lengths)
    logits = form.of(batch.logits)[:13].clone().requires_grad_()
    ids, old, advantages = (form.of(x)[:13] for x in (batch.token_ids, batch.old, batch.advantages))
    for name in ("gspo", "gmpo", "vespo", "topr"):
        loss_type, _, term = TERMS[name]
        logprobs = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        parts = zip(*(x.split(list(lengths)) for x in (logprobs, old, advantages)), strict=True)
        sequences = [term(*x) if len(x[0]) else x[0] for x in parts]
        expected = oracle.aggregate(sequences, oracle.AGGREGATION.get(loss_type, "token-mean"), None)
        again = logits.detach().clone().requires_grad_()
        out = kk.policy_loss(
            again, ids, advantages, old_logprobs=old, cu_seqlens=form.cu_seqlens, **oracle.arguments_of(name)
        )
        assert out.loss.item() == pytest.approx(expected.item(), rel=1e-10)
        wanted, got = torch.autograd.grad(expected, logits)[0], torch.autograd.grad(out.loss, again)[0]
        assert torch.allclose(got, wanted, rtol=0, atol=1e-10 * wanted.abs().max())


@pytest.mark.parametrize("loss_type", ["gspo", "dapo", "gmpo"])
def test_no_sequence_and_no_token(loss_type: str) -> None:
    for tokens, how in (
        (0, {"cu_seqlens": torch.tensor([0])}), (0, {"cu_seqlens": torch.tensor([0, 0, 0])}),
        (2, {"cu_seqlens": torch.tensor([0])}), (0, {"sequence_ids": torch.zeros(0, dtype=torch.int64)}),
        (2, {"sequence_ids": torch.tensor([-1, -1])}),
    ):  # fmt: skip
        logits = torch.full((tokens, 7), torch.nan, requires_grad=True)
        ids = torch.zeros(tokens, dtype=torch.int64)
        count = len(how["cu_seqlens"]) - 1 if "cu_seqlens" in how else 0
        advantages = torch.zeros(tokens if "sequence_ids" in how else count)
        out = kk.policy_loss(logits, ids, advantages, loss_type=loss_type, **how)
        assert out.loss.item() == 0
        out.loss.backward()
        assert not logits.grad.any()


def test_hidden_states_and_modules() -> None:
    batch, form = oracle.batch(), pack(CUT)
    hidden = torch.randn(22, 4, requires_grad=True)
    head = torch.nn.Linear(4, 9, bias=False)
    ids, old, advantages = form.of(batch.token_ids), form.of(batch.old).float(), batch.advantages[:, 0].float()
    for options in ({"loss_type": "gspo"}, {"loss_type": "grpo"}):
        given: dict[str, Any] = {"old_logprobs": old, "cu_seqlens": form.cu_seqlens}
        wanted = kk.policy_loss(head(hidden), ids, advantages, **given, **options).loss
        expected = torch.autograd.grad(wanted, hidden)[0]
        for loss in (
            kk.linear_policy_loss(hidden, head, ids, advantages, **given, **options).loss,
            kk.nn.LinearPolicyLoss(**options)(hidden, head, ids, advantages, **given).loss,
            kk.nn.PolicyLoss(**options)(head(hidden), ids, advantages, **given).loss,
        ):
            assert torch.allclose(loss, wanted, rtol=1e-5)
            got = torch.autograd.grad(loss, hidden)[0]
            assert torch.allclose(got, expected, rtol=0, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize("form", ["cu_seqlens", "sequence_ids"])
def test_nothing_waits_and_compiles(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a GPU, where no value is looked at.
    monkeypatch.setattr(inputs.tensors, "_on_host", lambda tensor: False)
    batch, pack_ = oracle.batch(), pack(CUT)
    tensors = {key: pack_.of(x) for key, x in tensors_of(batch).items()}
    ids, advantages = pack_.of(batch.token_ids), pack_.of(batch.advantages)
    how = {form: getattr(pack_, form)}
    options = arguments_of("gspo", "seq-mean-token-mean", False)

    def loss(logits: Tensor, policy: Any = None) -> Tensor:
        return kk.policy_loss(logits, ids, advantages, **tensors, **how, **options).loss

    logits = pack_.of(batch.logits).requires_grad_()
    with NoHostValue():
        expected = loss(logits)
    (gradient,) = torch.autograd.grad(expected, logits)
    got = torch.compile(loss, backend="aot_eager", fullgraph=True)(logits)
    assert torch.allclose(got, expected)
    assert torch.allclose(torch.autograd.grad(got, logits)[0], gradient)


def test_wrong_places_make_their_tokens_nan_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs.tensors, "_on_host", lambda tensor: False)
    ids = torch.tensor([0, -2, 1, 5])
    out = kk.policy_loss(
        torch.zeros(4, 7), torch.zeros(4, dtype=torch.int64), torch.ones(2), sequence_ids=ids, loss_type="reinforce"
    )
    assert out.per_token_loss.isnan().tolist() == [False, True, False, True]
