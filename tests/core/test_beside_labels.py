"""A divergence at a temperature beside log-probabilities of labels, at that temperature and at 1: known weights, so
that values and gradient come out of one pass."""

from __future__ import annotations

import oracle
import pytest
import torch
from checks import BACKENDS, DIVERGENCES, INTERPRETED, check_gradient, taken
from torch import Tensor

from kldiv_kernels.sources import Logits
from kldiv_kernels.weighted import weighted_sum_of

ROWS, COLUMNS = 6, 300 if INTERPRETED else 4500
BESIDE = (("logprob",), ("untempered_logprob",), ("untempered_logprob", "logprob"))


def rows(case: str) -> tuple[Tensor, Tensor, Tensor]:
    s, t = (3 * torch.randn(ROWS, COLUMNS) for _ in "st")
    labels = torch.randint(COLUMNS // 2, (ROWS,))
    if case == "masked":  # by a finite number, over more than a tile
        s[:, COLUMNS // 2 :], t[:, COLUMNS // 2 :] = -1e4, -1e4
    elif case == "offset":
        s, t = s + 1e3, t - 300
    elif case == "rising":  # far above where the row begins
        s, t = (x + torch.linspace(0, 60, COLUMNS) for x in (s, t))
        labels += COLUMNS // 2
    elif case == "peaked":
        s[torch.arange(ROWS), labels] += 25
    return s, t, labels


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_pass(backend: str, kind: str) -> None:
    cases = ("plain", "masked", "offset", "rising", "peaked")
    for i, case in enumerate(cases):
        s, t, labels = rows(case)
        names = (kind, *BESIDE[i % 3]) if i % 2 else (*BESIDE[i % 3], kind)
        temperature = (2.0, 0.5, 1.3, 5.0, 0.9)[i]
        mask = torch.arange(ROWS) != 3
        weights = dict(zip(names, (0.7, -0.4, -0.2), strict=False))
        logits = s.clone().requires_grad_()
        threads = torch.get_num_threads()
        try:
            # Few rows of several threads are split into blocks.
            torch.set_num_threads(1 + i % 2)
            loss, values = weighted_sum_of(
                "test", Logits(logits, t), labels, weights, mask=mask, normalizer=torch.tensor(5.0),
                temperature=temperature, vocab_size=None, backend=backend, **taken(kind, 0.3, 0.6),
            )  # fmt: skip
        finally:
            torch.set_num_threads(threads)
        loss.backward()
        gradient, floor, total, size = (0.0,) * 4
        for name, value in zip(names, values, strict=True):
            scale = mask * (weights[name] / 5)
            expected = oracle.evaluate(
                name, s, t, labels, cotangent=scale, temperature=temperature, alpha=0.3, beta=0.6, mask=mask
            )
            error = (value - expected.value).abs() / expected.value.abs().clamp_min(1)
            assert error.max() < 2e-5, (case, name)
            gradient, floor = gradient + expected.student, floor + expected.student_floor
            total, size = total + (scale * expected.value).sum(), size + (scale * expected.value).abs().sum()
        assert abs(loss.item() - total) < 2e-5 * max(1.0, float(size)), case
        check_gradient(logits.grad, gradient, floor)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_counts_nothing_takes_no_part(backend: str) -> None:
    """A weight of 0 on an infinite divergence."""
    s, t = (3 * torch.randn(ROWS, COLUMNS) for _ in "st")
    s[:, 5:9] = -torch.inf
    labels = torch.randint(20, COLUMNS, (ROWS,))
    for kind, beside in (("forward_kl", "untempered_logprob"), ("reverse_kl", "logprob"), ("js", "untempered_logprob")):
        logits = (s if kind == "forward_kl" else t).clone().requires_grad_()
        reference = t if kind == "forward_kl" else s
        loss, _ = weighted_sum_of(
            "test", Logits(logits, reference), labels, {kind: 0.0, beside: -1.0}, mask=None, normalizer=None,
            temperature=2.0, vocab_size=None, backend=backend, **taken(kind, None, 0.5),
        )  # fmt: skip
        (got,) = torch.autograd.grad(loss, logits)
        leaf = logits.detach().double().requires_grad_()
        scaled = leaf / (1 if beside == "untempered_logprob" else 2)
        expected = torch.nn.functional.cross_entropy(scaled, labels)
        assert abs(loss.item() - expected.item()) < 1e-5 * max(1.0, expected.item())
        (wanted,) = torch.autograd.grad(expected, leaf)
        assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_a_softmax_spoils_only_itself(backend: str) -> None:
    """Also where the divergence counts nothing."""
    for bad, weight in ((-torch.inf, 0.0), (-torch.inf, 1.0), (torch.nan, 0.0), (torch.inf, 1.0)):
        s, t = (3 * torch.randn(ROWS, COLUMNS) for _ in "st")
        logits = s.clone()
        logits[2] = bad
        logits.requires_grad_()
        labels = torch.randint(COLUMNS, (ROWS,))
        for beside in ("logprob", "untempered_logprob"):
            loss, _ = weighted_sum_of(
                "test", Logits(logits, t), labels, {"forward_kl": weight, beside: -1.0}, mask=None, normalizer=None,
                temperature=2.0, vocab_size=None, backend=backend,
            )  # fmt: skip
            (gradient,) = torch.autograd.grad(loss, logits)
            assert loss.isnan()
            assert gradient[2].isnan().all(), (bad, weight, beside)
            assert gradient[[0, 1, 3, 4, 5]].isfinite().all()
