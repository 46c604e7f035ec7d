"""Which tokens policy_loss counts: a mask, ignored tokens, tokens without sequences, no token at all."""

from __future__ import annotations

import policy_oracle as oracle
import pytest
import torch
from policy_oracle import TERMS, arguments_of, check, leaves

import kldiv_kernels as kk


def test_ignored_tokens_are_masked() -> None:
    batch = oracle.batch()
    options = {"old_logprobs": batch.old, "entropy_coef": 0.1}
    by_mask = kk.policy_loss(batch.logits, batch.token_ids, batch.advantages, mask=batch.mask, **options)
    ids = batch.token_ids.masked_fill(~batch.mask, -100)
    assert torch.equal(by_mask.loss, kk.policy_loss(batch.logits, ids, batch.advantages, **options).loss)
    # What stands where the mask is False need not be a token at all.
    ids = batch.token_ids.masked_fill(~batch.mask, 12345)
    by_both = kk.policy_loss(batch.logits, ids, batch.advantages, mask=batch.mask, **options)
    assert torch.equal(by_mask.loss, by_both.loss)


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "sapo", "reinforce", "dppo_tv"])
def test_packed_tokens(loss_type: str) -> None:
    """[N, V] is [B, T, V] without sequences."""
    batch = oracle.batch()
    tensors = (batch.old, batch.reference, batch.sampling, batch.mask)
    names = ("old_logprobs", "reference_logprobs", "sampling_logprobs", "mask")
    options = {"loss_type": loss_type, "kl_coef": 0.1, "aggregation": "token-mean", "entropy_coef": 0.2}
    logits, again = leaves(batch)
    whole = kk.policy_loss(
        logits, batch.token_ids, batch.advantages, **dict(zip(names, tensors, strict=True)), **options
    )
    flat = dict(zip(names, (x.reshape(-1) for x in tensors), strict=True))
    packed = kk.policy_loss(
        again.reshape(-1, 9), batch.token_ids.reshape(-1), batch.advantages.reshape(-1), **flat, **options
    )
    assert packed.per_token_loss.shape == (30,)
    assert torch.allclose(packed.per_token_loss, whole.per_token_loss.reshape(-1))
    check(batch, whole.loss, logits, packed, again)


def _needs_sequences(name: str) -> bool:
    loss_type, options, _ = TERMS[name]
    return loss_type in ("gspo", "vespo", "gmpo", "topr") or "importance_level" in options


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (name, shape)
        for name in TERMS
        for shape in [(2, 3), (2, 0), (0, 3), (4,), (0,)]
        if len(shape) == 2 or not _needs_sequences(name)
    ],
    ids=str,
)
def test_no_valid_token(name: str, shape: tuple[int, ...]) -> None:
    """0 with zero gradient and finite metrics, although everything holds NaN."""
    arguments = arguments_of(name)
    if len(shape) == 1:
        arguments["aggregation"] = "token-mean"
    nan = torch.full(shape, torch.nan)
    logits = torch.full((*shape, 7), torch.nan, requires_grad=True)
    out = kk.policy_loss(
        logits, torch.zeros(shape, dtype=torch.int64), nan, old_logprobs=nan, sampling_logprobs=nan,
        reference_logprobs=nan, kl_coef=0.1, entropy_coef=0.1, mask=torch.zeros(shape, dtype=torch.bool),
        **arguments,
    )  # fmt: skip
    assert out.loss.item() == 0
    assert not out.per_token_loss.any()
    out.loss.backward()
    assert not logits.grad.any()
    assert all(value.item() == 0 for value in out.metrics.values())
