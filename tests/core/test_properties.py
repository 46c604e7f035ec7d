"""Identities and bounds that hold for any rows, and random shapes, strides and masks against the oracle."""

from __future__ import annotations

import oracle
import pytest
import torch
from checks import BACKENDS, DIVERGENCES, STATISTIC_NAMES, check_gradient, check_value, parameters
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.registry import STATISTICS

bounded = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def row_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    columns, rows = draw(st.integers(2, 40)), draw(st.integers(1, 3))
    seed, scale = draw(st.integers(0, 2**31)), draw(st.sampled_from([1, 8, 40]))
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randint(-scale, scale + 1, (2, rows, columns), generator=generator) / 4
    return pair[0], pair[1]


def _value(name: str, logits: Tensor, reference: Tensor, backend: str, **options: float) -> Tensor:
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64)
    return kk.token_stats(logits, reference, labels, stats=[name], backend=backend, **options)[name].double()


def _same(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> bool:
    return bool(((a - b).abs() <= tolerance * (1 + b.abs())).all())


@pytest.mark.parametrize("name", [name for name in STATISTIC_NAMES if STATISTICS[name].kind == "sum"])
@pytest.mark.parametrize("backend", BACKENDS)
@bounded
@given(row_pairs(), st.randoms(use_true_random=False), st.integers(-60, 60))
def test_permutation_and_shift(
    backend: str, name: str, pair: tuple[Tensor, Tensor], random: object, shift: int
) -> None:
    """A statistic of distributions does not see the order of the vocabulary, nor a constant added to the logits."""
    logits, reference = pair
    order = list(range(logits.shape[1]))
    random.shuffle(order)
    value = _value(name, logits, reference, backend)
    assert _same(_value(name, logits[:, order], reference[:, order], backend), value)
    assert _same(_value(name, logits + shift, reference - shift / 2, backend), value)


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "cross_entropy"])
@pytest.mark.parametrize("backend", BACKENDS)
@bounded
@given(row_pairs(), st.data())
def test_non_negative_and_gradients_sum_to_zero(
    backend: str, name: str, pair: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    alpha, beta = data.draw(st.sampled_from(parameters(STATISTICS[name])))
    student, teacher = (x.clone().requires_grad_() for x in pair)
    value = kk.token_stats(student, teacher, stats=[name], alpha=alpha, beta=beta, backend=backend)[name]
    assert (value >= 0).all()
    value.sum().backward()
    expected = oracle.evaluate(name, *pair, alpha=alpha, beta=beta)
    for gradient, floor in ((student.grad, expected.student_floor), (teacher.grad, expected.teacher_floor)):
        assert (gradient.double().sum(-1).abs() <= 1e-6 * gradient.shape[-1] * (floor[..., 0] + 1e-6)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@bounded
@given(row_pairs(), st.integers(1, 63).map(lambda n: n / 64))
def test_identities(backend: str, pair: tuple[Tensor, Tensor], weight: float) -> None:
    p_to_q, q_to_p = pair, pair[::-1]

    def value(name: str, rows: tuple[Tensor, Tensor] = p_to_q, **options: float) -> Tensor:
        return _value(name, *rows, backend, **options)

    assert _same(value("jeffreys"), value("forward_kl") + value("reverse_kl"))
    assert _same(value("js", beta=weight), value("js", q_to_p, beta=1 - weight))
    assert _same(value("js", beta=0.0), value("forward_kl"))
    assert _same(value("js", beta=1.0), value("reverse_kl"))
    assert _same(value("skew_kl", alpha=0.0), value("forward_kl"))
    assert not value("skew_kl", alpha=1.0).abs().gt(1e-6).any()
    assert _same(value("skew_reverse_kl", alpha=weight), value("skew_kl", q_to_p, alpha=weight))
    skews = weight * value("skew_kl", alpha=weight) + (1 - weight) * value("skew_reverse_kl", alpha=1 - weight)
    assert _same(value("js", beta=weight), skews)
    assert _same(value("alpha", alpha=1.0), value("forward_kl"))
    assert _same(value("alpha", alpha=0.0), value("reverse_kl"))
    assert _same(value("alpha", alpha=weight), value("alpha", q_to_p, alpha=1 - weight))
    assert _same(value("alpha", alpha=0.5), 4 * value("hellinger"))
    assert _same(value("alpha", alpha=2.0), value("forward_chi2") / 2)
    assert _same(value("alpha", alpha=-1.0), value("reverse_chi2") / 2)
    assert _same(value("alpha_beta", alpha=weight, beta=1 - weight), value("alpha", alpha=weight))
    assert _same(value("renyi", alpha=2.0), value("forward_chi2").log1p())
    assert _same(value("cross_entropy"), value("forward_kl") + value("reference_entropy"))
    assert _same(value("reference_entropy"), value("entropy", q_to_p))
    assert _same(value("reference_logprob"), value("logprob", q_to_p))
    for name in ("jeffreys", "hellinger", "tvd", "triangular", "cauchy_schwarz"):
        assert _same(value(name), value(name, q_to_p))


@pytest.mark.parametrize("backend", BACKENDS)
@bounded
@given(row_pairs())
def test_bounds(backend: str, pair: tuple[Tensor, Tensor]) -> None:
    names = ("tvd", "forward_kl", "hellinger", "triangular", "js", "entropy", "collision", "forward_chi2")
    tvd, kl, hellinger, triangular, js, entropy, collision, chi2 = (_value(name, *pair, backend) for name in names)
    slack = 1e-5
    assert (tvd <= (kl / 2).sqrt() + slack).all()
    assert (hellinger <= tvd + slack).all()
    assert (tvd <= (2 * hellinger).sqrt() + slack).all()
    assert (tvd <= 1 + slack).all()
    assert (2 * tvd**2 <= triangular + slack).all()
    assert (triangular <= 2 * tvd + slack).all()
    assert (js <= torch.tensor(2.0).log() * tvd + slack).all()
    assert (kl <= chi2.log1p() * (1 + slack) + slack).all()
    assert (entropy <= torch.tensor(float(pair[0].shape[1])).log() + slack).all()
    assert (-collision <= entropy + slack).all()


@pytest.mark.parametrize("backend", BACKENDS)
@settings(bounded, max_examples=80)
@given(st.data())
def test_random_layouts_and_masks(backend: str, data: st.DataObject) -> None:
    """Any leading shape, strides, dtype, masked tokens, −inf in both rows, excluded columns: equal to the oracle."""
    name = data.draw(st.sampled_from(STATISTIC_NAMES), "statistic")
    alpha, beta = data.draw(st.sampled_from(parameters(STATISTICS[name])), "alpha, beta")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), "dtype")
    leading = tuple(data.draw(st.lists(st.integers(1, 4), max_size=3), "leading"))
    columns, offset = data.draw(st.integers(2, 70), "columns"), data.draw(st.integers(0, 5), "offset")
    step = data.draw(st.integers(1, 2), "step")
    torch.manual_seed(data.draw(st.integers(0, 1000), "seed"))

    def view() -> Tensor:
        base = 2 * torch.randn(*(step * n for n in leading), columns + 9)
        return base.to(dtype)[tuple(slice(None, None, step) for _ in leading)][..., offset : offset + columns]

    logits, reference = view(), view()
    mask = torch.rand(leading) < 0.7
    exclude = torch.randint(-1, columns, leading)
    labels = (exclude + 1) % columns
    hidden = torch.rand(*leading, columns) < data.draw(st.sampled_from([0.0, 0.5]), "share at -inf")
    hidden.scatter_(-1, labels[..., None], False)
    logits, reference = logits.masked_fill_(hidden, -torch.inf), reference.masked_fill_(hidden, -torch.inf)
    options = {"temperature": 1.25, "reference_temperature": 0.75, "alpha": alpha, "beta": beta}
    student, teacher = logits.requires_grad_(), reference.requires_grad_()
    value = kk.token_stats(
        student, teacher, labels, stats=[name], mask=mask, exclude=exclude, backend=backend, **options
    )[name]  # fmt: skip
    cotangent = torch.randn(leading)
    expected = oracle.evaluate(
        name, logits, reference, labels, cotangent=cotangent, mask=mask, exclude=exclude, **options
    )  # fmt: skip
    # At the oracle's floor there is no column but the label and those at −inf.
    check_value(value, torch.where(expected.value < -600, -torch.inf, expected.value))
    if STATISTICS[name].differentiable and expected.value.gt(-600).all():
        (cotangent * value).sum().backward()
        for got, side, floor in (
            (student.grad, expected.student, expected.student_floor),
            (teacher.grad, expected.teacher, expected.teacher_floor),
        ):
            if got is not None:
                check_gradient(got, side, floor)
