"""Policy losses whose gradient comes out of the pass over the logits, against the composed form in float64.

The composed form is tested against formulas (test_policy.py) and against TRL (test_policy_trl.py).
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import policy_oracle as oracle
import pytest
import torch
from checks import BACKENDS, CUDA_ON_HOST
from policy_oracle import TERMS
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.policy import one_read
from kldiv_kernels.policy.options import CLIPPED

ONE_READ_BACKENDS = [name for name in BACKENDS if name in ("cpu", "cuda")]
pytestmark = pytest.mark.skipif(not ONE_READ_BACKENDS, reason="no backend here has the one-read form")
VOCAB = 136
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


def _arguments(batch: oracle.Batch, **options: Any) -> dict[str, Any]:
    """Of policy_loss: float32 tensors for what the options ask for."""
    arguments: dict[str, Any] = {"mask": batch.mask}
    if options.pop("old", True):
        arguments["old_logprobs"] = batch.old.float()
    if options.pop("anchor", False):
        arguments["anchor_logprobs"] = (batch.old - 0.1).float()
    if options.pop("weights", False):
        arguments["token_weights"] = torch.rand(batch.mask.shape)
    if options.pop("sampling", False):
        arguments["sampling_logprobs"] = batch.sampling.float().masked_fill_(
            torch.rand(batch.mask.shape) < 0.1, torch.nan
        )
    if options.pop("kl", False):
        arguments |= {"reference_logprobs": batch.reference.float(), "kl_coef": 0.3}
    if options.pop("exact", False):
        arguments |= {"reference_logits": batch.reference_logits.float(), "kl_coef": 0.3}
    return arguments | options


def _both(
    batch: oracle.Batch, backend: str, dtype: torch.dtype, **options: Any
) -> tuple[kk.PolicyLoss, Tensor, kk.PolicyLoss, Tensor]:
    """The loss and its leaf in the one-read form, and composed in float64 from the same logits."""
    logits = batch.logits.to(dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    arguments = _arguments(batch, **options)
    advantages = batch.advantages.float()
    out = kk.policy_loss(logits, batch.token_ids, advantages, backend=backend, **_as(arguments, dtype))
    want = kk.policy_loss(
        exact, batch.token_ids, advantages, backend="reference", **_as(arguments, dtype, torch.float64)
    )
    return out, logits, want, exact


def _as(arguments: dict[str, Any], *dtypes: torch.dtype) -> dict[str, Any]:
    """Reference logits rounded to the first dtype, and then as the last."""
    if "reference_logits" not in arguments:
        return arguments
    reference = arguments["reference_logits"]
    for dtype in dtypes:
        reference = reference.to(dtype)
    return arguments | {"reference_logits": reference}


def _check(out: kk.PolicyLoss, logits: Tensor, want: kk.PolicyLoss, exact: Tensor) -> None:
    assert out.loss.item() == pytest.approx(want.loss.item(), rel=1e-5, abs=1e-6)
    assert out.metrics.keys() == want.metrics.keys()
    for name, value in out.metrics.items():
        assert value.item() == pytest.approx(want.metrics[name].item(), rel=1e-4, abs=1e-5), name
    # An upstream factor, and rows as large as each other: the gradient is relative to the largest of all.
    (got,), (wanted,) = torch.autograd.grad(3 * out.loss, logits), torch.autograd.grad(3 * want.loss, exact)
    largest = wanted.abs().max()
    assert largest > 1e-3
    rounding = 0 if logits.dtype == torch.float32 else 2 * torch.finfo(logits.dtype).eps
    assert ((got.double() - wanted).abs() <= 2e-5 * largest + rounding * wanted.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BY_TOKEN)
@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_terms(name: str, dtype: torch.dtype, backend: str, plan: None, passes: list[str]) -> None:
    loss_type, options, _ = TERMS[name]
    needs = {"normalizer": 30.0} if loss_type == "dr_grpo" else {}
    _check(*_both(oracle.batch(vocab=VOCAB), backend, dtype, loss_type=loss_type, **options, **needs))
    assert passes == ["policy_loss", "statistics"]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_options(name: str, backend: str, plan: None, passes: list[str]) -> None:
    batch = oracle.batch(vocab=VOCAB)
    if "vocab_size" in OPTIONS[name]:
        batch.token_ids %= OPTIONS[name]["vocab_size"]
    _check(*_both(batch, backend, torch.float32, **OPTIONS[name]))
    assert passes == ["policy_loss", "statistics"]


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "gspo"}, {"loss_type": "vespo"}, {"loss_type": "gmpo"}, {"loss_type": "topr"},
        {"importance_level": "sequence"}, {"entropy_quantile": 0.5}, {"off_policy_threshold": 0.1},
        {"cov_selection": "kl"}, {"old": None, "sampling": True}, {"exact": True, "kl_estimator": "k3"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_what_takes_two_passes(options: dict[str, Any], backend: str, passes: list[str]) -> None:
    """The gradient of a token depends on others, or on more of the row than its log-probability."""
    _check(*_both(oracle.batch(vocab=VOCAB), backend, torch.float32, **options))
    assert passes == ["statistics", "statistics"]


@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_nothing_waits_for_the_device(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = one_read.known

    def watched(*arguments: Any) -> one_read.Known:
        with oracle.NoHostValue():
            return known(*arguments)

    monkeypatch.setattr(one_read, "known", watched)
    out, *_ = _both(oracle.batch(vocab=VOCAB), backend, torch.float32, kl=True, sampling=True, entropy_coef=0.1)
    assert out.loss.isfinite()


@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_without_gradient_there_is_none(backend: str, passes: list[str]) -> None:
    batch = oracle.batch(vocab=VOCAB)
    out = kk.policy_loss(batch.logits.float(), batch.token_ids, batch.advantages, mask=batch.mask, backend=backend)
    assert not out.loss.requires_grad
    assert passes == ["statistics"]


@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_per_token_loss_has_a_gradient_where_asked_for(backend: str, passes: list[str]) -> None:
    batch = oracle.batch(vocab=VOCAB)
    plain, *_ = _both(batch, backend, torch.float32, kl=True)
    assert not plain.per_token_loss.requires_grad
    out, logits, want, exact = _both(batch, backend, torch.float32, kl=True, per_token_gradient=True)
    assert passes == ["policy_loss", "statistics", "statistics", "statistics"]
    assert torch.equal(out.per_token_loss, plain.per_token_loss)
    weights = torch.randn(batch.mask.shape)
    (got,) = torch.autograd.grad((weights * out.per_token_loss).sum(), logits)
    (wanted,) = torch.autograd.grad((weights * want.per_token_loss).sum(), exact)
    assert wanted.abs().max() > 0.1
    assert (got.double() - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_the_logits_are_not_kept(backend: str) -> None:
    """As the loss is kept, for its metrics say: neither before the backward pass nor after it."""
    batch = oracle.batch(vocab=VOCAB)
    leaf = batch.logits.float().requires_grad_()
    logits = leaf * 1
    alive = weakref.ref(logits)
    out = kk.policy_loss(logits, batch.token_ids, batch.advantages, mask=batch.mask, backend=backend)
    del logits
    gc.collect()
    assert alive() is None
    out.loss.backward()
    assert leaf.grad.any()


@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_float16_with_a_loss_scale(backend: str, passes: list[str]) -> None:
    """A gradient below float16's numbers, until it is scaled."""
    out, logits, want, exact = _both(oracle.batch(vocab=VOCAB), backend, torch.float16, normalizer=1e8)
    assert passes == ["statistics", "statistics"]
    (got,) = torch.autograd.grad(2**20 * out.loss, logits)
    (wanted,) = torch.autograd.grad(2**20 * want.loss, exact)
    assert (got.double() - wanted).abs().max() <= 2e-3 * wanted.abs().max()
    assert wanted.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_whatever_the_default_dtype(backend: str, dtype: torch.dtype) -> None:
    batch = oracle.batch(vocab=VOCAB)
    arguments = _arguments(batch, kl=True, entropy_coef=0.1)
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
    out, logits, _, _ = _both(batch, backend, torch.float32, normalizer=normalizer)
    again, leaf, _, _ = _both(batch, backend, torch.float32, normalizer=7.0)
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


