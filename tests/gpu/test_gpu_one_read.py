"""Values and the student's gradient out of one call, against float64: what losses run, and the one-read CUDA kernel.

The other tests of this folder ask for both gradients, or for statistics whose coefficients come later.
"""

from __future__ import annotations

import oracle
import pytest
import torch
from checks import check_gradient, check_value, on
from setting import DEVICE, DTYPES, KERNELS, LOSSES, QUICK, largest_cluster, parked, rows
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels import inputs
from kldiv_kernels.backends import get
from kldiv_kernels.registry import STATISTICS

CUDA = [name for name in KERNELS if name == "cuda"]
# Below 8192 columns the cuda backend chooses two sweeps; 151,936 and 262,144 are vocabularies of Qwen and Gemma.
WIDTHS = (136,) if QUICK else (8200, 151_936, 262_144)
# Triton compiles a kernel for each dtype, the cuda backend has them all.
SHAPES = [
    (backend, dtype, columns)
    for backend in KERNELS
    for dtype in (DTYPES if backend == "cuda" else DTYPES[:1])
    for columns in WIDTHS
    if dtype == torch.bfloat16 or columns != 262_144
]
# With a sum of its own in the first sweep, with sums after it, parked on chip or not, with a log-sum-exp.
KINDS = [name for name in ("forward_kl", "hellinger", "js", "tvd", "renyi") if name in LOSSES]
PLANS = (
    "cluster=1,stages=3", "cluster=2,stages=1", "cluster=4,stages=2", "cluster=8,stages=4", "cluster=16,stages=2",
)  # fmt: skip
# Slices of a multiple of 64 columns leave something for the last CTA of 16, and not a whole slice.
COLUMNS = 2000 if QUICK else 3000
# Two gradients are each rounded to their dtype: an ulp of bfloat16 more, over what a floor is multiplied by.
BOTH_ROUNDED = 2**-7 / 5e-7


