"""torchtune's distillation losses: beside float64 from the definition, and beside torchtune's own."""

from __future__ import annotations

from typing import Any

import peer_modules
import pytest
import torch
from torch import Tensor

from kldiv_kernels.adapters import torchtune

NAMES = ("ForwardKL", "ReverseKL", "SymmetricKL")


def _batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [batch, tokens, V] with NaN where the label is −100, of a prompt and of padding; one empty sequence."""
    student, teacher = (torch.randn(3, 13, 301).mul(3).to(dtype) for _ in range(2))
    labels = torch.randint(0, 301, (3, 13))
    labels[0, :4], labels[1, 9:], labels[2] = -100, -100, -100
    return student, teacher, labels


def _shares(name: str) -> tuple[dict[str, float], ...]:
    return tuple({"sym_kd_ratio": w} for w in (0.0, 0.3, 0.5, 1.0)) if name == "SymmetricKL" else ({},)


def _definition(name: str, student: Tensor, teacher: Tensor, share: float) -> Tensor:
    """Per token, in float64."""
    log_q, log_p = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    forward = (log_p.exp() * (log_p - log_q)).sum(-1)
    reverse = (log_q.exp() * (log_q - log_p)).sum(-1)
    weight = {"ForwardKL": 1.0, "ReverseKL": 0.0}.get(name, share)
    return weight * forward + (1 - weight) * reverse


def _ends(loss: Tensor, student: Tensor) -> tuple[float, Tensor]:
    return loss.item(), torch.autograd.grad(loss, student)[0].double()


def _same(got: tuple[float, Tensor], wanted: tuple[float, Tensor], close: float = 1e-5, offset: float = 0.0) -> None:
    assert got[0] + offset == pytest.approx(wanted[0], rel=close, abs=close)
    largest = wanted[1].abs().max().item()
    assert largest > 1e-4
    torch.testing.assert_close(got[1], wanted[1], rtol=0, atol=close * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_the_definition(name: str, dtype: torch.dtype) -> None:
    student, teacher, labels = _batch(dtype)
    valid = labels != -100
    close = 1e-5 if dtype == torch.float32 else 5e-3
    for options in _shares(name):
        exact = student.double().requires_grad_()
        terms = _definition(name, exact, teacher, options.get("sym_kd_ratio", 0.5))[valid]
        total = _ends(terms.sum(), exact)
        mean = total[0] / valid.sum().item(), total[1] / valid.sum()
        dirty = student.masked_fill(~valid[..., None], torch.nan)
        before = dirty.clone()
        dirty.requires_grad_()
        rows = dirty.flatten(0, 1), teacher.flatten(0, 1), labels.flatten()
        loss = getattr(torchtune, f"{name}Loss")(**options)
        _same(_ends(loss(*rows), dirty), mean, close)
        _same(_ends(loss(*rows, normalize=False), dirty), total, close)
        # Chunks of unequal lengths, as `chunk` makes them of 13 tokens.
        chunked = getattr(torchtune, f"{name}WithChunkedOutputLoss")(num_output_chunks=4, **options)
        assert chunked.num_output_chunks == 4
        _same(_ends(chunked(dirty.chunk(4, dim=1), teacher.chunk(4, dim=1), labels), dirty), mean, close)
        assert torch.equal(dirty.nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.parametrize("name", NAMES)
def test_beside_torchtune(name: str) -> None:
    """The forward KL is less by the teacher's entropy, which torchtune leaves in."""
    theirs = peer_modules.torchtune()
    student, teacher, labels = _batch()
    student.requires_grad_()
    log_p = teacher.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)[labels != -100]
    for options in _shares(name):
        share = {"ForwardKL": 1.0, "ReverseKL": 0.0}.get(name, options.get("sym_kd_ratio", 0.5))
        for form in ("Loss", "WithChunkedOutputLoss"):
            cases: list[tuple[tuple[Any, ...], float]] = [
                ((student.flatten(0, 1), teacher.flatten(0, 1), labels.flatten(), normalize), offset)
                for normalize, offset in ((True, entropy.mean().item()), (False, entropy.sum().item()))
            ]
            if form != "Loss":
                options = {**options, "num_output_chunks": 3}
                cases = [((student.chunk(3, dim=1), teacher.chunk(3, dim=1), labels), entropy.mean().item())]
            for given, offset in cases:
                pair = [getattr(module, name + form)(**options) for module in (torchtune, theirs)]
                got, expected = (_ends(loss(*given), student) for loss in pair)
                _same(got, expected, 1e-4, offset=share * offset)
        for ignored in (-100, 5):
            # Labels of 5 are left out by both, where they are asked to.
            given = (student.flatten(0, 1), teacher.flatten(0, 1), labels.flatten().clamp(-100, 5))
            options.pop("num_output_chunks", None)
            pair = [getattr(module, f"{name}Loss")(**options, ignore_index=ignored) for module in (torchtune, theirs)]
            got, expected = (_ends(loss(*given), student) for loss in pair)
            torch.testing.assert_close(got[1], expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_token(name: str) -> None:
    student, teacher, labels = _batch()
    student.requires_grad_()
    labels.fill_(-100)
    rows = student.flatten(0, 1), teacher.flatten(0, 1), labels.flatten()
    for options in _shares(name):
        losses = [
            getattr(torchtune, f"{name}Loss")(**options)(*rows),
            getattr(torchtune, f"{name}WithChunkedOutputLoss")(**options)([student], [teacher], labels),
        ]
        for loss in losses:
            value, gradient = _ends(loss, student)
            assert value == 0
            assert not gradient.any()


def test_excluded_columns() -> None:
    """Columns at −inf on both sides are no tokens; on one side alone a divergence is infinite."""
    student, teacher, labels = _batch()
    kept = [i for i in range(301) if not 40 <= i < 60]
    less = student[..., kept].requires_grad_(), teacher[..., kept]
    for x in (student, teacher):
        x[..., 40:60] = -torch.inf
    student.requires_grad_()
    got = _ends(torchtune.SymmetricKLLoss(0.3)(student, teacher, labels), student)
    value, gradient = _ends(torchtune.SymmetricKLLoss(0.3)(*less, labels), less[0])
    _same((got[0], got[1][..., kept]), (value, gradient))
    assert not got[1][..., 40:60].any()
    teacher[..., 40] = 0.0
    assert torchtune.ForwardKLLoss()(student, teacher, labels).isinf()
    assert torchtune.ReverseKLLoss()(student, teacher, labels).isfinite()


def test_errors() -> None:
    student, teacher, labels = _batch()
    chunked = torchtune.ForwardKLWithChunkedOutputLoss()
    with pytest.raises(ValueError, match=r"SymmetricKLLoss: sym_kd_ratio is 1.5; expected a number between 0 and 1"):
        torchtune.SymmetricKLLoss(1.5)
    with pytest.raises(ValueError, match=r"ForwardKLLoss: labels has 38 entries; expected one for each row"):
        torchtune.ForwardKLLoss()(student, teacher, labels.flatten()[1:])
    with pytest.raises(TypeError, match=r"ForwardKLLoss: labels is list; expected a torch.Tensor"):
        torchtune.ForwardKLLoss()(student, teacher, labels.tolist())
    with pytest.raises(TypeError, match=r"ForwardKLWithChunkedOutputLoss: student_logits is Tensor; expected a list"):
        chunked(student, [teacher], labels)
    with pytest.raises(ValueError, match=r"the chunks of teacher_logits have 12 tokens; expected 13"):
        chunked([student], [teacher[:, 1:]], labels)
    with pytest.raises(ValueError, match=r"labels has shape \[39\]; expected \[batch, tokens\]"):
        chunked([student], [teacher], labels.flatten())
