"""The one-read CUDA kernel against float64, on the host's model of a GPU: its plans, its rows, its order of threads."""

from __future__ import annotations

import itertools

import pytest
import torch
from checks import CUDA_ON_HOST, DIVERGENCES, with_parameters
from cuda_host.one_read import DTYPES, Machine, check, kernel, pair, prepare, run, some_coefficients, uneven
from torch import Tensor

import kldiv_kernels as kk

if not CUDA_ON_HOST:
    pytest.skip("runs under KLDIV_CUDA_HOST=1", allow_module_level=True)

CLUSTERS, STAGES = (1, 2, 4, 8, 16), (1, 2, 3, 4)
PLANS = list(itertools.product(CLUSTERS, STAGES))
# Of the student alone, in any order; with a divergence beside them.
ONE_TENSOR = [("entropy",), ("logprob",), ("logsumexp",), ("collision",), ("logprob", "entropy"),
              ("logsumexp", "entropy", "logprob"), ("logprob", "collision", "logsumexp")]  # fmt: skip
MIXED = [("forward_kl", "logprob"), ("logprob", "js", "logsumexp"), ("logsumexp", "hellinger")]


def _labels(rows: int, columns: int) -> Tensor:
    """The ends of the row, an ignored one, and others."""
    labels = torch.randint(columns, (rows,))
    labels[0], labels[rows // 2], labels[-1] = 0, -100, columns - 1
    return labels


CASES = [
    (name, alpha, beta, DTYPES[(i + j) % 3], PLANS[(7 * i + 5 * j) % len(PLANS)])
    for i, (name, alpha, beta) in enumerate(with_parameters(DIVERGENCES))
    for j in range(3)
]


@pytest.mark.parametrize(("name", "alpha", "beta", "dtype", "plan"), CASES, ids=str)
def test_divergence(
    name: str, alpha: float, beta: float, dtype: torch.dtype, plan: tuple[int, int], machine: Machine
) -> None:
    """Everything that a loss can be asked for, at once."""
    cluster, stages = plan
    machine(cluster, stages)
    _, columns = uneven(cluster)
    rows = 2 * stages + 3
    logits, reference = pair(rows, columns, dtype)
    # One row whose distributions are close, where what is subtracted cancels.
    reference[1] = (logits[1].float() + 0.01 * torch.randn(columns)).to(dtype)
    coefficients = some_coefficients((name,), rows)
    coefficients[0, 2] = 0
    mask, exclude = torch.arange(rows) % 5 != 3, torch.randint(columns, (rows,))
    exclude[1] = -1
    _, gradient = check(
        (name,), logits, reference, coefficients=coefficients, mask=mask, exclude=exclude, alpha=alpha, beta=beta,
        temperature=0.8, reference_temperature=1.3,
    )  # fmt: skip
    assert not gradient[2].any()
    assert not gradient[~mask].any()
    assert not gradient[torch.arange(rows), exclude][exclude >= 0].any()


@pytest.mark.parametrize("rows", ["one", "fewer than clusters", "more than the stages hold"])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"cluster={plan[0]},stages={plan[1]}")
def test_plans_and_rows(plan: tuple[int, int], rows: str, machine: Machine) -> None:
    cluster, stages = plan
    count = {"one": 1, "fewer than clusters": 2, "more than the stages hold": 2 * stages + 3}[rows]
    machine(cluster, stages, clusters=2 if count > 2 else 3, seed=cluster + stages)
    _, columns = uneven(cluster)
    check(("forward_kl",), *pair(count, columns))
    check(("js",), *pair(count, columns), beta=0.3)
    check(("entropy", "logprob"), pair(count, columns, torch.float32)[0], None, _labels(count, columns))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stats", ONE_TENSOR + MIXED, ids="+".join)
def test_labels(stats: tuple[str, ...], dtype: torch.dtype, machine: Machine) -> None:
    slice_columns, columns = uneven(4)
    logits, reference = pair(9, columns, dtype)
    labels = _labels(9, columns)
    labels[1:4] = torch.tensor([slice_columns - 1, slice_columns, 2 * slice_columns])
    # Where a coefficient is 0 its statistic takes no part, and where all are, nothing is left.
    coefficients = some_coefficients(stats, 9)
    coefficients[0, 5] = 0
    coefficients[:, 6] = 0
    two = any(name in DIVERGENCES for name in stats)
    _, gradient = check(
        stats, logits, reference if two else None, labels, coefficients=coefficients, temperature=0.7
    )  # fmt: skip
    assert not gradient[6].any()
    assert gradient[7].any()


