"""Reduced losses: their reductions, weights and masks, padded and excluded columns."""

from __future__ import annotations

import oracle
import pytest
import torch
from checks import BACKENDS, check_gradient
from logit_pairs import pair
from torch import Tensor

import kldiv_kernels as kk


def _options(which: str) -> tuple[dict[str, object], Tensor]:
    """Arguments of a loss, and the coefficient that each token's divergence must take in the sum."""
    weight, mask, labels = torch.randn(3, 4), torch.rand(3, 4) < 0.6, torch.randint(57, (3, 4))
    labels[0], labels[2, 1] = -100, -100
    mask[1, 1], mask[0, 0], labels[1, 1] = True, True, 5
    given = labels != -100
    return {
        "plain": ({}, torch.ones(3, 4) / 12),
        "weight": ({"weight": weight}, weight / 12),
        "mask": ({"mask": mask}, mask / mask.sum()),
        "integer mask": ({"mask": 3 * mask.int()}, mask / mask.sum()),
        "labels": ({"labels": labels}, given / given.sum()),
        "labels and mask": ({"labels": labels, "mask": mask}, (given & mask) / (given & mask).sum()),
        "ignore_index": ({"labels": labels, "ignore_index": 5}, (labels != 5) / (labels != 5).sum()),
        "normalizer": ({"normalizer": 7.5, "mask": mask}, mask / 7.5),
        "tensor normalizer": ({"normalizer": torch.tensor([40]), "weight": weight}, weight / 40),
        "sum": ({"reduction": "sum", "weight": weight, "mask": mask}, weight * mask),
        "sum ignores normalizer": ({"reduction": "sum", "normalizer": 5.0}, torch.ones(3, 4)),
        "temperature squared": ({"temperature_squared": True, "temperature": 1.7}, 1.7**2 * torch.ones(3, 4) / 12),
    }[which]  # type: ignore[return-value]


WHICH = ["plain", "weight", "mask", "integer mask", "labels", "labels and mask", "ignore_index", "normalizer",
         "tensor normalizer", "sum", "sum ignores normalizer", "temperature squared"]  # fmt: skip


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("backend", BACKENDS)
def test_reductions(which: str, backend: str) -> None:
    logits, reference = pair()
    options, coefficient = _options(which)
    temperature = options.get("temperature", 1.0)
    expected = oracle.evaluate("reverse_kl", logits, reference, cotangent=coefficient, temperature=temperature)
    loss = kk.divergence_loss(logits, reference, "reverse_kl", backend=backend, **options)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert loss.item() == pytest.approx((coefficient * expected.value).sum().item(), rel=2e-5, abs=1e-6)
    loss.backward()
    check_gradient(logits.grad, expected.student, expected.student_floor)


@pytest.mark.parametrize("which", [name for name in WHICH if not name.startswith(("sum", "normalizer", "tensor"))])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_reduction(which: str, backend: str) -> None:
    """ "none" gives weight·D per token; its gradient is that of the sum times whatever comes from above."""
    logits, reference = pair()
    options, coefficient = _options(which)
    tokens = (coefficient != 0).sum() if which != "plain" else 12
    coefficient = coefficient * tokens
    temperature = options.get("temperature", 1.0)
    upstream = torch.randn(3, 4)
    losses = kk.divergence_loss(logits, reference, "js", reduction="none", beta=0.2, backend=backend, **options)
    assert losses.shape == (3, 4)
    expected = oracle.evaluate(
        "js", logits, reference, beta=0.2, temperature=temperature, cotangent=coefficient * upstream
    )
    assert torch.allclose(losses.double(), coefficient * expected.value, rtol=2e-5, atol=1e-6)
    losses.backward(upstream)
    check_gradient(logits.grad, expected.student, expected.student_floor)


