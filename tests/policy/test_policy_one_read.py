"""Policy losses whose gradient comes out of the pass over the logits, against the composed form in float64.

The composed form is tested against formulas (test_policy.py) and against TRL (test_policy_trl.py).
"""

from __future__ import annotations

from typing import Any

import policy_oracle as oracle
import pytest
import torch
from policy_oracle import TERMS
from policy_two_forms import ONE_READ_BACKENDS, VOCAB, arguments_for, both, check
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kldiv_kernels as kk
from kldiv_kernels.policy.options import CLIPPED

pytestmark = pytest.mark.skipif(not ONE_READ_BACKENDS, reason="no backend here has the one-read form")
OF_A_TOKEN = (*CLIPPED, "cispo", "sapo", "reinforce", "topr", "dppo_tv", "dppo_kl")
BY_TOKEN = [
    name for name, (loss_type, options, _) in TERMS.items()
    if loss_type in OF_A_TOKEN and loss_type not in ("gspo", "topr") and "importance_level" not in options
]  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "own policy": {"old": None},
    "own policy sapo": {"old": None, "loss_type": "sapo"},
    "topr of a token": {"loss_type": "topr", "importance_level": "token"},
    "anchor": {"anchor": True},
    "token weights": {"weights": True},
    "temperature": {"temperature": 1.7},
    "vocabulary": {"vocab_size": 96},
    "entropy": {"entropy_coef": 0.2},
    "entropy over tokens": {"entropy_coef": 0.2, "entropy_aggregation": "token-mean"},
    **{
        f"{aggregation} {normalizer}": {"aggregation": aggregation, "normalizer": normalizer}
        for aggregation in ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum")
        for normalizer in (None, 17.0, torch.tensor([23]))
    },
    "full sequences": {"count_empty_sequences": False},
    **{
        f"{estimator} {corrected}": {"kl": True, "kl_estimator": estimator, "kl_bias_correction": corrected}
        for estimator in ("k1", "k2", "k3", "abs", "k3_plus")
        for corrected in (False, True)
        if not (corrected and estimator == "k3_plus")
    },
    "clamped k3": {"kl": True, "kl_log_ratio_clamp": 0.5, "kl_clamp": 0.1},
    "clamped k1": {"kl": True, "kl_estimator": "k1", "kl_log_ratio_clamp": 0.6, "kl_clamp": 0.4},
    **{
        f"exact {estimator}": {"exact": True, "kl_estimator": estimator, "entropy_coef": 0.1}
        for estimator in ("forward_kl", "reverse_kl", "js", "hellinger")
    },
    **{
        f"off-policy {how}": {"sampling": True, "off_policy": how, "off_policy_max": 1.1}
        for how in ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    },
    "verl": {"preset": "verl", "kl": True, "loss_type": "cispo"},
    "trl": {"preset": "trl", "kl": True, "delta": 1.3, "entropy_coef": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BY_TOKEN)
@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_terms(name: str, dtype: torch.dtype, backend: str, plan: None, passes: list[str]) -> None:
    loss_type, options, _ = TERMS[name]
    needs = {"normalizer": 30.0} if loss_type == "dr_grpo" else {}
    check(*both(oracle.batch(vocab=VOCAB), backend, dtype, loss_type=loss_type, **options, **needs))
    assert passes == ["policy_loss", "statistics"]


@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_a_tokens_loss_has_the_same_bits_in_any_batch(backend: str) -> None:
    batch = oracle.batch(vocab=VOCAB)
    arguments = arguments_for(batch, kl=True, weights=True, aggregation="token-mean")
    whole = kk.policy_loss(
        batch.logits.float().requires_grad_(), batch.token_ids, batch.advantages.float(), backend=backend, **arguments
    )
    rows = slice(1, 2)
    alone = {name: x[rows] if isinstance(x, Tensor) else x for name, x in arguments.items()}
    one = kk.policy_loss(
        batch.logits[rows].float().requires_grad_(), batch.token_ids[rows], batch.advantages[rows].float(),
        backend=backend, **alone,
    )  # fmt: skip
    assert torch.equal(one.per_token_loss, whole.per_token_loss[rows])
    assert one.per_token_loss.abs().max() > 0.1


_VIEWS = ("alias", "detach", "expand", "select", "slice", "squeeze", "unbind", "unsqueeze", "view", "_unsafe_view")


