"""CONTRIBUTING.md, "add a divergence", step by step: register one, use it everywhere, check it, remove it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import kldiv_kernels as kk

NAME = "exponential"


def _register() -> None:
    """The exponential divergence Σ p (log p − log q)²: its value and both derivatives by the logarithms."""
    kk.register_statistic(
        NAME,
        formula="Σ p (log p − log q)²",
        value=lambda logp, logq: logp.exp() * (logp - logq) ** 2,
        grad_logq=lambda logp, logq: -2 * logp.exp() * (logp - logq),
        grad_logp=lambda logp, logq: logp.exp() * ((logp - logq) ** 2 + 2 * (logp - logq)),
    )


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    _register()
    yield
    kk.unregister_statistic(NAME)


def _by_autograd(logits: Tensor, reference: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    s, t = (x.detach().double().requires_grad_() for x in (logits, reference))
    logq, logp = (s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
    value = (logp.exp() * (logp - logq) ** 2).sum(-1)
    return value.detach(), *torch.autograd.grad(value.sum(), [s, t])


def test_value_and_gradients() -> None:
    logits, reference = torch.randn(2, 5, 301, requires_grad=True), torch.randn(2, 5, 301, requires_grad=True)
    value = kk.token_stats(logits, reference, stats=[NAME], temperature=0.7)[NAME]
    value.sum().backward()
    expected, student, teacher = _by_autograd(logits, reference, 0.7)
    assert torch.allclose(value.double(), expected, rtol=1e-5)
    assert torch.allclose(logits.grad.double(), student, atol=1e-5 * student.abs().max().item())
    assert torch.allclose(reference.grad.double(), teacher, atol=1e-5 * teacher.abs().max().item())


def test_every_function_of_the_package_serves_it() -> None:
    logits, reference = torch.randn(6, 40, dtype=torch.float64), torch.randn(6, 40, dtype=torch.float64)
    mask = torch.tensor([1, 1, 0, 1, 0, 1])
    value, student, _ = _by_autograd(logits, reference, 1.0)
    for loss in (
        lambda x: kk.divergence_loss(x, reference, NAME, mask=mask),
        lambda x: kk.nn.DivergenceLoss(NAME)(x, reference, mask=mask),
    ):
        x = logits.clone().requires_grad_()
        loss(x).backward()
        assert loss(logits).item() == pytest.approx((value * mask).sum().item() / 4, rel=1e-12)
        assert torch.allclose(x.grad, student * mask[:, None] / 4, atol=1e-14)


def test_parameters_reach_the_functions() -> None:
    kk.register_statistic(
        "scaled_squares",
        value=lambda logp, logq, alpha, beta: alpha * (logp.exp() - beta * logq.exp()) ** 2,
        grad_logq=lambda logp, logq, alpha, beta: -2 * alpha * beta * (logp.exp() - beta * logq.exp()) * logq.exp(),
        grad_logp=lambda logp, logq, alpha, beta: 2 * alpha * (logp.exp() - beta * logq.exp()) * logp.exp(),
    )
    try:
        x, t = torch.randn(3, 9, dtype=torch.float64, requires_grad=True), torch.randn(3, 9, dtype=torch.float64)
        alpha = torch.tensor([1.0, 2.0, 3.0])
        value = kk.token_stats(x, t, stats=["scaled_squares"], alpha=alpha, beta=0.25).scaled_squares
        expected = alpha * ((t.softmax(-1) - 0.25 * x.softmax(-1)) ** 2).sum(-1)
        assert torch.allclose(value, expected)
        (wanted,) = torch.autograd.grad(expected.sum(), x)
        value.sum().backward()
        assert torch.allclose(x.grad, wanted)
        loss = kk.divergence_loss(x, t, "scaled_squares", alpha=alpha, beta=0.25)
        assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-12)
        with pytest.raises(ValueError, match=f"alpha is 2.0, which kind '{NAME}' has no use for; .*, scaled_squares$"):
            kk.divergence_loss(x, t, NAME, alpha=2.0)
    finally:
        kk.unregister_statistic("scaled_squares")


def test_a_compiled_backend_says_that_it_does_not_have_it() -> None:
    logits = torch.randn(2, 9)
    assert kk.backends()["reference"] == "available"
    with pytest.raises(ValueError, match=f"backend 'cpu' cannot serve this call: .*({NAME}|not built)"):
        kk.token_stats(logits, logits, stats=[NAME], backend="cpu")


def test_registering_twice_and_removing() -> None:
    with pytest.raises(ValueError, match=f"register_statistic: name '{NAME}' is taken"):
        _register()
    with pytest.raises(ValueError, match="unregister_statistic: 'forward_kl' is not a statistic added by"):
        kk.unregister_statistic("forward_kl")
    with pytest.raises(ValueError, match="name is 'two words'; expected a Python identifier"):
        kk.register_statistic("two words", value=torch.add, grad_logq=torch.add, grad_logp=torch.add)
    with pytest.raises(TypeError, match="grad_logq is NoneType; expected a function"):
        kk.register_statistic("half", value=lambda logp, logq: logp, grad_logq=None, grad_logp=torch.add)
    with pytest.raises(ValueError, match="unknown statistic 'half'"):
        kk.token_stats(torch.zeros(1, 3), torch.zeros(1, 3), stats=["half"])
