"""Top-k divergences on the host's model of a GPU, in both forms of the kernels, against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from checks import CUDA_ON_HOST, DIVERGENCES, check_gradient, with_parameters
from cuda_host.one_read import Machine, uneven
from topk_cuda_problem import COLUMNS, PLANS, TWO_SWEEP, check, logits_of, problem, some_labels

import kldiv_kernels as kk
from kldiv_kernels import ops

if not CUDA_ON_HOST:
    pytest.skip("runs under KLDIV_CUDA_HOST=1", allow_module_level=True)
TAILS = ("bucket", "renormalize", "renormalize_teacher")


@pytest.fixture(params=["one-read", TWO_SWEEP])
def form(request: pytest.FixtureRequest, machine: Machine) -> str:
    if request.param == TWO_SWEEP:
        machine(plan=TWO_SWEEP)
    return str(request.param)


CASES = [
    (tail, *case, PLANS[(5 * i + j) % len(PLANS)], (torch.float32, torch.bfloat16)[(i + j) % 2])
    for j, tail in enumerate(TAILS)
    for i, case in enumerate(with_parameters(DIVERGENCES))
]


@pytest.mark.parametrize(("tail", "kind", "alpha", "beta", "plan", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("form", ["one-read", TWO_SWEEP])
def test_divergence(
    form: str, tail: str, kind: str, alpha: float, beta: float, plan: str, dtype: torch.dtype, machine: Machine
) -> None:
    """Everything that a loss can be asked for, at once."""
    machine(plan=plan if form == "one-read" else form)
    cluster = int(plan.split(",")[0].split("=")[1])
    slice_columns, columns = uneven(cluster)
    rows = 7
    labels = some_labels(rows, columns, 40)
    borders = torch.tensor([0, slice_columns - 1, slice_columns % columns, columns - 1])
    kept = labels[0][~torch.isin(labels[0], borders)]
    labels[0] = torch.cat([borders, kept])[:40]
    labels[1, 3:] = -1
    labels[2] = -1
    scale = torch.randn(rows)
    scale[3] = 0
    given = problem(
        logits_of(rows, columns, dtype), labels, kind, tail, alpha=alpha, beta=beta, scale=scale, temperature=0.8,
        mask=torch.arange(rows) != 4,
    )  # fmt: skip
    # Where no outcome is left there is no divergence.
    given = given.rows([0, 1, 3, 4, 5, 6]) if tail != "bucket" else given
    _, divergences, gradient = check(given, form)
    masked, weightless = (3, 2) if tail != "bucket" else (4, 3)
    assert not gradient[[masked, weightless]].any()
    assert divergences[masked] == 0


@pytest.mark.parametrize("count", [1, 2, 64, 255, 256, 257, 768, COLUMNS])
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_how_many(form: str, tail: str, count: int) -> None:
    """One outcome alone has nothing to differ from; of the whole row there is no tail."""
    logits = logits_of(5, dtype=torch.float32)
    labels = some_labels(5, COLUMNS, count)
    _, divergences, gradient = check(problem(logits, labels, "js", tail, beta=0.4), form)
    assert (divergences > 0).all() or (tail, count) == ("renormalize", 1)
    assert gradient.any() or (tail, count) == ("renormalize", 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many(form: str, dtype: torch.dtype, machine: Machine) -> None:
    if form == "one-read":
        machine(2, 2)
    labels = some_labels(5, 2600, 1024)
    check(problem(logits_of(5, 2600, dtype), labels, "reverse_kl"), form)
    check(problem(logits_of(5, 2600, dtype), labels, "jeffreys", "renormalize"), form)


@pytest.mark.parametrize("left", [1e-7, 1e-12, 1e-30], ids=str)
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js"])
def test_next_to_nothing_left(form: str, kind: str, left: float) -> None:
    """The tail has its digits, and its gradient."""
    labels = some_labels(4, COLUMNS, 30)
    here = torch.zeros(4, COLUMNS, dtype=torch.bool).scatter_(1, labels, True)
    shift = torch.tensor(left, dtype=torch.float64).log().float()
    logits = torch.where(here, 0.0, shift) + logits_of(4, dtype=torch.float32)
    values, _, gradient = check(problem(logits, labels, kind), form)
    assert (values[-1] < 0.5 * shift).all()
    assert gradient.masked_fill(here, 0.0).any(-1).all() or kind != "forward_kl"


def test_next_to_all_left(form: str) -> None:
    labels = some_labels(4, COLUMNS, 30)
    here = torch.zeros(4, COLUMNS, dtype=torch.bool).scatter_(1, labels, True)
    logits = torch.where(here, -30.0, 0.0) + logits_of(4, dtype=torch.float32)
    for kind in ("forward_kl", "reverse_kl", "hellinger"):
        check(problem(logits, labels, kind), form)


def test_small_divergences(form: str) -> None:
    """A teacher next to the student: the divergence has its digits, and so has its gradient."""
    logits, labels = logits_of(4, dtype=torch.float32), some_labels(4, COLUMNS, 50)
    given = problem(logits, labels)
    for kind in ("forward_kl", "js", "hellinger", "jeffreys"):
        values = dataclasses.replace(given, kind=kind).expected()[0].T
        teacher = (values + 1e-3 * torch.randn(values.shape)).log_softmax(-1).float()
        close = dataclasses.replace(given, kind=kind, teacher=teacher)
        _, divergences, _ = check(close, form)
        wanted = close.expected()[1]
        assert (wanted < 1e-5).all()
        assert torch.allclose(divergences.double(), wanted, rtol=1e-2, atol=0)


def test_minus_infinity_and_nan(form: str) -> None:
    """A tail without mass, labels without, outcomes that the teacher never has, a row of NaN: no other row knows."""
    logits, labels = logits_of(8), some_labels(8, COLUMNS, 30)
    here = torch.zeros(8, COLUMNS, dtype=torch.bool).scatter_(1, labels, True)
    logits[1, ~here[1]] = -torch.inf
    logits[2, labels[2, :7]] = torch.finfo(torch.bfloat16).min
    logits[3, here[3]] = -torch.inf
    logits[4, labels[4, 5]] = torch.nan
    logits[5, ~here[5]] = torch.nan
    for kind in ("forward_kl", "reverse_kl", "js"):
        given = problem(logits, labels, kind)
        given.teacher[6, 3] = given.teacher[2, :4] = -torch.inf
        given.teacher[1, -1] = given.teacher[1, -1] if kind == "forward_kl" else -torch.inf
        keep = torch.tensor([0, 1, 2, 3, 6, 7])
        values, divergences, gradient = check(given.rows(keep), form)
        assert values[-1, 1] == -torch.inf
        if kind != "js":
            assert divergences[3 if kind == "forward_kl" else 4] == torch.inf
        everything = given.run()
        assert everything[1][[4, 5]].isnan().all()
        assert everything[2][[4, 5]].isnan().all()
        assert torch.equal(everything[1][keep], divergences)
        assert torch.equal(everything[2][keep].nan_to_num(7.0), gradient.nan_to_num(7.0))


def test_a_label_that_occurs_again(form: str) -> None:
    """Two outcomes and one column: it is left out of the tail once, and gets both coefficients."""
    labels = some_labels(5, COLUMNS, 60)
    labels[0, 40:] = labels[0, :20]
    labels[1] = labels[1, 0]
    labels[3, 59] = labels[3, 0]
    check(problem(logits_of(5, dtype=torch.float32), labels, "js"), form)
    check(problem(logits_of(5), labels, "forward_kl", "renormalize"), form)


def test_padding_strides_and_temperatures(form: str) -> None:
    logits = torch.randn(4, 2, COLUMNS + 40)
    logits[..., COLUMNS:] = torch.nan
    labels = some_labels(8, COLUMNS, 21)
    given = problem(
        logits.transpose(0, 1), labels, vocab_size=COLUMNS, temperature=torch.rand(2, 4) + 0.6
    )  # fmt: skip
    _, _, gradient = given.run()
    assert form in given.kernel()
    assert gradient.shape == (2, 4, COLUMNS + 40)
    wanted = given.expected()[2]
    floor = 4 * given.scale.reshape(2, 4, 1)
    check_gradient(gradient[..., :COLUMNS], wanted[..., :COLUMNS], floor)
    assert not gradient[..., COLUMNS:].any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["forward_kl", "js"])
def test_the_loss(form: str, kind: str, dtype: torch.dtype, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`topk_divergence_loss` takes it, weights, mask and upstream gradient included."""
    taken: list[str] = []
    one_read = ops.topk_loss
    monkeypatch.setattr(ops, "topk_loss", lambda *arguments: (taken.append(arguments[1]), one_read(*arguments))[1])
    logits, ids = logits_of(6, dtype=dtype).requires_grad_(), some_labels(6, COLUMNS, 16)
    theirs = torch.randn(6, 17).log_softmax(-1)[:, :16]
    options = {
        "weight": torch.rand(6), "mask": torch.arange(6) != 2, "reduction": reduction, "temperature": 1.3,
        "temperature_squared": True,
    }  # fmt: skip
    loss = kk.topk_divergence_loss(logits, ids, theirs, kind, backend="cuda", **options)
    (-2.5 * loss).backward()
    assert taken == ["cuda"]
    leaf = logits.detach().double().requires_grad_()
    wanted = kk.topk_divergence_loss(leaf, ids, theirs.double(), kind, backend="reference", **options)
    (-2.5 * wanted).backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    # Rounded before it is scaled, and after.
    rounding = 0 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert ((logits.grad.double() - leaf.grad).abs() <= 1e-5 * leaf.grad.abs().max() + rounding * leaf.grad.abs()).all()
    assert leaf.grad.any()


def test_bad_arguments(machine: Machine) -> None:
    given = problem(logits_of(3), some_labels(3, COLUMNS, 4))
    for change, message in (
        ({"kind": "entropy"}, "kind must be a divergence"), ({"kind": "logprob"}, "kind must be a divergence"),
        ({"teacher": given.teacher[:, 1:]}, "teacher must be"), ({"scale": given.scale[1:]}, "scale must be"),
        ({"call": dataclasses.replace(given.call, stats=("tail_logprob",))}, "topk takes logprob"),
        ({"call": dataclasses.replace(given.call, stats=("logprob", "entropy"))}, "topk takes logprob"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            dataclasses.replace(given, **change).run()  # type: ignore[arg-type]