@pytest.mark.parametrize("kept", [[0], [8], [4], [0, 8], [1, 2, 3, 5, 6, 7], list(range(9)), []], ids=str)
@pytest.mark.parametrize("stages", [1, 3])
def test_mask(kept: list[int], stages: int, machine: Machine) -> None:
    machine(4, stages)
    logits, reference = pair(9, uneven(4)[1])
    mask = torch.zeros(9, dtype=torch.bool)
    mask[kept] = True
    # Rows that are left out are never read.
    logits[~mask], reference[~mask] = torch.nan, torch.inf
    values, gradient = check(("js",), logits, reference, mask=mask)
    assert not values[0, ~mask].any()
    assert not gradient[~mask].any()
    assert gradient[mask].any(-1).all()


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "js", "hellinger", "entropy", "renyi"])
def test_excluded_column(name: str, machine: Machine) -> None:
    """One at each border of each CTA's slice, the largest logit of its row, and as good as if it were −inf."""
    slice_columns, columns = uneven(4)
    borders = [0, *(i * slice_columns + j for i in range(1, 4) for j in (-1, 0)), columns - 1, -1]
    exclude = torch.tensor(borders)
    rows = len(borders)
    logits, reference = pair(rows, columns)
    out = torch.arange(columns) == exclude[:, None]
    logits[out], reference[out] = 20.0, 18.0
    two = None if name == "entropy" else reference
    coefficients = some_coefficients((name,), rows)
    values, gradient = check((name,), logits, two, coefficients=coefficients, exclude=exclude)
    assert not gradient[out].any()
    without = [x.masked_fill(out, -torch.inf) for x in (logits, reference)]
    same = run(prepare((name,), without[0], None if two is None else without[1]), coefficients)
    assert torch.equal(values, same[0])
    assert torch.equal(gradient, same[1])


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "hellinger", "jeffreys", "renyi", "alpha_beta"])
def test_parameters_per_token(name: str, machine: Machine) -> None:
    logits, reference = pair(7, 776, torch.float32)
    scales = {key: torch.rand(7) + 0.6 for key in ("temperature", "reference_temperature")}
    check((name,), logits, reference, alpha=torch.rand(7) * 0.5 + 0.2, beta=torch.rand(7) + 0.3, **scales)