class _Launches(TorchDispatchMode):
    """Operators that are not views: on a GPU each of them is a launch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ not in _VIEWS:
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_few_operations_stand_around_the_pass(backend: str) -> None:
    """There were 98 and 217 of them before one operator had the losses and the metrics."""
    batch = oracle.batch(vocab=VOCAB)
    many = {"preset": "trl", "kl": True, "sampling": True, "entropy_coef": 0.1}
    for options, most in (({"kl": True}, 45), (many, 72)):
        logits = batch.logits.float().requires_grad_()
        arguments = arguments_for(batch, **options)
        with _Launches() as seen:
            out = kk.policy_loss(logits, batch.token_ids, batch.advantages.float(), backend=backend, **arguments)
        assert len(seen.names) <= most, seen.names
        assert seen.names.count("kldiv_kernels.policy_outcome.default") == 1
        assert out.loss.requires_grad


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_options(name: str, backend: str, plan: None, passes: list[str]) -> None:
    batch = oracle.batch(vocab=VOCAB)
    if "vocab_size" in OPTIONS[name]:
        batch.token_ids %= OPTIONS[name]["vocab_size"]
    check(*both(batch, backend, torch.float32, **OPTIONS[name]))
    assert passes == ["policy_loss", "statistics"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_whatever_the_default_dtype(backend: str, dtype: torch.dtype) -> None:
    batch = oracle.batch(vocab=VOCAB)
    arguments = arguments_for(batch, kl=True, entropy_coef=0.1)
    gradients = []
    for default in (torch.float32, dtype):
        logits = batch.logits.float().requires_grad_()
        torch.set_default_dtype(default)
        try:
            loss = kk.policy_loss(logits, batch.token_ids, batch.advantages.float(), backend=backend, **arguments).loss
            gradients += torch.autograd.grad(loss, logits)
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("normalizer", [torch.full((1, 1, 1), 7.0), torch.tensor(7.0, requires_grad=True)], ids=str)
@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_any_normalizer_of_one_element(backend: str, normalizer: Tensor) -> None:
    batch = oracle.batch(vocab=VOCAB)
    out, logits, _, _ = both(batch, backend, torch.float32, normalizer=normalizer)
    again, leaf, _, _ = both(batch, backend, torch.float32, normalizer=7.0)
    assert torch.equal(torch.autograd.grad(out.loss, logits)[0], torch.autograd.grad(again.loss, leaf)[0])


@pytest.mark.parametrize("loss_type", ["grpo", "cispo", "dppo_tv", "dppo_kl"])
@pytest.mark.parametrize("backend", [*ONE_READ_BACKENDS, "reference"])
def test_a_nan_in_old_logprobs_is_seen(backend: str, loss_type: str, plan: None) -> None:
    batch = oracle.batch(vocab=VOCAB)
    batch.old[0, 1] = torch.nan
    logits = batch.logits.float().requires_grad_()
    out = kk.policy_loss(
        logits, batch.token_ids, batch.advantages.float(), loss_type=loss_type, old_logprobs=batch.old.float(),
        mask=batch.mask, backend=backend,
    )  # fmt: skip
    assert out.loss.isnan()
    if backend != "reference":
        (got,) = torch.autograd.grad(out.loss, logits)
        assert got[0, 1].isnan().all()
        assert got.flatten(0, 1)[2:].isfinite().all()


@pytest.mark.parametrize("loss_type", ["grpo", "dppo_tv"])
@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_rows_apart(backend: str, loss_type: str, plan: None) -> None:
    """A row of NaN has NaN, a token without mass the gradient of its formula, and no other row knows of either."""
    batch = oracle.batch(vocab=VOCAB)
    batch.logits[0, 0] = torch.nan
    batch.logits[0, 1, batch.token_ids[0, 1]] = -torch.inf
    arguments = {"old_logprobs": batch.old.float(), "mask": batch.mask}
    arguments |= {"aggregation": "token-mean", "loss_type": loss_type}
    logits = batch.logits.float().requires_grad_()
    out = kk.policy_loss(logits, batch.token_ids, batch.advantages.float(), backend=backend, **arguments)
    assert out.loss.isnan()
    (got,) = torch.autograd.grad(out.loss, logits)
    assert got[0, 0].isnan().all()
    assert got.flatten(0, 1)[1:].isfinite().all()
    assert not got[~batch.mask].any()
    # Its ratio is 0: clipped away where A < 0, else without a slope. The score alone has one.
    assert got[0, 1].any() == (loss_type == "dppo_tv")
    alone = batch.logits[1:].float().requires_grad_()
    rest = {name: value[1:] if isinstance(value, Tensor) else value for name, value in arguments.items()}
    rest["normalizer"] = float(batch.mask.sum())
    fewer = kk.policy_loss(alone, batch.token_ids[1:], batch.advantages[1:].float(), backend=backend, **rest)
    assert torch.equal(got[1:], torch.autograd.grad(fewer.loss, alone)[0])


@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_all_masked(backend: str, plan: None) -> None:
    """Also where the tokens were counted, and the count is what the loss is divided by."""
    batch = oracle.batch(vocab=VOCAB)
    mask, beside = torch.zeros_like(batch.mask), torch.full(batch.mask.shape, torch.nan)
    for loss_type, options, _ in TERMS.values():
        for normalizer in (None, mask.sum(), torch.tensor(0.0)):
            if normalizer is None and loss_type == "dr_grpo":
                continue
            logits = torch.full(batch.logits.shape, torch.nan, requires_grad=True)
            out = kk.policy_loss(
                logits, batch.token_ids, batch.advantages, loss_type=loss_type, mask=mask, kl_coef=0.1,
                reference_logprobs=batch.old, old_logprobs=beside, normalizer=normalizer, backend=backend, **options,
            )  # fmt: skip
            out.loss.backward()
            assert out.loss.item() == 0, (loss_type, normalizer)
            assert not logits.grad.any(), (loss_type, normalizer)
