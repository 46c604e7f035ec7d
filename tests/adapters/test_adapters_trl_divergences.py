"""`generalized_jsd_loss` of GKD, GOLD and IW-OPD, patched, against TRL's own: value, gradient, dtype, and −inf."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from trl.experimental.gkd import GKDTrainer
from trl.experimental.gold import GOLDTrainer
from trl.experimental.iw_opd import IWOPDTrainer
from trl.trainer import utils
from trl_parity import TOLERANCE, VOCAB, compare, kl, ragged_labels, rows, value_and_gradient

from kldiv_kernels.adapters.trl import patched_trl

BETAS = [0, 0.1, 0.5, 0.9, 1]
TRAINERS = {trainer.__name__: trainer for trainer in (GKDTrainer, GOLDTrainer, IWOPDTrainer)}
REDUCTIONS: dict[str, dict[str, Any]] = {
    "batchmean": {}, "sum": {"reduction": "sum"}, "mean": {"reduction": "mean"}, "items": {"num_items_in_batch": 23},
    "items tensor": {"num_items_in_batch": torch.tensor(23), "reduction": "none"},
}  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("beta", BETAS)
def test_generalized_jsd(beta: float, reduction: str, with_labels: bool, dtype: torch.dtype) -> None:
    student, teacher = rows(dtype)
    compare(
        "generalized_jsd_loss", GKDTrainer, student, teacher, ragged_labels() if with_labels else None,
        beta=beta, temperature=0.7, **REDUCTIONS[reduction],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("reduction", [name for name in REDUCTIONS if name not in ("mean", "items tensor")])
@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_k": 5, "add_tail": False}, {"top_k": VOCAB}])
@pytest.mark.parametrize("beta", BETAS)
def test_generalized_jsd_over_k_tokens(
    beta: float, options: dict[str, Any], reduction: str, with_labels: bool, dtype: torch.dtype
) -> None:
    student, teacher = rows(dtype)
    # TRL's own tail, taken from 1, is 3e-6 off in float32.
    compare(
        "generalized_jsd_loss", IWOPDTrainer, student, teacher, ragged_labels() if with_labels else None,
        slack=5 if dtype == torch.float32 else 1, beta=beta, temperature=0.7, **options, **REDUCTIONS[reduction],
    )  # fmt: skip


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("trainer", ["GOLDTrainer", "IWOPDTrainer"])
def test_generalized_jsd_of_other_trainers(trainer: str, beta: float, reduction: str) -> None:
    student, teacher = rows(torch.float32)
    options = {"beta": beta, "temperature": 0.7, **REDUCTIONS[reduction]}
    compare("generalized_jsd_loss", TRAINERS[trainer], student, teacher, ragged_labels(), **options)


@pytest.mark.parametrize("beta", BETAS)
def test_generalized_jsd_of_rows_without_a_batch(beta: float) -> None:
    student, teacher = (x.reshape(-1, VOCAB) for x in rows(torch.float32))
    compare("generalized_jsd_loss", GOLDTrainer, student, teacher, beta=beta)


def test_generalized_jsd_gives_the_teacher_a_gradient() -> None:
    student, teacher = rows()
    compare("generalized_jsd_loss", GKDTrainer, teacher.clone(), student.clone().requires_grad_(), beta=0.3)
    first = student.clone().requires_grad_()
    with patched_trl():
        GKDTrainer.generalized_jsd_loss(teacher, first, beta=0.3).backward()
    second = student.clone().requires_grad_()
    GKDTrainer.generalized_jsd_loss(teacher, second, beta=0.3).backward()
    assert first.grad.abs().max() > 1e-4
    assert torch.allclose(first.grad, second.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("trainer", "options"),
    [
        ("GKDTrainer", {"reduction": "none"}),
        ("GOLDTrainer", {"logits_are_probs": True}),
        ("IWOPDTrainer", {"top_k": 4, "reduction": "mean"}),
        ("IWOPDTrainer", {"top_k": 4, "reduction": "none"}),
    ],
)
def test_what_trl_serves_itself(trainer: str, options: dict[str, Any]) -> None:
    student, teacher = (x.softmax(-1) for x in rows(torch.float32))
    loss, labels = TRAINERS[trainer].generalized_jsd_loss, ragged_labels()
    expected = loss(student, teacher, labels, **options)
    assert not torch.equal(expected, loss(student, teacher, labels))
    with patched_trl():
        torch.testing.assert_close(
            TRAINERS[trainer].generalized_jsd_loss(student, teacher, ragged_labels(), **options),
            expected,
            rtol=0,
            atol=0,
        )


def test_rows_without_unit_stride_go_to_trl() -> None:
    student, teacher = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in rows(torch.float32))
    compare("generalized_jsd_loss", GKDTrainer, student, teacher)
    compare("entropy_from_logits", utils, student)


@pytest.mark.parametrize("beta", BETAS)
def test_bfloat16_is_rounded_once(beta: float) -> None:
    student, teacher = rows(torch.bfloat16)
    options = {"labels": ragged_labels(), "beta": beta, "reduction": "sum"}
    exact, exact_gradient = value_and_gradient(
        GKDTrainer.generalized_jsd_loss, student.double(), teacher.double(), **options
    )
    theirs, their_gradient = value_and_gradient(GKDTrainer.generalized_jsd_loss, student, teacher, **options)
    with patched_trl():
        ours, gradient = value_and_gradient(GKDTrainer.generalized_jsd_loss, student, teacher, **options)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert abs(ours - exact) <= 2**-8 * exact
    largest = exact_gradient.abs().max()
    assert (gradient - exact_gradient).abs().max() <= 2**-8 * largest
    assert (their_gradient - exact_gradient).abs().max() > (gradient - exact_gradient).abs().max()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("columns", ["teacher", "both"])
def test_generalized_jsd_with_columns_at_minus_infinity(columns: str, beta: float) -> None:
    student, teacher = (x.contiguous() for x in rows(torch.float32))
    teacher[..., 5:9] = -torch.inf
    if columns == "both":
        student[..., 5:9] = -torch.inf
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    m = beta * p + (1 - beta) * q
    expected = {0: kl(p, q), 1: kl(q, p)}.get(beta, beta * kl(p, m) + (1 - beta) * kl(q, m)).sum()
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, reduction="sum")
    assert not theirs.isfinite()
    with patched_trl():
        ours, gradient = value_and_gradient(
            GKDTrainer.generalized_jsd_loss, student, teacher, beta=beta, reduction="sum"
        )
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    assert ours.isinf() == (columns == "teacher" and beta == 1)
    if ours.isfinite():
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 1e-3
