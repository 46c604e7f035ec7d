"""shift=True: a model's own labels, without slices of the logits; the same numbers as with slices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import BACKENDS
from torch import Tensor

import kldiv_kernels as kk

BATCH, TOKENS, VOCAB = 3, 7, 61


def _sequences() -> dict[str, Tensor]:
    """Prompts and padding as a collator leaves them: −100 in the labels, 0 in the mask."""
    logits, reference = 2 * torch.randn(BATCH, TOKENS, VOCAB), 2 * torch.randn(BATCH, TOKENS, VOCAB)
    labels = torch.randint(0, VOCAB, (BATCH, TOKENS))
    mask = torch.ones(BATCH, TOKENS, dtype=torch.int64)
    labels[0, :3], labels[1, 5:], mask[1, 5:], mask[2, 6] = -100, -100, 0, 0
    return {
        "logits": logits,
        "reference": reference,
        "labels": labels,
        "mask": mask,
        "weight": torch.rand(BATCH, TOKENS),
    }


def _gradient(loss: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = loss(x)
    value.sum().backward()
    assert x.grad is not None
    return value.detach(), x.grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"normalizer": 5.0, "temperature": 2.0}], ids=str)
def test_losses(options: dict[str, Any], backend: str) -> None:
    s = _sequences()
    reference, options = s["reference"], {**options, "backend": backend}
    rows = {name: s[name] for name in ("labels", "mask", "weight")} | {"exclude": s["labels"].clamp_min(-1)}
    later = {name: tensor[:, 1:] for name, tensor in rows.items()}
    ids = reference.topk(4, dim=-1).indices
    logprobs = kk.selective_log_softmax(reference, ids)
    given, moved = ({name: x for name, x in some.items() if name != "exclude"} for some in (rows, later))
    fixed = {name: x for name, x in options.items() if name != "normalizer"}
    batch = {name: x for name, x in options.items() if name == "normalizer"}
    calls = [
        (
            lambda x: kk.divergence_loss(x, reference, "js", **rows, **options, shift=True),
            lambda x: kk.divergence_loss(x[:, :-1], reference[:, :-1], "js", **later, **options),
        ),
        (
            lambda x: kk.nn.KLDivLoss(**fixed, shift=True)(x, reference, labels=s["labels"], **batch),
            lambda x: kk.forward_kl(x[:, :-1], reference[:, :-1], labels=s["labels"][:, 1:], **options),
        ),
        (
            lambda x: kk.topk_divergence_loss(x, ids, logprobs, "reverse_kl", **given, **options, shift=True),
            lambda x: kk.topk_divergence_loss(
                x[:, :-1], ids[:, :-1], logprobs[:, :-1], "reverse_kl", **moved, **options
            ),
        ),
        (
            lambda x: kk.topk_divergence_from_logits(x, reference, k=4, **given, **options, shift=True),
            lambda x: kk.topk_divergence_from_logits(x[:, :-1], reference[:, :-1], k=4, **moved, **options),
        ),
    ]
    for by_shift, by_slices in calls:
        value, gradient = _gradient(by_shift, s["logits"])
        expected, wanted = _gradient(by_slices, s["logits"])
        if value.dim():
            assert (value[:, -1] == 0).all()
            value = value[:, :-1]
        assert torch.allclose(value, expected, rtol=1e-6)
        assert (gradient[:, -1] == 0).all()
        assert torch.allclose(gradient, wanted, rtol=1e-5, atol=1e-8)


def test_unshifted_labels_are_another_loss() -> None:
    s = _sequences()
    plain, shifted = (kk.forward_kl(s["logits"], s["reference"], labels=s["labels"], shift=x) for x in (False, True))
    assert not torch.allclose(plain, shifted, rtol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics(backend: str) -> None:
    s = _sequences()
    logits, labels = s["logits"], s["labels"]
    stats = ("logprob", "entropy", "forward_kl")
    options = {"stats": stats, "backend": backend}
    found = kk.token_stats(logits, s["reference"], labels, mask=s["mask"], shift=True, **options)
    expected = kk.token_stats(logits[:, :-1], s["reference"][:, :-1], labels[:, 1:], mask=s["mask"][:, 1:], **options)
    for name in stats:
        assert torch.equal(found[name][:, :-1], expected[name])
        assert (found[name][:, -1] == 0).all()
    many = torch.stack([labels, labels.roll(1, 0)], -1)
    assert torch.equal(
        kk.selective_log_softmax(logits, many, shift=True, backend=backend)[:, :-1],
        kk.selective_log_softmax(logits[:, :-1], many[:, 1:], backend=backend),
    )
    ids = torch.arange(5).expand(BATCH, TOKENS, 5)
    top = {"stats": ("topk_logprobs", "logprob"), "backend": backend}
    found = kk.topk_token_stats(logits, ids, labels, shift=True, **top)
    expected = kk.topk_token_stats(logits[:, :-1], ids[:, :-1], labels[:, 1:], **top)
    assert torch.equal(found.logprob[:, :-1], expected.logprob)
    assert torch.equal(found.topk_logprobs[:, :-1], expected.topk_logprobs)


def test_what_cannot_be_shifted() -> None:
    row, labels = torch.zeros(VOCAB), torch.zeros(BATCH, TOKENS, dtype=torch.int64)
    logits = torch.zeros(BATCH, TOKENS, VOCAB)
    with pytest.raises(ValueError, match=r"shift is True, but logits has shape \[61\]; expected \["):
        kk.divergence_loss(row, row, shift=True)
    with pytest.raises(TypeError, match="token_stats: shift is 1; expected True or False"):
        kk.token_stats(logits, labels=labels, shift=1)
    with pytest.raises(ValueError, match=r"labels has shape \[3, 6\]; expected \[3, 7\], one a token, before"):
        kk.divergence_loss(logits, logits, labels=labels[:, 1:], shift=True)
    # A sequence of one token predicts nothing.
    assert kk.divergence_loss(logits[:, :1], 1 - logits[:, :1], labels=labels[:, :1], shift=True) == 0
