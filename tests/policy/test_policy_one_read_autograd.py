"""Policy losses read once: which calls are, and what autograd, torch.library and torch.compile see of them."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import policy_oracle as oracle
import pytest
import torch
from checks import CUDA_ON_HOST
from policy_two_forms import ONE_READ_BACKENDS, VOCAB, arguments_for, both, check
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.policy import one_read
from kldiv_kernels.sources import PolicyTokens

pytestmark = pytest.mark.skipif(not ONE_READ_BACKENDS, reason="no backend here has the one-read form")


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
    check(*both(oracle.batch(vocab=VOCAB), backend, torch.float32, **options))
    assert passes == ["statistics", "statistics"]


@pytest.mark.parametrize("backend", ONE_READ_BACKENDS)
def test_nothing_waits_for_the_device(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = one_read.known

    def watched(*arguments: Any) -> PolicyTokens:
        with oracle.NoHostValue():
            return known(*arguments)

    monkeypatch.setattr(one_read, "known", watched)
    out, *_ = both(oracle.batch(vocab=VOCAB), backend, torch.float32, kl=True, sampling=True, entropy_coef=0.1)
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
    plain, *_ = both(batch, backend, torch.float32, kl=True)
    assert not plain.per_token_loss.requires_grad
    out, logits, want, exact = both(batch, backend, torch.float32, kl=True, per_token_gradient=True)
    assert passes == ["policy_loss", "statistics", "statistics", "statistics"]
    torch.testing.assert_close(out.per_token_loss, plain.per_token_loss, rtol=1e-6, atol=1e-6)
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
    out, logits, want, exact = both(oracle.batch(vocab=VOCAB), backend, torch.float16, normalizer=1e8)
    assert passes == ["statistics", "statistics"]
    (got,) = torch.autograd.grad(2**20 * out.loss, logits)
    (wanted,) = torch.autograd.grad(2**20 * want.loss, exact)
    assert (got.double() - wanted).abs().max() <= 2e-3 * wanted.abs().max()
    assert wanted.any()


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
    arguments = arguments_for(batch, kl=True, entropy_coef=0.1)
    kk.policy_loss(logits, batch.token_ids, batch.advantages.float(), backend=backend, **arguments)
    monkeypatch.undo()
    torch.library.opcheck(real.default, calls[0])
    torch.library.opcheck(
        torch.ops.kldiv_kernels.with_gradients.default, (torch.tensor(2.0), [logits], [torch.randn_like(logits)]),
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
    arguments = arguments_for(batch, kl=True, entropy_coef=0.1)
    logits = batch.logits.float().requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return kk.policy_loss(x, batch.token_ids, batch.advantages.float(), backend=backend, **arguments).loss

    (eager,) = torch.autograd.grad(2 * loss(logits), logits)
    compiled = 2 * torch.compile(loss, fullgraph=True, backend="aot_eager")(logits)
    assert torch.allclose(torch.autograd.grad(compiled, logits)[0], eager, rtol=1e-6, atol=1e-9)
