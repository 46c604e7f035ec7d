"""verl's functions of raw logits, against float64."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kldiv_kernels.adapters import verl

TOKENS, VOCAB, K = 11, 41, 5


def _check(value: Tensor, expected: Tensor, logits: Tensor) -> None:
    assert value.dtype == torch.float32
    assert torch.allclose(value.double(), expected.double(), rtol=1e-5, atol=1e-5)
    upstream = torch.rand(expected.shape) + 0.5
    (got,) = torch.autograd.grad(value, logits, upstream, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected, logits, upstream.to(expected.dtype), retain_graph=True)
    largest = wanted.abs().amax(-1, keepdim=True)
    assert largest.max() > 1e-2
    assert ((got - wanted).abs() <= 2e-5 * largest + 1e-12).all()


def test_logprobs_and_entropy() -> None:
    logits = (3 * torch.randn(2, TOKENS, VOCAB)).requires_grad_()
    before = logits.detach().clone()
    labels = torch.randint(VOCAB, (2, TOKENS))
    log_q = logits.double().log_softmax(-1)
    for inplace in (True, False):
        got = verl.logprobs_from_logits(logits, labels, inplace_backward=inplace)
        _check(got, log_q.gather(-1, labels[..., None])[..., 0], logits)
    _check(verl.entropy_from_logits(logits), -(log_q.exp() * log_q).sum(-1), logits)
    assert torch.equal(logits.detach(), before)
    banned = torch.where(torch.arange(VOCAB) % 3 == 0, -torch.inf, before)
    assert torch.allclose(
        verl.entropy_from_logits(banned), verl.entropy_from_logits(before[..., torch.arange(VOCAB) % 3 != 0])
    )


def _teacher() -> tuple[Tensor, Tensor]:
    log_p, ids = torch.randn(1, TOKENS, VOCAB).mul(2).log_softmax(-1).topk(K, dim=-1)
    return log_p, ids


def _config(clamp: float | None) -> Any:
    return SimpleNamespace(distillation_loss=SimpleNamespace(log_prob_min_clamp=clamp))


@pytest.mark.parametrize("clamp", [None, -2.5])
@pytest.mark.parametrize("nested", [False, True])
def test_forward_kl_topk(clamp: float | None, nested: bool) -> None:
    logits = torch.randn(1, TOKENS, VOCAB).mul(2).requires_grad_()
    log_p, ids = _teacher()
    given = [
        torch.nested.nested_tensor([x[0, :4], x[0, 4:]], layout=torch.jagged) if nested else x for x in (log_p, ids)
    ]
    out = verl.compute_forward_kl_topk(logits, *given, config=_config(clamp), data_format="thd")

    log_q = logits.double().log_softmax(-1).gather(-1, ids)
    bound = -torch.inf if clamp is None else clamp
    p, q = log_p.double().clamp(min=bound), log_q.clamp(min=bound)
    if clamp is not None:
        assert (p == clamp).any()
        assert (q == clamp).any()
    _check(out["distillation_losses"], (p.exp() * (p - q)).sum(-1), logits)
    _check(out["student_mass"], log_q.exp().sum(-1), logits)
    assert torch.allclose(out["teacher_mass"].double(), log_p.double().exp().sum(-1))

    top = logits.detach().topk(K, dim=-1).indices
    for t in range(TOKENS):
        shared = [k for k in range(K) if ids[0, t, k] in top[0, t]]
        advantage = [(p[0, t, k].exp() * (q - p)[0, t, k]).item() for k in shared]
        assert out["overlap_count"][0, t] == len(shared)
        assert out["overlap_token_advantage"][0, t].item() == pytest.approx(
            sum(advantage) / max(1, len(shared)), rel=1e-5, abs=1e-6
        )
    assert 0 < out["overlap_count"].sum() < TOKENS * K
    assert all(x.shape == (1, TOKENS) for x in out.values())


def test_gradient_of_the_formula_and_no_teacher_probability() -> None:
    logits = torch.randn(1, TOKENS, VOCAB, requires_grad=True)
    log_p, ids = _teacher()
    log_p[..., -1] = -torch.inf
    losses = verl.compute_forward_kl_topk(logits, log_p, ids, _config(None), "thd")["distillation_losses"]
    (got,) = torch.autograd.grad(losses.sum(), logits)
    p = log_p.exp()
    wanted = p.sum(-1, keepdim=True) * logits.detach().softmax(-1)
    wanted.scatter_add_(-1, ids, -p)
    assert losses.isfinite().all()
    assert torch.allclose(got, wanted, atol=1e-6)
    sure = logits.detach().scatter(-1, ids, 9.0)
    raw = verl.compute_forward_kl_topk(sure, log_p, ids, _config(None), "thd")["distillation_losses"]
    assert (raw < 0).any()  # a raw sum, not a divergence


def test_sequence_parallel_takes_this_ranks_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(1, TOKENS, VOCAB)
    log_p, ids = _teacher()
    whole = verl.compute_forward_kl_topk(logits, log_p, ids, _config(None), "thd")["distillation_losses"]
    ulysses: Any = ModuleType("verl.utils.ulysses")
    ulysses.get_ulysses_sequence_parallel_world_size = lambda: 2
    ulysses.slice_input_tensor = lambda x, dim: x.narrow(dim, 3, 4)
    monkeypatch.setitem(sys.modules, "verl.utils.ulysses", ulysses)
    part = verl.compute_forward_kl_topk(logits[:, 3:7], log_p, ids, _config(None), "thd")["distillation_losses"]
    assert torch.allclose(part, whole[:, 3:7])


def test_bad_calls() -> None:
    logits = torch.randn(1, TOKENS, VOCAB)
    log_p, ids = _teacher()
    for error, message, arguments in (
        (ValueError, r"teacher_topk_ids has shape \[1, 10, 5\]; expected \[1, 11, 'K'\]", (log_p, ids[:, 1:])),
        (ValueError, r"teacher_topk_log_probs has shape \[1, 11, 4\]", (log_p[..., 1:], ids)),
        (IndexError, r"compute_forward_kl_topk: teacher_topk_ids\[0, 0, 0\] is", (log_p, ids + VOCAB)),
    ):
        with pytest.raises(error, match=message):
            verl.compute_forward_kl_topk(logits, *arguments, _config(None), "thd")