@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_a_kept_graph_gives_the_same_gradient_again(backend: str) -> None:
    batch = oracle.batch(vocab=VOCAB)
    logits = batch.logits.float().requires_grad_()
    loss = kk.policy_loss(logits, batch.token_ids, batch.advantages, mask=batch.mask, backend=backend).loss / 3
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, torch.autograd.grad(loss, logits)[0])
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(
            kk.policy_loss(logits, batch.token_ids, batch.advantages, backend=backend).loss, logits, create_graph=True
        )


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
    batch = oracle.batch(vocab=VOCAB)
    logits = torch.full(batch.logits.shape, torch.nan, requires_grad=True)
    out = kk.policy_loss(
        logits, batch.token_ids, batch.advantages, mask=torch.zeros_like(batch.mask), kl_coef=0.1,
        reference_logprobs=batch.old, old_logprobs=torch.full(batch.mask.shape, torch.nan), backend=backend,
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_operators(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, fake and autograd, as torch.library checks them."""
    calls: list[tuple[Any, ...]] = []
    batch = oracle.batch(vocab=VOCAB)
    logits = batch.logits.float().requires_grad_()
    real = torch.ops.kldiv_kernels.policy
    monkeypatch.setattr(
        torch.ops.kldiv_kernels, "policy", lambda *arguments: (calls.append(arguments), real(*arguments))[1]
    )
    arguments = _arguments(batch, kl=True, entropy_coef=0.1)
    kk.policy_loss(logits, batch.token_ids, batch.advantages.float(), backend=backend, **arguments)
    monkeypatch.undo()
    torch.library.opcheck(real.default, calls[0])
    torch.library.opcheck(
        torch.ops.kldiv_kernels.with_gradient.default, (torch.tensor(2.0), logits, torch.randn_like(logits)),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
    for position, wrong, message in (
        (-3, "ppo", "policy_term must not be ppo"),
        (-2, "k9", "policy_kl must not be k9"),
        (-1, [1.0], "policy_bounds must be"),
    ):
        broken = list(calls[0])
        broken[position] = wrong
        with pytest.raises(RuntimeError, match=message):
            real(*broken)


@pytest.mark.skipif(CUDA_ON_HOST, reason="the operators are the same")
@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_torch_compile(backend: str) -> None:
    batch = oracle.batch(vocab=VOCAB)
    arguments = _arguments(batch, kl=True, entropy_coef=0.1)
    logits = batch.logits.float().requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return kk.policy_loss(x, batch.token_ids, batch.advantages.float(), backend=backend, **arguments).loss

    (eager,) = torch.autograd.grad(2 * loss(logits), logits)
    compiled = 2 * torch.compile(loss, fullgraph=True, backend="aot_eager")(logits)
    assert torch.allclose(torch.autograd.grad(compiled, logits)[0], eager, rtol=1e-6, atol=1e-9)
