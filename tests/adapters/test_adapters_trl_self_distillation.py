"""SDFT's and SDPO's divergences, patched, against TRL's own; and the tail of a top-k, where TRL's has no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

from trl.experimental.sdft import loss_utils, sdft_trainer
from trl_parity import TOLERANCE, VOCAB, compare, kl, ragged_labels, rows, value_and_gradient

from kldiv_kernels.adapters.trl import patched_trl


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("options", [{}, {"k": 5, "tail": True}, {"k": 5, "tail": False}])
def test_self_distillation(options: dict[str, Any], alpha: float, dtype: torch.dtype) -> None:
    student, teacher = rows(dtype)
    name = "compute_full_logit_self_distillation_loss"
    arguments: dict[str, Any] = {"distillation_alpha": alpha}
    if options:
        name = "compute_topk_self_distillation_loss"
        arguments |= {"distillation_topk": options["k"], "distillation_add_tail": options["tail"]}
    for owner in (sdft_trainer, loss_utils):
        compare(name, owner, student, teacher, **arguments)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_self_distillation_on_the_sampled_token(dtype: torch.dtype) -> None:
    student, teacher = rows(dtype)
    name = "compute_sampled_token_self_distillation_loss"
    compare(name, sdft_trainer, student, teacher, ragged_labels().clamp_min(0), distillation_alpha=1.0)
    with patched_trl(), pytest.raises(ValueError, match="alpha"):
        sdft_trainer.compute_sampled_token_self_distillation_loss(
            student, teacher, ragged_labels().clamp_min(0), distillation_alpha=0.5
        )


def _topk(student: Tensor, teacher: Tensor, k: int, alpha: float) -> tuple[Tensor, Tensor]:
    return value_and_gradient(
        loss_utils.compute_topk_self_distillation_loss, student, teacher,
        distillation_topk=k, distillation_alpha=alpha, distillation_add_tail=True,
    )  # fmt: skip


def test_a_sure_student_learns_of_the_tail() -> None:
    """1e-11 of the student is outside its top 2, 0.3 of the teacher: TRL's bound leaves that without a gradient."""
    student, teacher = torch.zeros(1, VOCAB), torch.zeros(1, VOCAB)
    student[0, :2] = torch.tensor([29.0, 28.0])
    student[0, 2:] += torch.linspace(0, 1, VOCAB - 2)
    teacher[0, :2] = torch.tensor([5.0, 3.5])
    q, p = student.double().softmax(-1)[0], teacher.double().softmax(-1)[0]
    p_tail, q_tail = p[2:].sum(), q[2:].sum()
    assert q_tail < 1e-10
    assert p_tail > 0.1
    expected = p[:2] @ (p[:2] / q[:2]).log() + p_tail * (p_tail / q_tail).log()
    value, gradient = _topk(student, teacher, 2, 0.0)
    assert abs(value.item() - expected) > 1
    assert gradient[0, 2:].abs().max() < 1e-9
    with patched_trl():
        value, gradient = _topk(student, teacher, 2, 0.0)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    exact = torch.cat([q[:2] - p[:2], q[2:] - q[2:] * p_tail / q_tail])
    assert torch.allclose(gradient[0].double(), exact, rtol=0, atol=1e-6 * exact.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_a_top_k_with_columns_at_minus_infinity(alpha: float, dtype: torch.dtype) -> None:
    """All but four columns are gone, in both; of the top 6, two are at −inf, and no tail is left."""
    student, teacher = (x[:1, :1].contiguous() for x in rows(dtype))
    student[..., 4:] = teacher[..., 4:] = -torch.inf
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    m = alpha * p + (1 - alpha) * q
    expected = {0: kl(p, q), 1: kl(q, p)}.get(alpha, alpha * kl(p, m) + (1 - alpha) * kl(q, m))
    assert _topk(student, teacher, 6, alpha)[0].isnan()
    with patched_trl():
        value, gradient = _topk(student, teacher, 6, alpha)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert gradient[..., :4].abs().max() > 1e-4
    assert not gradient[..., 4:].any()


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_a_top_k_of_the_whole_vocabulary(alpha: float) -> None:
    student, teacher = (x.contiguous() for x in rows())
    with patched_trl():
        value, gradient = _topk(student, teacher, VOCAB, alpha)
        expected, full = value_and_gradient(
            loss_utils.compute_full_logit_self_distillation_loss, student, teacher, distillation_alpha=alpha
        )
    assert torch.allclose(value, expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(gradient, full, rtol=0, atol=1e-12)
