"""How policy_loss runs: one call reads the logits, no value is waited for, every backend, the module, torch.compile."""

from __future__ import annotations

from typing import Any

import policy_oracle as oracle
import pytest
import torch
from checks import BACKENDS
from policy_oracle import TERMS, NoHostValue, arguments_of, leaves
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels import ops
from kldiv_kernels.backends import Call
from kldiv_kernels.policy import loss as policy


@pytest.mark.parametrize("name", [*TERMS, "clip-cov", "kl-cov"])
def test_nothing_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, assemble = oracle.batch(), policy.assemble

    def watched(*arguments: Any) -> kk.PolicyLoss:
        with NoHostValue():
            return assemble(*arguments)

    monkeypatch.setattr(policy, "assemble", watched)
    cov = name.endswith("-cov")
    arguments = {"cov_selection": name[:-4]} if cov else arguments_of(name)
    more = {} if arguments.get("loss_type") == "gmpo" else {"entropy_quantile": 0.5}
    out = kk.policy_loss(
        batch.logits, batch.token_ids, batch.advantages, mask=batch.mask, old_logprobs=batch.old, kl_coef=0.1,
        reference_logprobs=batch.reference, sampling_logprobs=batch.sampling, entropy_coef=0.1,
        off_policy_threshold=0.1, **more, **arguments,
    )  # fmt: skip
    assert out.loss.isfinite()


@pytest.mark.parametrize("estimator", ["k3", "reverse_kl"])
def test_the_logits_are_read_by_one_call(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = oracle.batch()
    calls: list[tuple[str, ...]] = []

    def counted(call: Call, *arguments: Any) -> Tensor:
        calls.append(call.stats)
        return statistics(call, *arguments)

    statistics = ops.statistics
    monkeypatch.setattr(ops, "statistics", counted)
    kk.policy_loss(
        batch.logits, batch.token_ids, batch.advantages, reference_logits=batch.reference_logits, kl_coef=0.1,
        kl_estimator=estimator, entropy_coef=0.1, entropy_quantile=0.5,
    )  # fmt: skip
    assert calls == [("logprob", "entropy", "reference_logprob" if estimator == "k3" else estimator)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends(backend: str, dtype: torch.dtype) -> None:
    """Everything at once, in float32 and bfloat16, against float64 on the same logits."""
    batch = oracle.batch()
    options = {"kl_coef": 0.1, "kl_estimator": "reverse_kl", "entropy_coef": 0.05, "mask": batch.mask}
    logits = batch.logits.to(dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    reference = batch.reference_logits.to(dtype)
    rest = {"old_logprobs": batch.old.float(), **options}
    advantages = batch.advantages.float()
    out = kk.policy_loss(logits, batch.token_ids, advantages, reference_logits=reference, backend=backend, **rest)
    want = kk.policy_loss(
        exact, batch.token_ids, advantages, reference_logits=reference.double(), backend="reference", **rest
    )
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(want.loss.item(), rel=1e-5)
    out.loss.backward()
    want.loss.backward()
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    assert torch.allclose(logits.grad.double(), exact.grad, rtol=tolerance, atol=tolerance * exact.grad.abs().max())


def test_module() -> None:
    batch = oracle.batch()
    module = kk.nn.PolicyLoss(preset="verl", loss_type="cispo", clip_high=0.3, temperature=0.7)
    tensors = {"old_logprobs": batch.old, "mask": batch.mask}
    got = module(batch.logits, batch.token_ids, batch.advantages, **tensors)
    options = {"preset": "verl", "loss_type": "cispo", "clip_high": 0.3, "temperature": 0.7}
    expected = kk.policy_loss(batch.logits, batch.token_ids, batch.advantages, **tensors, **options)
    assert torch.equal(got.loss, expected.loss)
    assert repr(module) == "PolicyLoss(preset='verl', loss_type='cispo', clip_high=0.3, temperature=0.7)"


@pytest.mark.parametrize("preset", [None, "trl", "verl"])
def test_torch_compile(preset: str | None) -> None:
    """One graph, the same loss and gradient."""
    batch = oracle.batch()
    logits, again = leaves(batch)

    def loss(x: Tensor) -> Tensor:
        return kk.policy_loss(
            x, batch.token_ids, batch.advantages, old_logprobs=batch.old, mask=batch.mask, preset=preset,
            sampling_logprobs=batch.sampling, entropy_coef=0.1, entropy_quantile=0.5,
        ).loss  # fmt: skip

    expected, got = loss(logits), torch.compile(loss, backend="aot_eager", fullgraph=True)(again)
    assert torch.allclose(expected, got)
    assert torch.allclose(*(torch.autograd.grad(y, x)[0] for y, x in ((expected, logits), (got, again))))
