"""Liger's divergences of log-probabilities, as functions of free variables, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div
from torch.utils._python_dispatch import TorchDispatchMode

import kldiv_kernels as kk
from kldiv_kernels.adapters import liger
from kldiv_kernels.adapters.liger import log_probabilities

ROWS, VOCAB = 9, 53


def _rows(dtype: torch.dtype = torch.float32, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """log q and log p."""
    x, y = ((scale * torch.randn(ROWS, VOCAB, dtype=torch.float64)).log_softmax(-1) for _ in range(2))
    return x.to(dtype), y.to(dtype)


def _jsd(x: Tensor, y: Tensor, beta: float) -> Tensor:
    """[rows]"""
    if beta in (0.0, 1.0):
        return (x.exp() * (x - y) if beta else y.exp() * (y - x)).sum(-1)
    m = (beta * y.exp() + (1 - beta) * x.exp()).log()
    return (beta * y.exp() * (y - m) + (1 - beta) * x.exp() * (x - m)).sum(-1)


def _check(ours: Callable[[Tensor], Tensor], definition: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Value and gradient at x, under an upstream gradient that is not 1."""
    at, exact = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    got, expected = ours(at), definition(exact)
    assert got.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert got.shape == expected.shape
    close = 1e-12 if x.dtype == torch.float64 else 1e-5
    assert torch.allclose(got.double(), expected, rtol=close, atol=close * expected.abs().max().item())
    upstream = torch.rand(expected.shape, dtype=torch.float64) + 0.5
    (wanted,) = torch.autograd.grad(expected, exact, upstream)
    (gradient,) = torch.autograd.grad(got, at, upstream.to(got.dtype))
    assert gradient.dtype == x.dtype
    largest = wanted.abs().amax(-1, keepdim=True)
    assert largest.max() > 0
    # Half a unit in the last place, or of the smallest number of float16.
    rounding = torch.finfo(x.dtype).eps / 2 if x.dtype in (torch.bfloat16, torch.float16) else 0.0
    smallest = 3e-8 if x.dtype == torch.float16 else 0.0
    assert ((gradient.double() - wanted).abs() <= close * largest + 1.01 * rounding * wanted.abs() + smallest).all()


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@DTYPES
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_kl(dtype: torch.dtype, log_target: bool, reduction: str) -> None:
    x, y = _rows(dtype)
    target = y if log_target else y.exp()
    options: dict[str, Any] = {"reduction": reduction, "log_target": log_target}
    _check(
        lambda at: liger.LigerKLDIVLoss(**options)(at, target),
        lambda at: kl_div(at, target.double(), **options),
        x,
    )


@DTYPES
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_jsd(dtype: torch.dtype, beta: float) -> None:
    x, y = _rows(dtype)
    _check(lambda at: liger.LigerJSD(beta)(at, y), lambda at: _jsd(at, y.double(), beta).mean(), x)


@DTYPES
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_tvd(dtype: torch.dtype, reduction: str) -> None:
    p, q = (x.exp() for x in _rows(dtype))
    p[:, 3] = q[:, 3]
    columns = lambda at: (at - q.double()).abs() / 2  # noqa: E731
    scale = {"none": 1, "sum": 1, "mean": ROWS * VOCAB, "batchmean": ROWS}[reduction]
    whole = (lambda at: columns(at)) if reduction == "none" else (lambda at: columns(at).sum() / scale)
    _check(lambda at: liger.LigerTVDLoss(reduction)(at, q), whole, p)
    at = p.clone().requires_grad_()
    liger.liger_tvd(at, q).backward()
    assert at.grad is not None
    assert not at.grad[:, 3].any()  # equal probabilities


def test_rows_with_ignored_labels_are_not_looked_at() -> None:
    x, y = _rows()
    labels = torch.arange(ROWS)
    labels[[1, 4, 8]] = -7
    kept = labels != -7
    x[~kept], y[~kept] = torch.nan, torch.inf
    exact = y[kept].double()
    calls: list[tuple[Any, Any]] = [
        (lambda at: liger.LigerJSD(0.3, -7)(at, y, labels), lambda at: _jsd(at, exact, 0.3).mean()),
        (lambda at: liger.LigerTVDLoss("mean", -7)(at, y, labels), lambda at: (at - exact).abs().mean() / 2),
        (lambda at: liger.LigerTVDLoss("sum", -7)(at, y, labels), lambda at: (at - exact).abs().sum() / 2),
    ]
    for ours, definition in calls:
        _check(ours, lambda at, f=definition: f(at[kept]), x)
    none = liger.liger_tvd(x, y, labels, "none", -7)
    assert none[kept].isfinite().all()
    assert not none[~kept].any()