def one_read(
    names: tuple[str, ...], logits: Tensor, reference: Tensor | None, labels: Tensor | None, coefficients: Tensor,
    backend: str, **options: object,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Values [rows of values, N] and the student's gradient, on the CPU."""
    given = {
        "temperature": 1.0, "reference_temperature": None, "alpha": 0.5, "beta": 0.5, "mask": None,
        "ignore_index": -100, "vocab_size": None, "exclude": None, **options,
    }  # fmt: skip
    there = {key: on(DEVICE, x) if isinstance(x, Tensor) else x for key, x in given.items()}
    tensors = [None if x is None else on(DEVICE, x) for x in (logits, reference, labels)]
    call = inputs.prepare("one_read", *tensors, stats=[STATISTICS[name] for name in names], **there)
    values, gradient, other = get(backend).one_read(call, on(DEVICE, coefficients), True, False)
    assert other is None or other.numel() == 0
    return values.cpu(), gradient.cpu()


def signed(*shape: int) -> Tensor:
    return (torch.rand(shape) + 0.5) * torch.randn(shape).sign()


@pytest.mark.parametrize(("backend", "dtype", "columns"), SHAPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss(name: str, backend: str, dtype: torch.dtype, columns: int) -> None:
    logits, reference, weight = rows(3, columns, dtype=dtype), rows(3, columns, dtype=dtype), signed(3)
    student, teacher = (on(DEVICE, x) for x in (logits, reference))
    student.requires_grad_()
    loss = kk.divergence_loss(
        student, teacher, name, weight=on(DEVICE, weight), reduction="sum", temperature=0.8,
        reference_temperature=1.3, backend=backend,
    )  # fmt: skip
    loss.backward()
    assert student.grad is not None
    expected = oracle.evaluate(
        name, logits, reference, cotangent=weight, temperature=0.8, reference_temperature=1.3
    )  # fmt: skip
    # The terms may cancel in the sum.
    size = (weight * expected.value).abs().sum().clamp_min(1)
    assert abs(loss.item() - (weight.double() * expected.value).sum()) <= 1e-5 * size
    floor = expected.student_floor + parked(name, backend, logits, reference, weight, 0.8, 1.3)
    check_gradient(student.grad.cpu(), expected.student, floor)


def _rows_for(plan: str) -> int:
    """Several rows for each stage of each cluster."""
    cluster = int(plan.partition("=")[2].partition(",")[0])
    if cluster > largest_cluster():
        pytest.skip(f"this device has no clusters of {cluster}")
    processors = torch.cuda.get_device_properties(0).multi_processor_count if DEVICE == "cuda" else 1
    return max(7, 6 * processors // cluster + 1)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("backend", CUDA)
def test_every_cluster(name: str, dtype: torch.dtype, plan: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that a loss may be asked for: masks, an excluded column, padding, a coefficient of 0."""
    monkeypatch.setenv("KLDIV_CUDA_PLAN", plan)
    count = _rows_for(plan)
    logits, reference = rows(count, COLUMNS + 24, dtype=dtype), rows(count, COLUMNS + 24, dtype=dtype)
    logits[:, COLUMNS:], reference[:, COLUMNS:] = torch.nan, torch.inf
    mask, exclude = torch.arange(count) % 5 != 3, torch.randint(-1, COLUMNS, (count,))
    coefficients = signed(1, count)
    coefficients[0, 2] = 0
    values, gradient = one_read(
        (name,), logits, reference, None, coefficients, backend, mask=mask, exclude=exclude, vocab_size=COLUMNS
    )  # fmt: skip
    assert not gradient[:, COLUMNS:].any()
    assert not gradient[2].any()
    assert not gradient[~mask].any()
    student, teacher = logits[:, :COLUMNS], reference[:, :COLUMNS]
    expected = oracle.evaluate(name, student, teacher, cotangent=coefficients[0], mask=mask, exclude=exclude)
    check_value(values[0], expected.value)
    floor = expected.student_floor + parked(name, backend, student, teacher, coefficients[0])
    check_gradient(gradient[:, :COLUMNS], expected.student, floor)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("stats", [("logprob", "entropy"), ("collision", "logsumexp"), ("entropy",)], ids="+".join)
@pytest.mark.parametrize("backend", CUDA)
def test_one_tensor_on_every_cluster(
    stats: tuple[str, ...], plan: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KLDIV_CUDA_PLAN", plan)
    count = _rows_for(plan)
    logits, labels = rows(count, COLUMNS, dtype=torch.bfloat16), torch.randint(COLUMNS, (count,))
    labels[0], labels[1], labels[2] = 0, COLUMNS - 1, -100
    coefficients = signed(len(stats), count)
    values, gradient = one_read(stats, logits, None, labels, coefficients, backend, temperature=0.7)
    wanted, floor = torch.zeros(()), torch.zeros(())
    for row, name in enumerate(stats):
        expected = oracle.evaluate(name, logits, labels=labels, cotangent=coefficients[row], temperature=0.7)
        check_value(values[row], expected.value)
        wanted = wanted + expected.student
        # The largest gradients of the statistics one by one: their sum may cancel.
        floor = floor + expected.student_floor + 20 * expected.student.abs().amax(-1, keepdim=True)
    check_gradient(gradient, wanted, floor)


@pytest.mark.parametrize("stats", [("logprob", "entropy"), ("logprob", "logsumexp")], ids="+".join)
@pytest.mark.parametrize("backend", KERNELS)
def test_known_coefficients(stats: tuple[str, ...], backend: str) -> None:
    """The values and the gradient of one call are those of two."""
    count, columns = 5, WIDTHS[-1]
    logits, labels = rows(count, columns, dtype=torch.bfloat16), torch.randint(columns, (count,))
    coefficients = signed(len(stats), count)
    values, gradient = one_read(stats, logits, None, labels, coefficients, backend)
    student = on(DEVICE, logits).requires_grad_()
    two = kk.token_stats(student, labels=on(DEVICE, labels), stats=stats, backend=backend)
    (on(DEVICE, coefficients) * torch.stack([two[name] for name in stats])).sum().backward()
    assert student.grad is not None
    for row, name in enumerate(stats):
        check_value(values[row], two[name].detach().cpu().double())
    wanted = student.grad.cpu().double()
    check_gradient(gradient, wanted, 1 + BOTH_ROUNDED * wanted.abs())
    assert gradient.any(-1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", CUDA)
def test_bad_rows_are_as_in_two_sweeps(
    name: str, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two-sweep kernels' contract is tested in test_gpu_contract.py."""
    columns = WIDTHS[0]
    logits, reference = rows(8, columns, dtype=dtype), rows(8, columns, dtype=dtype)
    logits[0, 5] = reference[1, 5] = -torch.inf
    logits[2, ::2] = reference[2, 1::2] = -torch.inf
    logits[3, 3:-20] = reference[3, 3:-20] = -torch.inf
    logits[4], reference[5] = -torch.inf, -torch.inf
    logits[6, 7], reference[7, 9] = torch.nan, torch.inf
    got = {}
    for plan in ("two-sweep", "cluster=1"):
        monkeypatch.setenv("KLDIV_CUDA_PLAN", plan)
        got[plan] = one_read((name,), logits, reference, None, torch.ones(1, 8), backend)
    (two, two_gradient), (one, one_gradient) = got.values()
    check_value(one[0], two[0].double())
    finite = two_gradient.isfinite().all(-1)
    assert torch.equal(finite, one_gradient.isfinite().all(-1))
    wanted = two_gradient[finite].double()
    # Probabilities, whose roundings the gradient's terms bear, are at most 1.
    floor = 1 + parked(name, backend, logits[finite], reference[finite], torch.ones(int(finite.sum())))
    check_gradient(one_gradient[finite], wanted, floor + BOTH_ROUNDED * wanted.abs())
