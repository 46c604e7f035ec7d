"""Top-k divergences as other projects compute them: TRL by its own functions, the others by their formulas."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kldiv_kernels as kk

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
SHAPE, K = (2, 4, 40), 6


def _rows() -> tuple[Tensor, Tensor]:
    student = 2 * torch.randn(SHAPE, dtype=torch.float64)
    return student, student + torch.randn(SHAPE, dtype=torch.float64)


def _same(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], student: Tensor) -> None:
    first, second = student.clone().requires_grad_(), student.clone().requires_grad_()
    got, wanted = ours(first), theirs(second)
    assert torch.allclose(got, wanted, rtol=1e-10, atol=1e-12)
    weights = torch.rand(wanted.shape, dtype=torch.float64) + 0.5
    (mine,) = torch.autograd.grad((weights * got).sum(), first)
    (expected,) = torch.autograd.grad((weights * wanted).sum(), second)
    assert expected.abs().max() > 1e-3
    assert torch.allclose(mine, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("with_tail", [False, True])
def test_trl_sdft(alpha: float, with_tail: bool) -> None:
    """The student's tokens; what TRL calls alpha is beta here."""
    losses = pytest.importorskip("trl.experimental.sdft.loss_utils")
    student, teacher = _rows()
    _same(
        lambda x: kk.topk_divergence_from_logits(
            x, teacher, "js", k=K, support="student", tail="bucket" if with_tail else "renormalize", beta=alpha,
            reduction="none",
        ),
        lambda x: losses.compute_topk_self_distillation_loss(
            x, teacher, distillation_topk=K, distillation_alpha=alpha, distillation_add_tail=with_tail
        ),
        student,
    )  # fmt: skip


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("with_tail", [False, True])
def test_trl_iw_opd(beta: float, with_tail: bool) -> None:
    """The teacher's tokens for forward KL, the student's for reverse KL, both for what is between."""
    trainer = pytest.importorskip("trl.experimental.iw_opd.iw_opd_trainer").IWOPDTrainer
    student, teacher = _rows()
    support = {0.0: "teacher", 1.0: "student"}.get(beta, "union")
    _same(
        lambda x: kk.topk_divergence_from_logits(
            x, teacher, "js", k=K, support=support, tail="bucket" if with_tail else "renormalize", beta=beta,
            temperature=1.3, reduction="sum",
        ),
        lambda x: trainer.generalized_jsd_loss(
            x, teacher, beta=beta, temperature=1.3, reduction="sum", top_k=K, add_tail=with_tail
        ),
        student,
    )  # fmt: skip


def test_trl_where_the_student_is_sure() -> None:
    """TRL's tail is a constant above 1 − 1e-7: no gradient reaches the rest. Ours has the one of the formula."""
    losses = pytest.importorskip("trl.experimental.sdft.loss_utils")
    student, teacher = _rows()
    student[..., 0] += 40.0
    x = student.clone().requires_grad_()
    kk.topk_divergence_from_logits(x, teacher, k=1, support="student", reduction="sum").backward()
    y = student.clone().requires_grad_()
    losses.compute_topk_self_distillation_loss(
        y, teacher, distillation_topk=1, distillation_alpha=0.0, distillation_add_tail=True
    ).sum().backward()
    q, p_rest = student.softmax(-1), 1 - teacher.softmax(-1)[..., :1]
    rest = q[..., 1:]
    expected = rest - p_rest * rest / rest.sum(-1, keepdim=True)
    assert torch.allclose(x.grad[..., 1:], expected, rtol=1e-8)
    assert expected.abs().max() > 0.1
    assert y.grad[..., 1:].abs().max() < 1e-3 * expected.abs().max()


def _teacher(teacher: Tensor) -> tuple[Tensor, Tensor]:
    top = teacher.log_softmax(-1).topk(K, -1)
    return top.indices, top.values


def test_verl_forward_kl_topk() -> None:
    """Σ_I p (log p − log q), neither side renormalised; without verl's clamps."""
    student, teacher = _rows()
    ids, logprobs = _teacher(teacher)
    _same(
        lambda x: kk.topk_divergence_loss(x, ids, logprobs, tail="none", reduction="none"),
        lambda x: (logprobs.exp() * (logprobs - x.log_softmax(-1).gather(-1, ids))).sum(-1),
        student,
    )


def test_nemo_rl_renormalised() -> None:
    """log_softmax over the k gathered logits on both sides; mixed_kl_weight is the share of forward KL."""
    student, teacher = _rows()
    ids, logprobs = _teacher(teacher)
    share = 0.3

    def ours(x: Tensor) -> Tensor:
        forward, reverse = (
            kk.topk_divergence_loss(x, ids, logprobs, kind, tail="renormalize", reduction="none")
            for kind in ("forward_kl", "reverse_kl")
        )
        return share * forward + (1 - share) * reverse

    def theirs(x: Tensor) -> Tensor:
        q, p = (y.gather(-1, ids).log_softmax(-1) for y in (x, teacher))
        return (share * p.exp() * (p - q) + (1 - share) * q.exp() * (q - p)).sum(-1)

    _same(ours, theirs, student)


def test_distillkit_zero() -> None:
    """Missing probability is zero: the teacher renormalised over its k tokens, the student not."""
    student, teacher = _rows()
    ids, logprobs = _teacher(teacher)
    p = logprobs.log_softmax(-1)
    _same(
        lambda x: kk.topk_divergence_loss(x, ids, logprobs, tail="renormalize_teacher", reduction="none"),
        lambda x: (p.exp() * (p - x.log_softmax(-1).gather(-1, ids))).sum(-1),
        student,
    )


def test_distillkit_symmetric_uniform() -> None:
    """Missing probability is uniform on both sides: as if it were one more token."""
    student, teacher = _rows()
    ids, logprobs = _teacher(teacher)
    missing = 1 - logprobs.exp().sum(-1)

    def theirs(x: Tensor) -> Tensor:
        q = x.log_softmax(-1).gather(-1, ids)
        of_student = 1 - q.exp().sum(-1)
        return (logprobs.exp() * (logprobs - q)).sum(-1) + missing * (missing / of_student).log()

    _same(lambda x: kk.topk_divergence_loss(x, ids, logprobs, reduction="none"), theirs, student)


def test_the_module() -> None:
    student, teacher = _rows()
    ids, logprobs = _teacher(teacher)
    criterion = kk.nn.TopKDivergenceLoss("js", beta=0.3, tail="renormalize")
    mask = torch.rand(SHAPE[:2]) < 0.7
    expected = kk.topk_divergence_loss(student, ids, logprobs, "js", beta=0.3, tail="renormalize", mask=mask)
    assert torch.equal(criterion(student, ids, logprobs, mask=mask), expected)
    assert repr(criterion) == "TopKDivergenceLoss('js', beta=0.3, tail='renormalize')"
    with pytest.raises(TypeError, match="mask belongs to a batch"):
        kk.nn.TopKDivergenceLoss(mask=mask)
    with pytest.raises(ValueError, match="unknown statistic 'jss'"):
        kk.nn.TopKDivergenceLoss("jss")