@pytest.mark.parametrize("name", ["js", "forward_kl", "entropy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_columns(name: str, dtype: torch.dtype, machine: Machine) -> None:
    """Never read; their gradient is 0. The widths of the two tensors differ."""
    logits, reference = pair(5, 776 + 4104, dtype)
    logits[:, 776:], reference[:, 776:] = torch.nan, torch.inf
    check((name,), logits, None if name == "entropy" else reference[:, :784].contiguous(), vocab_size=776)


@pytest.mark.parametrize("how", ["every other row", "transposed", "cut out", "repeated", "four dimensions"])
def test_strides(how: str, machine: Machine) -> None:
    """Rows that lie apart are copied as well as those that touch, and the gradient has the logits' shape."""

    def view(x: Tensor) -> Tensor:
        return {
            "every other row": x[:, ::2],
            "transposed": x.transpose(0, 1),
            "cut out": x[1:, 1:3, 16:-24],
            "repeated": x[:, :1].expand(-1, 3, -1),
            "four dimensions": x.reshape(2, 2, 2, 2, -1).permute(3, 0, 2, 1, 4),
        }[how]

    logits, reference = (view(x.reshape(4, 4, 816)) for x in pair(16, 816))
    check(("js",), logits, reference.contiguous())
    check(("forward_kl",), logits.contiguous(), reference)


@pytest.mark.parametrize("how", ["odd columns", "odd width", "shifted", "rows apart by an odd number", "dtypes"])
def test_what_bulk_copies_cannot_take(how: str, machine: Machine) -> None:
    """The plan that is asked for gives way to the two-sweep kernels."""
    logits, reference = pair(4, 840)
    shapes = {
        "odd columns": (logits[:, :779].contiguous(), reference[:, :779].contiguous()),
        "odd width": (logits[:, :781].contiguous(), reference[:, :776].contiguous()),
        "shifted": (logits[:, 3:779], reference[:, :776]),
        "rows apart by an odd number": (logits[:, :776], reference.reshape(-1)[: 4 * 783].reshape(4, 783)[:, :776]),
        "dtypes": (logits[:, :776], reference[:, :776].float()),
    }
    student, teacher = shapes[how]
    options = {"vocab_size": 776} if how == "odd width" else {}
    check(("forward_kl",), student, teacher, ran=lambda kernel: "two-sweep" in kernel, **options)


@pytest.mark.parametrize("kind", ["forward_kl", "js", "tvd"])
def test_upstream_gradient(kind: str, machine: Machine) -> None:
    logits, reference = pair(6, 776, torch.float32)
    weight, labels = torch.randn(6), torch.tensor([0, -100, 3, 4, 5, -100])
    gradients = []
    for upstream in (1.0, -2.5):
        student = logits.clone().requires_grad_()
        loss = kk.divergence_loss(student, reference, kind, weight=weight, labels=labels, backend="cuda")
        loss.backward(torch.tensor(upstream))
        gradients.append(student.grad)
    assert torch.equal(gradients[1], -2.5 * gradients[0])
    given = labels != -100
    values, gradient = check(
        (kind,), logits, reference, mask=given, coefficients=(weight * given / 4)[None]
    )  # fmt: skip
    assert torch.equal(gradients[0], gradient)
    assert loss.item() == pytest.approx((weight * given / 4 * values[0]).sum().item(), rel=1e-5)


@pytest.mark.parametrize("device", ["sm_90", "sm_100", "sm_120"])
def test_devices(device: str, machine: Machine) -> None:
    """Of their own choice, with their own shared memory."""
    machine(device=device, plan="")
    check(("js",), *pair(3, 8192 + 8))
    wide = pair(2, 24_000, torch.float32)
    check(("forward_kl",), *wide, ran=lambda kernel: ("8 CTAs" if device == "sm_120" else "4 CTAs") in kernel)


@pytest.mark.parametrize("plan", ["", "cluster=16", "cluster=16,stages=1"])
def test_a_refused_cluster_gives_way_to_a_smaller_one(plan: str, machine: Machine) -> None:
    """Also where KLDIV_CUDA_PLAN asks for it: the planner then chooses."""
    machine(largest=8, plan=plan)
    logits, reference = pair(1, 131_072, torch.float32)
    check(("forward_kl",), logits, reference, ran=lambda kernel: "refuses clusters of 16" in kernel)


@pytest.mark.parametrize(
    ("stats", "dtype"),
    [(("forward_kl",), torch.bfloat16), (("js",), torch.bfloat16), (("cauchy_schwarz",), torch.float16),
     (("logprob", "entropy"), torch.float32)],
    ids=str,
)  # fmt: skip
def test_same_bits_in_any_order_and_batch(stats: tuple[str, ...], dtype: torch.dtype, machine: Machine) -> None:
    """From run to run, for every order of threads, however many clusters and stages there are, alone or in a batch."""
    two = stats[0] != "logprob"
    logits, reference = pair(7, 1032, dtype)
    labels, coefficients = _labels(7, 1032), some_coefficients(stats, 7)

    def bits(rows: slice | list[int] = slice(None)) -> tuple[Tensor, Tensor]:
        call = prepare(stats, logits[rows], reference[rows] if two else None, labels[rows])
        assert "one-read" in kernel(call, coefficients[:, rows])
        return run(call, coefficients[:, rows])

    machine(4, 2)
    values, gradient = bits()
    for seed in range(30):
        machine(4, 1 + seed % 3, clusters=1 + seed % 4, seed=seed)
        rows = [slice(None), [seed % 7], [6, 2, 3]][seed % 3]
        again = bits(rows)
        assert torch.equal(again[0], values[:, rows]), seed
        assert torch.equal(again[1], gradient[rows]), seed