def test_no_valid_row_is_zero() -> None:
    x, y = _rows()
    for loss in (liger.liger_jsd, liger.liger_tvd):
        at = x.clone().requires_grad_()
        value = loss(at, y, torch.full((ROWS,), -100))
        value.backward()
        assert value.item() == 0
        assert not at.grad.any()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_probabilities_of_zero(beta: float) -> None:
    """A column at −∞ or far below the range of float32 in both rows adds nothing; in one, its share of the limit."""
    x, y = _rows()
    x[:, :4], y[:, :4] = -math.inf, -math.inf
    x[:, 4:8], y[:, 4:8] = -130.0, -150.0
    if beta < 1:
        y[:, 8] = -math.inf
    if beta > 0:
        x[:, 9] = -math.inf

    def definition(at: Tensor) -> Tensor:
        q, p = at.exp(), y.double().exp()
        m = beta * p + (1 - beta) * q
        terms = [(p, m, beta), (q, m, 1 - beta)] if 0 < beta < 1 else [(q, p, 1.0) if beta else (p, q, 1.0)]
        # Columns of probability 0 are left out before the logarithm, so that autograd has no 0·∞ either.
        parts = [w * (a[a > 0] * (a[a > 0].log() - b[a > 0].log())).sum() for a, b, w in terms]
        return torch.stack(parts).sum() / ROWS

    _check(lambda at: liger.liger_jsd(at, y, beta=beta), definition, x)
    if beta == 0:
        for target, log_target in ((y, True), (y.exp(), False)):
            got = liger.liger_kl_div(x, target, reduction="batchmean", log_target=log_target)
            assert got.item() == pytest.approx(definition(x.double()).item(), rel=1e-5)
    one_sided = liger.liger_kl_div(torch.tensor([[0.0, -math.inf]]), torch.tensor([[0.5, 0.5]]))
    assert one_sided.item() == math.inf


def test_eps_bounds_the_target_inside_the_logarithm() -> None:
    x, y = _rows()
    p = y.exp()
    assert (p < 0.01).any()
    _check(
        lambda at: liger.liger_kl_div(at, p, reduction="sum", eps=0.01),
        lambda at: (p.double() * (p.double().clamp(min=0.01).log() - at)).sum(),
        x,
    )


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_nearly_equal_rows(beta: float) -> None:
    x, _ = _rows()
    y = x + 1e-3 * torch.randn_like(x)
    got, expected = liger.liger_jsd(x, y, beta=beta).item(), _jsd(x.double(), y.double(), beta).mean().item()
    assert expected < 1e-6
    assert got == pytest.approx(expected, rel=2e-3)


def test_columns_are_free_variables_and_lead_to_the_gradient_of_the_logits() -> None:
    """−p, which no row of log-probabilities could follow; behind log_softmax, the gradient of the raw logits."""
    logits = torch.randn(ROWS, VOCAB, requires_grad=True)
    teacher = torch.randn(ROWS, VOCAB)
    x, y = logits.log_softmax(-1), teacher.log_softmax(-1)
    loss = liger.liger_kl_div(x, y, reduction="batchmean", log_target=True)
    free, behind = torch.autograd.grad(loss, [x, logits])
    assert torch.allclose(free, -y.exp() / ROWS)
    (raw,) = torch.autograd.grad(kk.divergence_loss(logits, teacher), logits)
    assert torch.allclose(behind, raw, rtol=0, atol=1e-6 * raw.abs().max().item())


def test_blocks_strides_and_no_gradient_to_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = _rows(torch.float64)
    whole = liger.liger_jsd(x, y)
    monkeypatch.setattr(log_probabilities, "_CPU_BLOCK", 2 * VOCAB)  # 9 rows in blocks of 2
    wide = torch.stack([x, y], 1).requires_grad_()
    assert liger.liger_jsd(x, y).item() == pytest.approx(whole.item(), rel=1e-14)
    _check(lambda at: liger.liger_jsd(at[:, 0], wide[:, 1]), lambda at: _jsd(at[:, 0], y, 0.5).mean(), wide)
    (gradient,) = torch.autograd.grad(liger.liger_jsd(wide[:, 0], wide[:, 1]), wide)
    assert gradient[:, 0].any()
    assert not gradient[:, 1].any()


class _Largest(TorchDispatchMode):
    """The tensors of [ROWS, VOCAB] elements that operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage().nbytes() >= 4 * ROWS * VOCAB:
            self.made.add(out.data_ptr())
        return out


def test_nothing_of_the_rows_size_but_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_probabilities, "_CPU_BLOCK", VOCAB)
    x, y = _rows()
    x.requires_grad_()
    given = {row.data_ptr() for tensor in (x, y) for row in tensor.detach()}
    with _Largest() as forward:
        loss = liger.liger_jsd(x, y)
    assert forward.made <= given
    with _Largest() as backward:
        (gradient,) = torch.autograd.grad(loss, x)
    assert backward.made <= given | {row.data_ptr() for row in gradient}


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_backward_twice_and_double_backward(beta: float) -> None:
    x, y = _rows(torch.float64)
    x.requires_grad_()
    loss = liger.liger_jsd(x, y, beta=beta)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.autograd.gradgradcheck(lambda at: liger.liger_jsd(at, y[:2], beta=beta), x[:2])


@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_bad_calls() -> None:
    x, y = _rows()
    calls: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (TypeError, r"eps is None; expected a number", lambda: liger.LigerKLDIVLoss(None, None, "sum")(x, y)),
        (ValueError, r"size_average is False; expected True", lambda: liger.liger_kl_div(x, y, False)),
        (ValueError, r"reduction is 'average'; expected none, sum", lambda: liger.liger_tvd(x, y, reduction="average")),
        (ValueError, r"target has shape \[9, 52\].* expected \[9, 53\]", lambda: liger.liger_jsd(x, y[:, 1:])),
        (ValueError, r"input has shape \[1, 9, 53\]; expected \[rows", lambda: liger.liger_jsd(x[None], y)),
        (ValueError, r"shift_labels has shape \[8\]; expected \[9\]", lambda: liger.liger_jsd(x, y, torch.arange(8))),
        (ValueError, r"beta is 1.5; expected between 0 and 1", lambda: liger.liger_jsd(x, y, beta=1.5)),
        (TypeError, r"input has dtype torch.int64", lambda: liger.liger_tvd(x.long(), y)),
    ]
    for error, message, call in calls:
        with pytest.raises(error, match=message):
            call()