@pytest.mark.parametrize("backend", BACKENDS)
def test_temperature_squared_per_token(backend: str) -> None:
    logits, reference = pair()
    temperature = torch.rand(3, 4) + 0.5
    loss = kk.forward_kl(logits, reference, temperature=temperature, temperature_squared=True, backend=backend)
    expected = oracle.evaluate("forward_kl", logits, reference, temperature=temperature, cotangent=temperature**2 / 12)
    assert loss.item() == pytest.approx((temperature**2 * expected.value).mean().item(), rel=1e-5)
    loss.backward()
    check_gradient(logits.grad, expected.student, expected.student_floor)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("how", ["mask", "labels", "no tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_valid_token(how: str, reduction: str, dtype: torch.dtype, backend: str) -> None:
    """0 with zero gradient, not NaN, even where the rows that are left out hold NaN."""
    logits = torch.full((0 if how == "no tokens" else 2, 9), torch.nan, dtype=dtype, requires_grad=True)
    options: dict[str, Tensor] = {
        "mask": {"mask": torch.zeros(2)[:, None].bool()[:, 0]},
        "labels": {"labels": torch.full((2,), -100)},
        "no tokens": {},
    }[how]
    loss = kk.divergence_loss(logits, logits.detach(), "js", reduction=reduction, backend=backend, **options)
    assert not loss.any()
    loss.sum().backward()
    assert logits.grad.shape == logits.shape
    assert not logits.grad.any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js", "tvd"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_gradients_wait_for_the_loss_scale(
    backend: str, kind: str, reduction: str, plan: None, passes: list[str]
) -> None:
    """Eight rows of a batch of 2,048 tokens: gradients below float16's numbers, until they are scaled."""
    logits, reference = (torch.randn(8, 4096).half().requires_grad_() for _ in range(2))
    tokens = 2048.0
    options = {"normalizer": tokens} if reduction == "mean" else {"weight": torch.full((8,), 1 / tokens)}
    loss = kk.divergence_loss(logits, reference, kind, reduction=reduction, backend=backend, **options)
    assert passes == ["statistics"]
    sides = torch.autograd.grad(65_536 * loss, [logits, reference])
    cotangent = torch.full((8,), 65_536 / tokens)
    expected = oracle.evaluate(kind, logits.detach(), reference.detach(), cotangent=cotangent)
    for got, wanted, floor in zip(
        sides, (expected.student, expected.teacher), (expected.student_floor, expected.teacher_floor), strict=True
    ):
        check_gradient(got, wanted, floor)
        assert ((got == 0) == (wanted.half() == 0)).double().mean() > 0.999
    # One side alone, of which the other's dtype does not matter.
    passes.clear()
    kk.divergence_loss(logits.detach().float().requires_grad_(), reference.detach(), kind, backend=backend)
    kk.divergence_loss(logits.detach(), reference.detach().float().requires_grad_(), kind, backend=backend)
    assert passes == ["loss", "loss"]
    kk.divergence_loss(logits.detach().float(), reference, kind, backend=backend)
    assert passes[2:] == ["statistics"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weight_zero_leaves_an_infinite_value_out(reduction: str, backend: str) -> None:
    logits, reference = torch.randn(3, 8), torch.randn(3, 8)
    logits[1, 2] = -torch.inf
    logits.requires_grad_()
    weight = torch.tensor([1.0, 0.0, 2.0])
    loss = kk.forward_kl(logits, reference, weight=weight, reduction=reduction, backend=backend)
    assert loss.isfinite().all()
    loss.sum().backward()
    assert logits.grad[[0, 2]].any(dim=1).all()
    assert not logits.grad[1].any()
    heavy = kk.forward_kl(logits, reference, weight=torch.ones(3), reduction="none", backend=backend)
    assert heavy[1] == torch.inf


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_columns(backend: str) -> None:
    """Columns from vocab_size on are never read, and the two rows may have different widths."""
    logits, reference = pair()
    reference.requires_grad_()
    plain = kk.js_divergence(logits, reference, backend=backend)
    wanted, wanted_reference = torch.autograd.grad(plain, [logits, reference])
    wide = torch.cat([logits.detach(), torch.full((3, 4, 7), torch.nan)], -1).requires_grad_()
    wider = torch.cat([reference.detach(), torch.full((3, 4, 20), torch.inf)], -1).requires_grad_()
    loss = kk.js_divergence(wide, wider, vocab_size=57, backend=backend)
    loss.backward()
    assert torch.equal(loss, plain)
    for gradient, unpadded in ((wide.grad, wanted), (wider.grad, wanted_reference)):
        assert torch.equal(gradient[..., :57], unpadded)
        assert not gradient[..., 57:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_excluded_column(backend: str) -> None:
    """Both softmaxes leave the column out: the same as −inf there in both rows."""
    logits, reference = pair()
    exclude = torch.randint(57, (3, 4))
    exclude[0, 0] = -1
    out = torch.arange(57) == exclude[..., None]
    loss = kk.jeffreys(logits, reference, exclude=exclude, backend=backend)
    loss.backward()
    x = logits.detach().masked_fill(out, -torch.inf).requires_grad_()
    same = kk.jeffreys(x, reference.masked_fill(out, -torch.inf), backend=backend)
    same.backward()
    assert torch.allclose(loss, same, rtol=1e-6)
    assert torch.allclose(logits.grad, x.grad, atol=1e-7)
    assert not logits.grad[out].any()
    assert not torch.allclose(loss, kk.jeffreys(logits, reference, backend=backend), rtol=1e-3)
